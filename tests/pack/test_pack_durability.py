"""Whatever stops `save_pack`, wherever: the old pack is there, or the new one, whole."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import tiny_pack

from ksm_edge.pack.files import save_pack
from ksm_edge.pack.format import encode


def full(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


class FullDisk(io.FileIO):
    """A file on a disk that fills up at one step; before it complains of a write it has written half."""

    def __init__(self, descriptor: int, step: str) -> None:
        super().__init__(descriptor, "wb")
        self.step = step

    def write(self, data: bytes) -> int:  # type: ignore[override]
        if self.step == "write":
            super().write(data[: len(data) // 2])
            full()
        return super().write(data)

    def flush(self) -> None:
        super().flush()
        if self.step == "flush":
            full()

    def close(self) -> None:
        first = not self.closed
        super().close()
        if self.step == "close" and first:
            full()


def fill_the_disk(monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """Let everything go well up to `step`."""
    monkeypatch.setattr(os, "fdopen", lambda descriptor, mode: FullDisk(descriptor, step))
    if step in ("fsync", "chmod", "replace"):
        monkeypatch.setattr(os, step, full)
    if step == "mkstemp":
        monkeypatch.setattr(tempfile, step, full)


def test_what_is_no_file_is_not_replaced_by_one(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="no regular file"):
        save_pack(tiny_pack(), tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_who_may_read_a_file_stays_when_it_is_replaced(saved: tuple[Path, bytes]) -> None:
    path, before = saved
    for mode in (0o600, 0o664):
        path.chmod(mode)
        save_pack(tiny_pack(seed=2), path)
        assert path.read_bytes() != before
        assert path.stat().st_mode & 0o777 == mode


def test_a_link_stays_and_the_file_it_leads_to_is_written(tmp_path: Path) -> None:
    (tmp_path / "packs").mkdir()
    (tmp_path / "a.ksm").symlink_to(tmp_path / "packs/a.ksm")
    for seed in (1, 2):
        save_pack(tiny_pack(seed=seed), tmp_path / "a.ksm")
        assert (tmp_path / "a.ksm").is_symlink()
        assert (tmp_path / "packs/a.ksm").read_bytes() == (tmp_path / "a.ksm").read_bytes()
    assert not list(tmp_path.glob(".*"))


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, bytes]:
    """A pack's path and what it holds."""
    path = tmp_path / "a.ksm"
    save_pack(tiny_pack(seed=1), path)
    return path, path.read_bytes()


@pytest.mark.parametrize("step", ["mkstemp", "write", "flush", "fsync", "close", "chmod", "replace"])
def test_a_disk_that_is_full_leaves_the_old_pack_and_nothing_else(
    saved: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path, before = saved
    fill_the_disk(monkeypatch, step)
    with pytest.raises(OSError, match="No space left"):
        save_pack(tiny_pack(seed=2), path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("step", ["mkstemp", "write", "flush", "fsync", "close", "chmod", "replace"])
def test_where_there_was_no_pack_there_is_none_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    fill_the_disk(monkeypatch, step)
    with pytest.raises(OSError, match="No space left"):
        save_pack(tiny_pack(), tmp_path / "a.ksm")
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_synced_holds_the_new_pack_whole_and_the_caller_is_told(
    saved: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = saved
    sync, replaced = os.fsync, os.replace

    def replace(*names: object) -> None:
        replaced(*names)  # type: ignore[arg-type]
        monkeypatch.setattr(os, "fsync", full)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="No space left"):
        save_pack(tiny_pack(seed=2), path)
    assert os.fsync is not sync
    monkeypatch.undo()
    assert path.read_bytes() == encode(tiny_pack(seed=2))
    assert list(path.parent.iterdir()) == [path]


def test_the_file_is_synced_before_it_gets_its_name_and_the_folder_after(
    saved: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = saved
    calls: list[str] = []

    def noted(name: str, call: Callable[..., object]) -> Callable[..., object]:
        return lambda *args: (calls.append(name), call(*args))[1]

    monkeypatch.setattr(os, "fsync", noted("fsync", os.fsync))
    monkeypatch.setattr(os, "replace", noted("replace", os.replace))
    save_pack(tiny_pack(seed=2), path)
    assert calls == ["fsync", "replace", "fsync"]


# Saves one pack over another, again and again, each time in a child (forked, since starting Python anew would take most
# of the time) that kills itself in front of one line more of the Python that writes, the standard library's among it.
# Prints what each left: the number of lines until the kill, the file's bytes in hexadecimal, and how many other files.
KILLED = """
import os, signal, sys
from pathlib import Path
from tiny import tiny_pack
from ksm_edge.pack import files

path = Path(sys.argv[1])
packs = [tiny_pack(seed=1), tiny_pack(seed=2)]
encoded = {id(pack): files.encode(pack) for pack in packs}
files.encode = lambda pack: encoded[id(pack)]  # hundreds of lines that write nothing

def kill_at(line):
    passed = 0
    def trace(frame, event, _):
        nonlocal passed
        if event == "line":
            if passed == line:
                os.kill(os.getpid(), signal.SIGKILL)
            passed += 1
        return trace
    sys.settrace(trace)

line, status = 0, -signal.SIGKILL
while status == -signal.SIGKILL:
    files.save_pack(packs[0], path)
    if (child := os.fork()) == 0:
        kill_at(line)
        files.save_pack(packs[1], path)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    others = [other for other in path.parent.iterdir() if other != path]
    print(line, path.read_bytes().hex(), len(others))
    for other in others:  # nobody can clean up behind a kill
        other.unlink()
    line += 1
sys.exit(status)
"""


def test_a_process_killed_at_any_line_leaves_the_old_pack_or_the_new_one(tmp_path: Path) -> None:
    folders = [str(Path(__file__).parents[1]), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, str(tmp_path / "a.ksm")]
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    whole = [encode(tiny_pack(seed=seed)).hex() for seed in (1, 2)]
    rows = [line.split() for line in output.splitlines()]
    found = [whole.index(data) for _, data, _ in rows]
    assert found == sorted(found)  # from one line on it is the new pack
    assert 5 < found.index(1) < len(found) - 1  # with lines in front of it and behind
    assert sum(others != "0" for _, _, others in rows) > 5  # half-written files, whose name nobody reads
