"""Memory as the kernel counts it, seen on blocks that the test makes itself."""

from __future__ import annotations

import ctypes
import mmap
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ksm_edge.resident import HUGE_PAGE, give_back, peak_rss_bytes, rss_bytes, use_huge_pages

BLOCK = 8 * HUGE_PAGE


def test_peak_stays_where_resident_memory_falls_again():
    before = rss_bytes()
    block = mmap.mmap(-1, BLOCK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for page in range(0, BLOCK, mmap.PAGESIZE):  # piece by piece: a large object that is freed may stay with malloc
        block[page] = 1
    assert rss_bytes() >= before + BLOCK // 2
    block.close()
    assert rss_bytes() < before + BLOCK // 2
    assert peak_rss_bytes() >= before + BLOCK // 2


def test_large_block_in_use_comes_to_lie_in_huge_pages():
    if "[never]" in _setting():
        pytest.skip("this kernel has no transparent huge pages, or has them switched off")
    block = mmap.mmap(-1, BLOCK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block.madvise(mmap.MADV_NOHUGEPAGE)  # what it starts with is small pages
    content = bytes(range(256)) * (BLOCK // 256)
    block.write(content)
    block.madvise(mmap.MADV_HUGEPAGE)
    before = _huge_bytes()
    use_huge_pages()
    if _huge_bytes() == before:
        pytest.skip("the kernel refused: older than Linux 6.1, or no 2 MiB of memory in one piece")
    assert _huge_bytes() >= before + BLOCK // 2
    assert block[:] == content


def test_block_that_is_hardly_used_does_not_become_resident():
    block = mmap.mmap(-1, BLOCK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block[0] = 1
    before = rss_bytes()
    use_huge_pages()
    assert rss_bytes() < before + BLOCK // 2
    block.close()


def test_code_that_has_run_leaves_and_comes_back():
    with tempfile.TemporaryFile() as file:
        file.truncate(BLOCK)
        file.seek(BLOCK - 1)
        file.write(b"x")
        file.flush()
        code = mmap.mmap(file.fileno(), BLOCK, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)  # as a library lies there
        give_back()
        assert all(code[page] == 0 for page in range(0, BLOCK, mmap.PAGESIZE))
        before = rss_bytes()
        give_back()
        assert rss_bytes() < before - BLOCK // 2
        assert code[-1:] == b"x"
        code.close()


def test_code_that_was_written_to_stays():
    with _written_code() as (address, content):
        give_back()
        assert ctypes.string_at(address, len(content)) == content


def test_nothing_leaves_where_the_kernel_tells_nothing_of_pages(tmp_path, monkeypatch):
    """As under qemu, whose smaps has mappings and zeros."""
    with _written_code() as (address, content):
        mapping = re.search(rf"^{address:x}-.*\n(?:[A-Z]\w+:.*\n)+", Path("/proc/self/smaps").read_text(), re.MULTILINE)
        silent = tmp_path / "smaps"
        silent.write_text(re.sub(r"\d+ kB", "0 kB", mapping[0]))
        monkeypatch.setattr("ksm_edge.resident.SMAPS", silent)
        give_back()
        assert ctypes.string_at(address, len(content)) == content


@contextmanager
def _written_code() -> Iterator[tuple[int, bytes]]:
    """Address and content of a page that was written to, as by a debugger: in the file is something else."""
    page, content = mmap.PAGESIZE, b"otherwise"
    with tempfile.TemporaryFile() as file:
        file.write(b"as stored" + bytes(page))
        file.flush()
        code = mmap.mmap(file.fileno(), page, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        code[: len(content)] = content
        protect = ctypes.CDLL(None).mprotect
        address = ctypes.addressof(ctypes.c_char.from_buffer(code))
        assert protect(ctypes.c_void_p(address), ctypes.c_size_t(page), mmap.PROT_READ | mmap.PROT_EXEC) == 0
        yield address, content


def _setting() -> str:
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return path.read_text() if path.exists() else "[never]"


def _huge_bytes() -> int:
    return 1024 * sum(int(kb) for kb in re.findall(r"AnonHugePages: +(\d+)", Path("/proc/self/smaps").read_text()))
