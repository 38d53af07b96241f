"""Whatever stops `save_pack`, wherever: the old pack is there, or the new one, whole."""

from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import numpy as np
import pytest
from tiny import tiny_pack

from ksm_edge.pack.files import load_pack, save_pack
from ksm_edge.pack.format import encode
from ksm_edge.pack.record import Pack

KILLS = 200
LONGEST = 0.05  # seconds until a kill, if as much is needed


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


def one_of_two(number: int) -> Pack:
    """Packs of 240 kB, most of it plain floats: much to write and little to code."""
    golden = np.full((20_000, 3), number, np.float32)
    return tiny_pack(seed=number, changes={"golden_logits": golden})


# On its input's every line, lets a new child save one pack after the other, whose number it prints; on the next line
# it waits for that child to have died. Forked, since starting Python anew would take most of the time.
SAVER = """
import os, sys
from test_pack_durability import one_of_two
from ksm_edge.pack.files import save_pack
packs = [one_of_two(2), one_of_two(1)]
while sys.stdin.readline():
    if (child := os.fork()) == 0:
        for pack in packs * 100:  # and no more, should nobody be left to kill it
            save_pack(pack, sys.argv[1])
        os._exit(0)
    packs.reverse()
    print(child, flush=True)
    sys.stdin.readline()
    os.waitpid(child, 0)
    print("died", flush=True)
"""


@pytest.fixture
def saver(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Saves to a.ksm in `tmp_path`."""
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SAVER, str(tmp_path / "a.ksm")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield process
        process.communicate()


def test_a_process_killed_at_any_instant_leaves_the_old_pack_or_the_new_one(
    tmp_path: Path, saver: subprocess.Popen[str]
) -> None:
    assert saver.stdin is not None
    assert saver.stdout is not None
    path, random = tmp_path / "a.ksm", Random(0)
    pack = one_of_two(1)
    start = time.monotonic()
    save_pack(pack, path)
    longest = min(2 * (time.monotonic() - start), LONGEST)
    whole = [encode(one_of_two(number)) for number in (1, 2)]
    found, interrupted = [], 0
    for _ in range(KILLS):
        saver.stdin.write("save\n")
        saver.stdin.flush()
        child = int(saver.stdout.readline())
        time.sleep(random.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        saver.stdin.write("wait\n")
        saver.stdin.flush()
        assert saver.stdout.readline() == "died\n"
        found.append(whole.index(path.read_bytes()))
        for left in tmp_path.glob(".a.ksm.*"):  # nobody can clean up behind a kill
            interrupted += 1
            left.unlink()
    assert load_pack(path).task == "tiny kernel"
    assert set(found) == {0, 1}
    assert interrupted > 5  # or no kill came where it matters
