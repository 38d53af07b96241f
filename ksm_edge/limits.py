"""The one enforcer of a memory budget: a command runs in a process that is stopped when it takes more.

What counts is resident memory, as the budget of a board does. A memory cgroup holds the kernel's own limit where this
process may make one (v2 or v1); a watchdog that looks at the process every few milliseconds holds it everywhere, and
also where the cgroup does not count pages of libraries that other processes had loaded before.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

LOOK_SECONDS = 0.01  # between two looks of the watchdog
SAMPLE_SECONDS = 0.1  # between two samples that are kept
WATCHDOG = "watchdog on resident memory"
SUPERVISED = "KSM_EDGE_ENFORCED"  # in the environment of the process that runs under a limit: what holds it
FORWARDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass
class Outcome:
    """How a command under a limit ended."""

    exit_status: int  # as a shell gives it: 128 + the signal that ended it
    exceeded: bool  # whether the limit was what ended it
    enforced: str  # what held the limit
    peak_rss_bytes: int = 0  # the largest that the watchdog saw
    rss_bytes: list[tuple[float, int]] = field(default_factory=list)  # (seconds since the start, resident memory)


def enforced_by() -> str | None:
    """What holds the limit that this process runs under; None where there is none."""
    return os.environ.get(SUPERVISED)


def run_limited(command: Sequence[str], budget_bytes: int | None) -> Outcome:
    """Run a command to its end, or to the moment when it or a child of it takes more than the budget.

    It has this process's own input and output; the signals that end a program are passed on to it. Without a budget it
    is only looked at.
    """
    with _cgroup(budget_bytes) as cgroup:
        enforced = WATCHDOG if cgroup is None else f"memory cgroup {cgroup.version} and {WATCHDOG}"
        marked = {} if budget_bytes is None else {SUPERVISED: enforced}
        outcome = Outcome(0, False, enforced)
        # From its first page on: what a process takes before it joins a cgroup is not counted there.
        entering = (
            [] if cgroup is None else ["sh", "-c", 'echo 0 > "$0" && exec "$@"', str(cgroup.path / "cgroup.procs")]
        )
        child = subprocess.Popen([*entering, *command], env={**os.environ, **marked})
        with _passed_on(child):
            _watch(child, budget_bytes, outcome)
        status = child.wait()
        outcome.exit_status = 128 - status if status < 0 else status
        # It may be a process that the command started that was ended, and the command went on.
        outcome.exceeded |= cgroup is not None and cgroup.has_killed()
    return outcome


def _watch(child: subprocess.Popen[bytes], budget_bytes: int | None, outcome: Outcome) -> None:
    """Until the child has ended; ends it, and its children, where they take more than the budget."""
    began = time.monotonic()
    while child.poll() is None:
        resident = _resident_bytes(child.pid)
        outcome.peak_rss_bytes = max(outcome.peak_rss_bytes, resident)
        seconds = time.monotonic() - began
        if not outcome.rss_bytes or seconds - outcome.rss_bytes[-1][0] >= SAMPLE_SECONDS:
            outcome.rss_bytes.append((round(seconds, 3), resident))
        if budget_bytes is not None and resident > budget_bytes:
            outcome.exceeded = True
            for pid in (child.pid, *_started_by(child.pid)):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return
        time.sleep(LOOK_SECONDS)


def _resident_bytes(pid: int) -> int:
    """Of a process or the largest of those it started: these are helpers that run while it waits."""
    found = 0
    for each in (pid, *_started_by(pid)):
        with suppress(OSError, IndexError, ValueError):
            found = max(found, int(Path(f"/proc/{each}/statm").read_text().split()[1]) * PAGE)
    return found


def _started_by(pid: int) -> Iterator[int]:
    """Its children, theirs, and so on."""
    children: list[str] = []
    with suppress(OSError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for child in map(int, children):
        yield child
        yield from _started_by(child)


@contextmanager
def _passed_on(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """Signals for this process go to the child: it knows how to end well."""

    def pass_on(number: int, _frame: object) -> None:
        # The terminal sends Ctrl-C to both.
        if number != signal.SIGINT or not os.isatty(0):
            with suppress(ProcessLookupError):
                child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in FORWARDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class _Cgroup:
    version: str
    path: Path

    def has_killed(self) -> bool:
        name = "memory.events" if self.version == "v2" else "memory.oom_control"
        with suppress(OSError):
            fields = dict(line.split() for line in (self.path / name).read_text().splitlines())
            return int(fields.get("oom_kill", 0)) > 0
        return False


@contextmanager
def _cgroup(budget_bytes: int | None) -> Iterator[_Cgroup | None]:
    """A new one with that limit below this process's own; None where that cannot be made, or there is no limit."""
    places = () if budget_bytes is None else _own_cgroups()
    made = next(filter(None, (_made(version, parent, budget_bytes or 0) for version, parent in places)), None)
    try:
        yield made
    finally:
        if made is not None:
            _remove(made.path)


def _own_cgroups() -> Iterator[tuple[str, Path]]:
    """The memory cgroups that this process is in, by version."""
    try:
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
        memberships = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in memberships:
        for _, where, kind, options, *_ in mounts:
            if kind == "cgroup2" and not controllers:
                yield "v2", Path(where, path.lstrip("/"))
            elif kind == "cgroup" and "memory" in controllers.split(",") and "memory" in options.split(","):
                yield "v1", Path(where, path.lstrip("/"))


def _made(version: str, parent: Path, budget_bytes: int) -> _Cgroup | None:
    path = parent / f"ksm-edge-{os.getpid()}"
    limit, swap = (
        ("memory.max", ("memory.swap.max", 0))
        if version == "v2"
        else ("memory.limit_in_bytes", ("memory.memsw.limit_in_bytes", budget_bytes))
    )
    try:
        path.mkdir()
        if not (path / limit).exists():
            raise OSError  # this level hands on no memory controller
        (path / limit).write_text(str(budget_bytes))
        if (path / swap[0]).exists():
            (path / swap[0]).write_text(str(swap[1]))
        return _Cgroup(version, path)
    except OSError:
        _remove(path)
        return None


def _remove(path: Path) -> None:
    for _ in range(50):  # the kernel may not have let go of a process that has just ended
        try:
            path.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.02)
