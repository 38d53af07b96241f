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
    if step in ("fsync", "link", "chmod", "replace"):
        monkeypatch.setattr(os, step, full)
    if step == "open":
        monkeypatch.setattr(os, step, full)
        monkeypatch.setattr(tempfile, "mkstemp", full)


NAMELESS, NAMED = "without a name", "with one"
KINDS = pytest.mark.parametrize("kind_of_file", [NAMELESS, NAMED], indirect=True)
STEPS = pytest.mark.parametrize(
    ("step", "kind_of_file"),
    [
        (step, kind)
        for step in ("open", "write", "flush", "fsync", "close", "chmod", "replace")
        for kind in (NAMELESS, NAMED)
    ]
    + [("link", NAMELESS)],
    indirect=["kind_of_file"],
)


@pytest.fixture
def kind_of_file(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """What is written to before it is renamed: a file without a name, or one with, where a file system has no other."""
    if request.param == NAMED:
        monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY)  # refused, as by a file system that has no other
    else:
        _require_nameless_files(tmp_path)
    kind: str = request.param
    return kind


def _require_nameless_files(folder: Path) -> None:
    try:
        os.close(os.open(folder, os.O_TMPFILE | os.O_WRONLY))
    except OSError:
        pytest.skip("this file system has no files without a name")


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


@STEPS
def test_a_disk_that_is_full_leaves_the_old_pack_and_nothing_else(
    saved: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch, kind_of_file: str, step: str
) -> None:
    path, before = saved
    _save_to_a_full_disk(path, monkeypatch, step)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@STEPS
def test_where_there_was_no_pack_there_is_none_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind_of_file: str, step: str
) -> None:
    _save_to_a_full_disk(tmp_path / "a.ksm", monkeypatch, step)
    assert not list(tmp_path.iterdir())


def _save_to_a_full_disk(path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    fill_the_disk(monkeypatch, step)
    with pytest.raises(OSError, match="No space left"):
        save_pack(tiny_pack(seed=2), path)
    monkeypatch.undo()


def test_where_open_files_cannot_be_named_a_pack_is_saved_all_the_same(
    saved: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container without /proc."""
    path, _ = saved
    monkeypatch.setattr("ksm_edge.atomic._opened", lambda descriptor: f"/nowhere/{descriptor}")
    before = len(os.listdir("/proc/self/fd"))
    save_pack(tiny_pack(seed=2), path)
    assert path.read_bytes() == encode(tiny_pack(seed=2))
    assert list(path.parent.iterdir()) == [path]
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_stops_the_naming_is_told_of_the_pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _require_nameless_files(tmp_path)

    def refuse(source: str, name: str, **_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted", source, None, name)

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(OSError, match="not permitted") as refused:
        save_pack(tiny_pack(), tmp_path / "a.ksm")
    assert str(refused.value) == f"[Errno {errno.EPERM}] Operation not permitted: '{tmp_path / 'a.ksm'}'"
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


@KINDS
def test_the_file_is_synced_before_it_gets_its_name_and_the_folder_after(
    saved: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch, kind_of_file: str
) -> None:
    path, _ = saved
    calls: list[str] = []

    def noted(name: str, call: Callable[..., object]) -> Callable[..., object]:
        return lambda *args, **given: (calls.append(name), call(*args, **given))[1]

    for name in ("fsync", "link", "replace"):
        monkeypatch.setattr(os, name, noted(name, getattr(os, name)))
    save_pack(tiny_pack(seed=2), path)
    if kind_of_file == NAMED:
        assert calls == ["fsync", "replace", "fsync"]
    else:
        assert calls == ["fsync", "link", "replace", "fsync", "fsync"]  # of the file again, which had no name before


# Saves one pack over another, again and again, each time in a child (forked, since starting Python anew would take most
# of the time) that kills itself in front of one line more of the Python that writes, the standard library's among it.
# Prints what each left: the number of lines until the kill, the file's bytes in hexadecimal, how many other files, and
# how many of these are not the whole new pack.
KILLED = """
import os, signal, sys
if sys.argv[2] == "with one":
    os.O_TMPFILE = os.O_DIRECTORY
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
    in_part = [other for other in others if other.read_bytes() != encoded[id(packs[1])]]
    print(line, path.read_bytes().hex(), len(others), len(in_part))
    for other in others:  # nobody can clean up behind a kill
        other.unlink()
    line += 1
sys.exit(status)
"""


@KINDS
def test_a_process_killed_at_any_line_leaves_the_old_pack_or_the_new_one(tmp_path: Path, kind_of_file: str) -> None:
    folders = [str(Path(__file__).parents[1]), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, str(tmp_path / "a.ksm"), kind_of_file]
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    whole = [encode(tiny_pack(seed=seed)).hex() for seed in (1, 2)]
    rows = [line.split() for line in output.splitlines()]
    found = [whole.index(data) for _, data, _, _ in rows]
    assert found == sorted(found)  # from one line on it is the new pack
    assert 5 < found.index(1) < len(found) - 1  # with lines in front of it and behind
    left, in_part = (sum(row[place] != "0" for row in rows) for place in (2, 3))
    if kind_of_file == NAMED:
        assert in_part > 5  # files that were being written, whose name nobody reads
    else:
        assert in_part == 0
        assert 0 < left < 20  # lines between naming and renaming
