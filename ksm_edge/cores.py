"""Which cores to compute on, where some are faster than others, as in Arm's big.LITTLE.

What there is to compute is shared out evenly among threads, so all wait for the one on the slowest core. Images are
made by a thread that nobody waits for, which may have any core.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

SYSTEM = Path("/sys/devices/system/cpu")
MAX_THREADS = 256  # more than any board has cores; each takes memory
_before: set[int] | None = None  # that this process might have, where it was kept to some of them


def fast_cores(allowed: Collection[int] | None = None, system: Path = SYSTEM) -> frozenset[int]:
    """Of the cores that may be used those that do the most together when each does as much as the slowest of them.

    `allowed`: those of this thread, if not given. By `cpu_capacity`, which Linux knows on Arm
    (Documentation/ABI/testing/sysfs-devices-system-cpu); all where it says nothing.
    """
    cores = os.sched_getaffinity(0) if allowed is None else allowed
    capacities = {core: _capacity(core, system) for core in cores}

    def together(least: int) -> tuple[int, int]:
        return least * sum(capacity >= least for capacity in capacities.values()), least  # of equals the fewer

    least = max(capacities.values(), key=together)
    return frozenset(core for core, capacity in capacities.items() if capacity >= least)


def _capacity(core: int, system: Path) -> int:
    """1024 for the fastest core of a board."""
    try:
        return max(1, int((system / f"cpu{core}" / "cpu_capacity").read_text()))
    except (OSError, ValueError):
        return 1024


def compute_on_fast_cores(threads: int) -> None:
    """Keep this thread, and those that it starts, to fast cores, if there are enough for so many threads."""
    global _before
    allowed, fast = os.sched_getaffinity(0), fast_cores()
    if threads <= len(fast) < len(allowed):
        with suppress(OSError):  # somebody forbids it: slower, but as right
            os.sched_setaffinity(0, fast)
            _before = allowed


def run_anywhere() -> None:
    """Let this thread have the cores that `compute_on_fast_cores` took away."""
    if _before is not None:
        with suppress(OSError):
            os.sched_setaffinity(0, _before)
