"""Steps that learn, timed: with the standard library alone, so that any environment can run it."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ksm_edge.resident import peak_rss_bytes, rss_bytes  # found by the line above; it needs no package either

WARM_UP = 3  # steps: the allocators' first
EVERY_S = 0.001  # a trace looks at resident memory


def timed(step: Callable[[], float], steps: int, warm_up: int = WARM_UP) -> dict[str, Any]:
    """Milliseconds and losses of so many steps behind a few that warm up, and the process' peak of memory."""
    losses, step_ms = [step() for _ in range(warm_up)], []
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(steps):
        began = time.perf_counter()
        losses.append(step())
        step_ms.append(round((time.perf_counter() - began) * 1e3, 3))
    share = (time.process_time() - cpu) / (time.perf_counter() - wall)
    return {"step_ms": step_ms, "losses": losses, "peak_rss_bytes": peak_rss_bytes(), "cpu_share": round(share, 3)}


def traced(step: Callable[[], float]) -> list[tuple[float, int]]:
    """Resident memory during one step behind the warm-up: milliseconds since its start, bytes."""
    for _ in range(WARM_UP):
        step()
    samples, done = list[tuple[float, int]](), threading.Event()
    began = time.perf_counter()

    def look() -> None:
        while not done.wait(EVERY_S):
            samples.append((round((time.perf_counter() - began) * 1e3, 2), rss_bytes()))

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        step()
    finally:
        done.set()
        watcher.join()
    return samples


def falls(losses: list[float]) -> bool:
    """Whether something was learned."""
    return all(map(math.isfinite, losses)) and losses[-1] < losses[0]
