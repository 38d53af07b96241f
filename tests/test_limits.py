"""The enforcer of a memory budget: what is over it is stopped, what is not is left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ksm_edge import limits
from ksm_edge.limits import WATCHDOG, enforced_by, room_bytes, run_limited

MIB = 1 << 20
HALF = 60 * MIB  # fits a budget once
# Too much is kept for long enough that any watchdog looks.
TAKE = (
    "import sys, time; taken = bytearray(int(sys.argv[1])); "
    f"time.sleep(60 if len(taken) > {100 * MIB} else 0.2); sys.exit(3)"
)


@pytest.fixture(params=["cgroup", "watchdog alone"])
def held(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to hold a limit; the first may be out of reach, where it comes down to the second."""
    if request.param == "watchdog alone":
        monkeypatch.setattr(limits, "_own_cgroups", lambda: iter(()))
    return str(request.param)


def wait_for(path: Path) -> str:
    """The content of a file that a child is to write, once it has."""
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return path.read_text()


def take(number: int, budget: int) -> limits.Outcome:
    return run_limited([sys.executable, "-c", TAKE, str(number)], budget)


def test_a_command_within_its_budget_ends_as_it_would(held: str) -> None:
    outcome = take(40 * MIB, 200 * MIB)
    assert (outcome.exit_status, outcome.exceeded) == (3, False)
    assert 40 * MIB < outcome.peak_rss_bytes < 100 * MIB
    times, sizes = zip(*outcome.rss_bytes, strict=True)
    assert list(times) == sorted(times)
    assert max(sizes) <= outcome.peak_rss_bytes


def test_a_command_over_its_budget_is_stopped(held: str) -> None:
    outcome = take(400 * MIB, 100 * MIB)
    assert (outcome.exit_status, outcome.exceeded) == (128 + signal.SIGKILL, True)


def test_a_command_knows_how_much_it_may_take(held: str, tmp_path: Path) -> None:
    code = "import pathlib, sys; from ksm_edge.limits import room_bytes; "
    code += "pathlib.Path(sys.argv[1]).write_text(str(room_bytes()))"
    assert run_limited([sys.executable, "-c", code, str(tmp_path / "room")], 100 * MIB).exit_status == 0
    assert int((tmp_path / "room").read_text()) == 100 * MIB
    assert room_bytes() > 100 * MIB  # this process is under no limit


def test_what_a_child_of_it_takes_counts_as_well(held: str) -> None:
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {TAKE!r}, sys.argv[1]], check=False)"
    assert run_limited([sys.executable, "-c", code, str(400 * MIB)], 100 * MIB).exceeded


@pytest.mark.parametrize(("budget", "seconds"), [(100 * MIB, 60), (200 * MIB, 2)])
def test_what_it_and_its_child_take_counts_together(held: str, budget: int, seconds: int) -> None:
    inner = f"import time; taken = bytearray({HALF}); time.sleep({seconds})"
    code = f"import subprocess, sys; taken = bytearray({HALF}); "
    code += f"subprocess.run([sys.executable, '-c', {inner!r}], check=False)"
    outcome = run_limited([sys.executable, "-c", code], budget)
    assert outcome.exceeded == (budget < 2 * HALF)
    assert outcome.exceeded or 2 * HALF < outcome.peak_rss_bytes < 160 * MIB


def test_a_child_that_has_the_pages_of_its_parent_adds_nothing(held: str) -> None:
    code = f"import os, time; taken = bytearray({HALF}); os.fork() and os.wait(); time.sleep(2)"
    outcome = run_limited([sys.executable, "-c", code], 100 * MIB)
    assert (outcome.exit_status, outcome.exceeded) == (0, False)


def test_what_a_child_of_its_child_takes_counts_as_well(held: str) -> None:
    inner = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {TAKE!r}, sys.argv[1]], check=False)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}, sys.argv[1]], check=False)"
    assert run_limited([sys.executable, "-c", code, str(400 * MIB)], 100 * MIB).exceeded


def test_what_a_thread_of_it_starts_counts_as_well(held: str) -> None:
    code = (
        "import subprocess, sys, threading; "
        f"run = lambda: subprocess.run([sys.executable, '-c', {TAKE!r}, sys.argv[1]], check=False); "
        "thread = threading.Thread(target=run); thread.start(); thread.join()"
    )
    assert run_limited([sys.executable, "-c", code, str(400 * MIB)], 100 * MIB).exceeded


def test_it_may_be_called_from_any_thread(held: str) -> None:
    found: list[limits.Outcome] = []
    thread = threading.Thread(target=lambda: found.append(take(10 * MIB, 200 * MIB)))
    thread.start()
    thread.join()
    assert found[0].exit_status == 3


def test_a_marker_that_somebody_else_left_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(limits.SUPERVISED, "anything")
    assert enforced_by() is None
    monkeypatch.setenv(limits.SUPERVISED, f"{os.getpid()}:it would be its own parent")
    assert enforced_by() is None


def test_long_runs_keep_few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MOST_SAMPLES", 8)
    monkeypatch.setattr(limits, "SAMPLE_SECONDS", 0.01)
    outcome = run_limited([sys.executable, "-c", "import time; time.sleep(1)"], None)
    assert 4 <= len(outcome.rss_bytes) <= 8
    assert outcome.rss_bytes[-1][0] > 0.5


def test_a_command_ends_with_the_one_that_holds_its_limit(tmp_path: Path) -> None:
    inner = (
        "import os, sys, time; from ksm_edge.limits import end_with_supervisor; end_with_supervisor(); "
        "open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"
    )
    code = (
        "from ksm_edge.limits import run_limited; import sys; "
        f"run_limited([sys.executable, '-c', {inner!r}, sys.argv[1]], {200 * MIB})"
    )
    supervisor = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "pid")])
    pid = int(wait_for(tmp_path / "pid"))
    supervisor.kill()
    supervisor.wait()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1][:3]:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_command_without_a_budget_is_only_looked_at() -> None:
    code = "import sys, time; time.sleep(0.5); import ksm_edge.limits as x; sys.exit(x.enforced_by() is not None)"
    outcome = run_limited([sys.executable, "-c", code], None)
    assert (outcome.exit_status, outcome.exceeded) == (0, False)
    assert outcome.peak_rss_bytes > 5 * MIB


def test_a_command_that_is_killed_by_others_did_not_exceed_anything(held: str) -> None:
    outcome = run_limited([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], 200 * MIB)
    assert (outcome.exit_status, outcome.exceeded) == (137, False)


def test_the_command_knows_what_holds_it(held: str, tmp_path: Path) -> None:
    code = "from ksm_edge.limits import enforced_by; import sys; open(sys.argv[1], 'w').write(enforced_by())"
    outcome = run_limited([sys.executable, "-c", code, str(tmp_path / "how")], 200 * MIB)
    assert (tmp_path / "how").read_text() == outcome.enforced
    assert outcome.enforced.endswith(WATCHDOG)
    assert (outcome.enforced == WATCHDOG) or held == "cgroup"
    assert enforced_by() is None


def test_signals_reach_the_command(held: str, tmp_path: Path) -> None:
    inner = (
        "import pathlib, signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); "
        # Closed by itself: where a file is closed by being forgotten, what the handler raises is lost.
        "pathlib.Path(sys.argv[1]).write_text('ready'); time.sleep(60)"
    )
    code = (
        "from ksm_edge.limits import run_limited; import sys; "
        f"sys.exit(run_limited([sys.executable, '-c', {inner!r}, sys.argv[1]], {200 * MIB}).exit_status)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "ready")])
    wait_for(tmp_path / "ready")
    child.send_signal(signal.SIGTERM)
    assert child.wait(60) == 7


@pytest.mark.parametrize(
    ("version", "limit", "swap", "content"),
    [
        ("v2", "memory.max", "memory.swap.max", "0"),
        ("v1", "memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "1000"),
    ],
)
def test_a_cgroup_gets_its_limit_and_no_swap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, limit: str, swap: str, content: str
) -> None:
    def mkdir(path: Path) -> None:  # as the kernel fills the folder of a new cgroup
        os.mkdir(path)
        for name in (limit, swap):
            (path / name).touch()

    monkeypatch.setattr(Path, "mkdir", mkdir)
    made = limits._made(version, tmp_path, 1000)
    assert made is not None
    assert made.path.parent == tmp_path
    assert ((made.path / limit).read_text(), (made.path / swap).read_text()) == ("1000", content)


def test_a_level_without_the_memory_controller_is_passed_over(tmp_path: Path) -> None:
    assert limits._made("v2", tmp_path, 1000) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("version", "name", "text", "killed"),
    [("v2", "memory.events", "low 0\noom 1\noom_kill 1\n", True), ("v2", "memory.events", "oom_kill 0\n", False),
     ("v1", "memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n", True), ("v1", "absent", "", False)],
)  # fmt: skip
def test_the_kernel_tells_whether_it_ended_the_command(
    tmp_path: Path, version: str, name: str, text: str, killed: bool
) -> None:
    (tmp_path / name).write_text(text)
    assert limits._Cgroup(version, tmp_path).has_killed() == killed
