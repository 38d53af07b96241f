"""torch's own files: state dicts are read, pickled code is not run."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from ksm_edge.cli.main import main  # noqa: E402 - torch first, or skip
from ksm_edge.errors import DamagedFileError, UsageError  # noqa: E402
from ksm_edge.exporter.pth import read_pth  # noqa: E402

STATE = {"a": torch.arange(3.0), "b": torch.ones(2, dtype=torch.bfloat16), "n": torch.tensor(7)}


@pytest.mark.parametrize("nested", [False, True])
def test_a_state_dict_is_read_alone_or_out_of_a_checkpoint(tmp_path: Path, nested: bool) -> None:
    torch.save({"state_dict": STATE, "epoch": 3} if nested else STATE, tmp_path / "w.pth")
    tensors = read_pth(tmp_path / "w.pth")
    assert {name: (tensor.dtype, tensor.tolist()) for name, tensor in tensors.items()} == {
        "a": (np.float32, [0, 1, 2]), "b": (np.float32, [1, 1]), "n": (np.int64, 7),
    }  # fmt: skip


class Harmful:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("harm_was_done"),))


def test_pickled_code_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.zeros(1), "x": Harmful()}, "w.pth")
    with pytest.raises(UsageError, match=r"more than tensors, so it is not loaded; save its state_dict\(\) alone"):
        read_pth(Path("w.pth"))
    Path("w.pt").write_bytes(pickle.dumps(Harmful(), protocol=2))
    with pytest.raises((UsageError, DamagedFileError)):
        read_pth(Path("w.pt"))
    assert not Path("harm_was_done").exists()


def test_a_whole_module_is_refused(tmp_path: Path) -> None:
    torch.save(torch.nn.Conv2d(1, 1, 1), tmp_path / "w.pth")
    with pytest.raises(UsageError, match="export_module"):
        read_pth(tmp_path / "w.pth")


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 half a zip"])
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises((DamagedFileError, UsageError)):
        read_pth(tmp_path / "w.pth")


def test_no_state_dict_is_refused(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "w.pth")
    with pytest.raises(UsageError, match="holds no state dict but a list"):
        read_pth(tmp_path / "w.pth")


def test_export_takes_a_pth_file(tmp_path: Path, shared_data: Path) -> None:
    from safetensors.torch import load_file

    state = load_file(shared_data / "resnet20_cifar10.safetensors")
    torch.save(state, tmp_path / "w.pth")
    assert main(["export", "resnet20_cifar10", "--weights", str(tmp_path / "w.pth"), "--out", str(tmp_path / "b")]) == 0
