"""Resident memory of this process: how much the kernel counts, and in which pages it lies."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def peak_rss_bytes() -> int:
    """The peak so far, from VmHWM; `ru_maxrss` of a child would start at its parent's peak."""
    return _field("VmHWM")


def rss_bytes() -> int:
    """What is resident now."""
    return _field("VmRSS")


def shared_bytes() -> dict[str, int]:
    """`rss_bytes`, and `pss_bytes`, in which a page that several processes have counts in equal parts."""
    fields = dict(re.findall(r"^(\w+): +(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE))
    return {"rss_bytes": 1024 * int(fields["Rss"]), "pss_bytes": 1024 * int(fields["Pss"])}


def give_back() -> None:
    """Return freed memory to the system, where the C library can; glibc would keep it for later."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8  # of glibc's mallopt
LARGE = 1 << 20


def use_compact_heap() -> None:
    """Have freed blocks go back to the system at once, and one heap for all threads, where the C library can.

    glibc keeps a heap for each thread and, having seen a large block freed, puts the next ones into it too: what lies
    between those that are freed is then held. Seen with MobileNetV2 at 224 px: 224 MiB at the peak for 230 to 235.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_ARENA_MAX, 1)
        libc.mallopt(M_MMAP_THRESHOLD, LARGE)


MADV_COLLAPSE = 25  # Linux 6.1; an older kernel refuses it, which does no harm
HUGE_PAGE = 2 << 20
# START-END rw-p ... INODE, 0 for memory that no file stands behind, then the fields of the mapping
MAPPING = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) rw-p \S+ \S+ 0 .*\n((?:[A-Z]\w+:.*\n)+)", re.MULTILINE)


def use_huge_pages() -> None:
    """Put this process's large blocks of memory into 2 MiB pages, where the kernel can: fewer misses of the TLB.

    Only blocks that are resident already, nearly all of them, so that what is resident hardly grows. To be called when
    all that will be used for long has been used once, and nothing is being computed.
    """
    with suppress(OSError, AttributeError):
        madvise = ctypes.CDLL(None).madvise
        for start, size in _large_blocks():
            madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), MADV_COLLAPSE)


def _large_blocks() -> Iterator[tuple[int, int]]:
    """Start and size in bytes of private anonymous mappings of at least one huge page, nine tenths resident."""
    for start, end, fields in MAPPING.findall(Path("/proc/self/smaps").read_text()):
        first, size = int(start, 16), int(end, 16) - int(start, 16)
        resident = re.search(r"^Rss: +(\d+) kB", fields, re.MULTILINE)
        if size >= HUGE_PAGE and resident and int(resident[1]) * 1024 >= 0.9 * size:
            yield first, size


def _field(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return 0
