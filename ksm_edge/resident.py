"""Resident memory of this process, as the kernel counts it."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from pathlib import Path


def peak_rss_bytes() -> int:
    """The peak so far, from VmHWM; `ru_maxrss` of a child would start at its parent's peak."""
    return _field("VmHWM")


def rss_bytes() -> int:
    """What is resident now."""
    return _field("VmRSS")


def give_back() -> None:
    """Return freed memory to the system, where the C library can; glibc would keep it for later."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _field(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return 0
