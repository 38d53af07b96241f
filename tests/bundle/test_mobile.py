"""The data file of a task, byte for byte, from a table that a workstation has left; ExecuTorch itself is not needed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ksm_edge.bundle.digest import file_sha256
from ksm_edge.bundle.mobile import UNUSED, mobile_program
from ksm_edge.errors import DamagedFileError, UnsupportedError, UsageError

WEIGHT = np.arange(12, dtype=np.float32).reshape(2, 3, 1, 2)
HEAD = np.array([[1, 2], [3, 4]], np.float32), np.array([5, 6], np.float32)
# A conv (2, 3, 1, 2) in the order (O, kh, kw, I) behind four bytes that are not ours, then a head of three rows.
TABLE = {"a.weight": [4, 0, 2, 3, 1], "head.weight": [52, 0, 1], "head.bias": [76, 0]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "backbone.pte").write_bytes(b"program")
    (tmp_path / "backbone.ptd").write_bytes(b"\x07" * 96)
    sha256 = {name: file_sha256(tmp_path / name) for name in ("backbone.pte", "backbone.ptd")}
    (tmp_path / "executorch.json").write_text(json.dumps({"rows": 3, "sha256": sha256, "tensors": TABLE}))
    return tmp_path


def floats(data: bytes, first: int, count: int) -> list[float]:
    return np.frombuffer(data, "<f4", count, first).tolist()


def test_values_lie_where_the_table_says_and_all_else_is_the_backbones(folder: Path) -> None:
    data = mobile_program(folder).data_with({"a.weight": WEIGHT}, *HEAD)
    assert len(data) == 96
    assert data[:4] == b"\x07" * 4
    assert floats(data, 4, 12) == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    assert floats(data, 52, 6) == [1, 2, 3, 4, 0, 0]
    assert floats(data, 76, 3) == [5, 6, UNUSED]
    assert data[88:] == b"\x07" * 8


def test_without_a_head_no_logit_is_used(folder: Path) -> None:
    data = mobile_program(folder).data_with({"a.weight": WEIGHT})
    assert floats(data, 76, 3) == [UNUSED] * 3


def test_what_does_not_fit_the_program_is_refused(folder: Path) -> None:
    program = mobile_program(folder)
    for weights in ({}, {"a.weight": WEIGHT, "b.weight": WEIGHT}, {"a.weight": WEIGHT[0]}):
        with pytest.raises(UnsupportedError, match=r"[ab]\.weight"):
            program.data_with(weights, *HEAD)
    with pytest.raises(UsageError, match="4 classes, the program 3 rows"):
        program.data_with({"a.weight": WEIGHT}, np.zeros((4, 2), np.float32), np.zeros(4, np.float32))


@pytest.mark.parametrize("name", ["backbone.pte", "backbone.ptd"])
def test_a_file_that_changed_is_refused(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"something else")
    with pytest.raises(DamagedFileError, match=name.replace(".", r"\.")):
        mobile_program(folder)


@pytest.mark.parametrize("text", ["", "[]", '{"rows": 3}', '{"rows": "x", "sha256": {}, "tensors": {}}'])
def test_a_table_that_is_none_is_refused(folder: Path, text: str) -> None:
    (folder / "executorch.json").write_text(text)
    with pytest.raises(DamagedFileError):
        mobile_program(folder)


def test_a_bundle_without_a_program_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="--executorch, where torch is"):
        mobile_program(tmp_path)
