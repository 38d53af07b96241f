from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from ksm_edge.errors import DamagedFileError, FileError, UsageError
from ksm_edge.training.checkpoint import VERSION, Progress, load_checkpoint, read_identity, save_checkpoint

IDENTITY = {"backbone": "b" * 64, "settings": {"batch": 4, "granularity": "kernel"}, "threads": 1}
PROGRESS = Progress(3, 2, 17, 1.5, 7, 8, 0.75, 2, [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.25}])


@pytest.fixture
def state() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {
        "a:score": rng.standard_normal((3, 2)),
        "a:score:mean": rng.standard_normal((3, 2)),
        "head:bias": np.zeros(5),
    }
    return {name: array.astype(np.float32) for name, array in arrays.items()}


@pytest.fixture
def path(tmp_path: Path, state: dict[str, np.ndarray]) -> Path:
    save_checkpoint(tmp_path / "x.checkpoint", state, PROGRESS, b"a pack", IDENTITY)
    return tmp_path / "x.checkpoint"


def test_everything_comes_back(path: Path, state: dict[str, np.ndarray]) -> None:
    found, progress, best = load_checkpoint(path, IDENTITY)
    assert progress == PROGRESS
    assert best == b"a pack"
    assert found.keys() == state.keys()
    assert all(np.array_equal(found[name], state[name]) for name in state)


def test_before_the_first_epoch_there_is_no_best_pack(tmp_path: Path, state: dict[str, np.ndarray]) -> None:
    save_checkpoint(tmp_path / "x", state, Progress(), None, IDENTITY)
    assert load_checkpoint(tmp_path / "x", IDENTITY)[1:] == (Progress(), None)


def test_a_newer_one_takes_the_place_of_the_older_and_nothing_else_is_left(
    path: Path, state: dict[str, np.ndarray]
) -> None:
    save_checkpoint(path, state, Progress(9), None, IDENTITY)
    assert load_checkpoint(path, IDENTITY)[1].epoch == 9
    assert list(path.parent.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_one_that_was_there(
    path: Path, state: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", no_space)
        with pytest.raises(OSError, match="No space"):
            save_checkpoint(path, state, Progress(9), None, IDENTITY)
    assert load_checkpoint(path, IDENTITY)[1] == PROGRESS
    assert list(path.parent.iterdir()) == [path]


def test_none_at_all_is_said_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no checkpoint .*leave out --resume"):
        load_checkpoint(tmp_path / "absent", IDENTITY)


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_file_cut_short_is_damaged(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DamagedFileError, match=r"x\.checkpoint is no readable checkpoint .*start anew"):
        load_checkpoint(path, IDENTITY)


@pytest.mark.parametrize("metadata", [None, {"other": "x"}, {"ksm_edge_checkpoint": "no json"}])
def test_any_other_safetensors_file_is_no_checkpoint(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    path = tmp_path / "x.checkpoint"
    safetensors.numpy.save_file({"a": np.zeros(2, np.float32)}, path, metadata)
    with pytest.raises(DamagedFileError):
        load_checkpoint(path, IDENTITY)


@pytest.mark.parametrize(
    "record",
    ["{}", "[]", f'{{"version": {VERSION}, "progress": {{"odd": 1}}, "identity": {{}}}}', f'{{"version": {VERSION}}}'],
)
def test_a_record_that_lacks_something_is_damaged(tmp_path: Path, record: str) -> None:
    path = tmp_path / "x.checkpoint"
    safetensors.numpy.save_file({"a": np.zeros(2, np.float32)}, path, {"ksm_edge_checkpoint": record})
    with pytest.raises(DamagedFileError):
        load_checkpoint(path, {})


def test_another_version_is_refused_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "x.checkpoint"
    record = '{"version": 99, "progress": {}, "identity": {}}'
    safetensors.numpy.save_file({"a": np.zeros(2, np.float32)}, path, {"ksm_edge_checkpoint": record})
    with pytest.raises(FileError, match="version 99"):
        load_checkpoint(path, {})


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [("backbone", "c" * 64, f"its backbone is 'b+', now '{'c' * 64}'"), ("threads", 2, "its threads is 1, now 2"),
     ("settings", {"batch": 8, "granularity": "kernel"}, "its batch is 4, now 8"),
     ("settings", {"batch": 4, "granularity": "kernel", "flip": None}, "its flip is absent, now None")],
)  # fmt: skip
def test_another_training_is_refused_with_what_differs(path: Path, name: str, value: object, said: str) -> None:
    with pytest.raises(UsageError, match=rf"belongs to another training: {said}\. Resume with what"):
        load_checkpoint(path, {**IDENTITY, name: value})


def test_identities_are_compared_as_json_keeps_them(path: Path, state: dict[str, np.ndarray]) -> None:
    save_checkpoint(path, state, PROGRESS, None, {"sizes": (1, 2)})
    load_checkpoint(path, {"sizes": (1, 2)})


def test_a_flipped_bit_is_found(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedFileError, match="its checksum does not hold"):
        load_checkpoint(path, IDENTITY)


def test_what_a_training_was_started_with_can_be_asked(path: Path) -> None:
    assert read_identity(path) == IDENTITY
