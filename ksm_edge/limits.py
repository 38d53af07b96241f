"""The one enforcer of a memory budget: a command runs in a process that is stopped when it takes more.

What counts is resident memory, as the budget of a board does. A memory cgroup holds the kernel's own limit where this
process may make one (v2 or v1). A watchdog that looks every few milliseconds at the command, and at what it starts,
holds it everywhere; pages of files count once, though several processes have them, and so do processes that run the
same command. The cgroup does not count such pages at all where another process had loaded them before.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from ksm_edge.resident import rss_bytes

LOOK_SECONDS = 0.01  # between two looks of the watchdog that holds a limit
SAMPLE_SECONDS = 0.1  # between two samples that are kept, and two looks where there is no limit
MOST_SAMPLES = 4000  # from then on every other one is dropped
WATCHDOG = "watchdog on resident memory"
# In the environment of the process that runs under a limit: the pid of who holds it, at how many bytes, and with what.
SUPERVISED = "KSM_EDGE_ENFORCED"
FORWARDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
PAGE = os.sysconf("SC_PAGE_SIZE")
PR_SET_PDEATHSIG = 1


@dataclass
class Outcome:
    """How a command under a limit ended."""

    exit_status: int  # as a shell gives it: 128 + the signal that ended it
    exceeded: bool  # whether it, or something that it started, was ended by the limit
    enforced: str  # what held the limit
    interrupted: bool = False  # whether a signal was passed on to it
    peak_rss_bytes: int = 0  # the most that the watchdog saw, of it and what it started together
    rss_bytes: list[tuple[float, int]] = field(default_factory=list)  # (seconds since the start, resident memory)


def enforced_by() -> str | None:
    """What holds the limit that this process runs under; None where there is none."""
    limit = _limit()
    return None if limit is None else limit[1]


def room_bytes() -> int:
    """Resident memory that this process and what it starts may have: its limit, or what it has and what is free."""
    import psutil

    free = rss_bytes() + int(psutil.virtual_memory().available)
    limit = _limit()
    return free if limit is None else min(free, limit[0])


def _limit() -> tuple[int, str] | None:
    """That this process runs under, in bytes, and what holds it."""
    pid, _, limit = os.environ.get(SUPERVISED, "").partition(":")
    if pid != str(os.getppid()):
        return None
    size, _, how = limit.partition(":")
    return int(size), how


def end_with_supervisor() -> None:
    """Have this process ended when the one that holds its limit is: nobody else would hold it."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def run_limited(command: Sequence[str], budget_bytes: int | None) -> Outcome:
    """Run a command to its end, or to the moment when it or what it starts takes more than the budget.

    It has this process's own input and output; in the main thread the signals that end a program are passed on to it.
    Without a budget it is only looked at.
    """
    with _cgroup(budget_bytes) as cgroup, _Signals() as signals:
        enforced = WATCHDOG if cgroup is None else f"memory cgroup {cgroup.version} and {WATCHDOG}"
        marked = {} if budget_bytes is None else {SUPERVISED: f"{os.getpid()}:{budget_bytes}:{enforced}"}
        outcome = Outcome(0, False, enforced)
        # From its first page on: what a process takes before it joins a cgroup is not counted there.
        entering = () if cgroup is None else ("sh", "-c", 'echo 0 > "$0" && exec "$@"', f"{cgroup.path}/cgroup.procs")
        child = subprocess.Popen([*entering, *command], env={**os.environ, **marked})
        try:
            signals.pass_on_to(child)
            _watch(child, budget_bytes, outcome)
        finally:
            if child.poll() is None:
                _end(child.pid)
            status = child.wait()
        outcome.exit_status = 128 - status if status < 0 else status
        outcome.interrupted = bool(signals.passed_on)
        # It may be a process that the command started that was ended, and the command went on.
        outcome.exceeded |= cgroup is not None and cgroup.has_killed()
    return outcome


def _watch(child: subprocess.Popen[bytes], budget_bytes: int | None, outcome: Outcome) -> None:
    """Until the child has ended; ends it, and what it started, where they take more than the budget."""
    began, interval = time.monotonic(), SAMPLE_SECONDS
    while child.poll() is None:
        resident = _resident_bytes(child.pid)
        outcome.peak_rss_bytes = max(outcome.peak_rss_bytes, resident)
        seconds = time.monotonic() - began
        if not outcome.rss_bytes or seconds - outcome.rss_bytes[-1][0] >= interval:
            outcome.rss_bytes.append((round(seconds, 3), resident))
        if len(outcome.rss_bytes) > MOST_SAMPLES:
            del outcome.rss_bytes[::2]
            interval *= 2
        if budget_bytes is not None and resident > budget_bytes:
            outcome.exceeded = True
            _end(child.pid)
            return
        with suppress(subprocess.TimeoutExpired):
            child.wait(SAMPLE_SECONDS if budget_bytes is None else LOOK_SECONDS)


def _end(pid: int) -> None:
    for each in (pid, *_started_by(pid)):
        with suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)


def _resident_bytes(pid: int) -> int:
    """Of a process and what it started: all of the largest, and of the others what is neither of a file nor shared.

    Files are libraries and mapped weights, nearly all of which the largest has as well. Of processes that run the same
    command the larger counts: one that has not begun its own yet, or never will, has its parent's pages.
    """
    found: dict[bytes, tuple[int, int]] = {}  # by command: resident, and how much of it is the process' own
    started = list(_started_by(pid))
    for each in (pid, *started):
        with suppress(OSError, IndexError, ValueError):
            command = Path(f"/proc/{each}/cmdline").read_bytes() if started else b""
            resident, of_files = map(int, Path(f"/proc/{each}/statm").read_text().split()[1:3])
            found[command] = max(found.get(command, (0, 0)), (resident * PAGE, (resident - of_files) * PAGE))
    largest, own = max(found.values(), default=(0, 0))
    return largest + sum(each for _, each in found.values()) - own


def _started_by(pid: int) -> Iterator[int]:
    """Its children, from whichever of its threads, theirs, and so on."""
    children: list[str] = []
    with suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            children += Path(f"/proc/{pid}/task/{thread}/children").read_text().split()
    for child in map(int, children):
        yield child
        yield from _started_by(child)


class _Signals:
    """While this is entered, signals for this process go to a child, which knows how to end well."""

    def __init__(self) -> None:
        self.passed_on: list[int] = []
        self._child: subprocess.Popen[bytes] | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
            self._before = {number: signal.signal(number, self._take) for number in FORWARDED}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal itself gave

    def pass_on_to(self, child: subprocess.Popen[bytes]) -> None:
        """From now on, and what came before there was a child."""
        self._child = child
        for number in self.passed_on:
            self._send(number)

    def _take(self, number: int, _frame: FrameType | None) -> None:
        self.passed_on.append(number)
        if self._child is not None:
            self._send(number)

    def _send(self, number: int) -> None:
        # The terminal sends Ctrl-C to both.
        if self._child is not None and (number != signal.SIGINT or not os.isatty(0)):
            with suppress(ProcessLookupError):
                self._child.send_signal(number)


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
