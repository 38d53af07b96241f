"""Which cores to compute on, where some are faster than others, as in Arm's big.LITTLE.

What there is to compute is shared out evenly among threads, so all wait for the one on the slowest core. Images are
made by a thread that nobody waits for, which may have any core.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

# Of this process, when it began.
ALLOWED = frozenset(os.sched_getaffinity(0))
SYSTEM = Path("/sys/devices/system/cpu")


def fast_cores(allowed: Collection[int] = ALLOWED, system: Path = SYSTEM) -> frozenset[int]:
    """Of the cores that may be used those that do the most together when each does as much as the slowest of them.

    By `cpu_capacity`, which Linux knows on Arm (Documentation/ABI/testing/sysfs-devices-system-cpu); all where it says
    nothing.
    """
    capacities = {core: _capacity(core, system) for core in allowed}
    least = max(set(capacities.values()), key=lambda capacity: capacity * _count(capacities.values(), capacity))
    return frozenset(core for core, capacity in capacities.items() if capacity >= least)


def _count(capacities: Collection[int], least: int) -> int:
    return sum(capacity >= least for capacity in capacities)


def _capacity(core: int, system: Path) -> int:
    """1024 for the fastest core of a board."""
    try:
        return max(1, int((system / f"cpu{core}" / "cpu_capacity").read_text()))
    except (OSError, ValueError):
        return 1024


def compute_on_fast_cores(threads: int) -> None:
    """Keep this thread, and those that it starts, to fast cores, if there are enough for so many threads."""
    fast = fast_cores()
    if threads <= len(fast) < len(ALLOWED):
        os.sched_setaffinity(0, fast)


def run_anywhere() -> None:
    """Let this thread have any core that the process had when it began."""
    if os.sched_getaffinity(0) != ALLOWED:
        os.sched_setaffinity(0, ALLOWED)
