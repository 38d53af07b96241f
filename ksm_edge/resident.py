"""Resident memory of this process: how much the kernel counts, and in which pages it lies."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
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
    """Return to the system what is not needed now: freed memory, which glibc would keep, and code that has run.

    To be called where one kind of work ends. Most of the code was for importing, and for ONNX Runtime to read and
    optimise graphs; what is used again is there again at its next use, from the system's cache of the file. Not while
    another thread loads a library, whose pages the linker may be about to write to.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    _let_go_of_code()


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of glibc's mallopt
LARGE = 1 << 20


def use_compact_heap() -> None:
    """Have freed blocks go back to the system soon, and one heap for all threads, where the C library can.

    glibc keeps a heap for each thread and, having seen a large block freed, puts the next ones into it too: what lies
    between those that are freed is then held. Seen with MobileNetV2 at 224 px: 224 MiB at the peak for 230 to 235. What
    is freed at the heap's end stays up to LARGE: an update's arrays lie there, which took page faults each time.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_ARENA_MAX, 1)
        libc.mallopt(M_MMAP_THRESHOLD, LARGE)
        libc.mallopt(M_TRIM_THRESHOLD, LARGE)


SMAPS = Path("/proc/self/smaps")
MADV_DONTNEED = 4
MADV_COLLAPSE = 25  # Linux 6.1; an older kernel refuses it, which does no harm
HUGE_PAGE = 2 << 20
# START-END rw-p OFFSET DEVICE INODE NAME, the inode 0 where no file stands behind; then the fields of the mapping
MAPPING = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ \S+ (\d+).*\n((?:[A-Z]\w+:.*\n)+)", re.MULTILINE)


@dataclass(frozen=True)
class _Mapping:
    """Addresses that the kernel keeps together, as /proc/self/smaps tells of them."""

    start: int
    size: int  # bytes
    rights: str
    has_file: bool
    fields: str

    def bytes_of(self, field: str) -> int:
        found = re.search(rf"^{field}: +(\d+) kB", self.fields, re.MULTILINE)
        return int(found[1]) * 1024 if found else 0


def _mappings() -> Iterator[_Mapping]:
    for start, end, rights, inode, fields in MAPPING.findall(SMAPS.read_text()):
        yield _Mapping(int(start, 16), int(end, 16) - int(start, 16), rights, inode != "0", fields)


def _advise(mappings: Iterable[_Mapping], advice: int) -> None:
    madvise = ctypes.CDLL(None).madvise
    for mapping in mappings:
        madvise(ctypes.c_void_p(mapping.start), ctypes.c_size_t(mapping.size), advice)


def _let_go_of_code() -> None:
    with suppress(OSError, AttributeError):
        # A page that was written to, by the linker or a debugger, would come back as it is in the file. Such pages are
        # anonymous, dirty or not, or out in the swap. Where nothing is said to be resident nothing is known of that:
        # qemu, by which a workstation runs images for Arm, has zeros throughout from version 8.1 on.
        files = (m for m in _mappings() if m.rights in ("r-xp", "r--p") and m.has_file and m.bytes_of("Rss"))
        code = (m for m in files if not m.bytes_of("Anonymous") and not m.bytes_of("Swap"))
        _advise(code, MADV_DONTNEED)


def use_huge_pages() -> None:
    """Put this process's large blocks of memory into 2 MiB pages, where the kernel can: fewer misses of the TLB.

    Only blocks that are resident already, nearly all of them, so that what is resident hardly grows. To be called when
    all that will be used for long has been used once, and nothing is being computed.
    """
    with suppress(OSError, AttributeError):
        _advise(_large_blocks(), MADV_COLLAPSE)


def _large_blocks() -> Iterator[_Mapping]:
    """Private anonymous mappings of at least one huge page, nine tenths resident."""
    for mapping in _mappings():
        is_memory = mapping.rights == "rw-p" and not mapping.has_file
        if is_memory and mapping.size >= HUGE_PAGE and mapping.bytes_of("Rss") >= 0.9 * mapping.size:
            yield mapping


def _field(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return 0
