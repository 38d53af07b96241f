"""The data file of a task, byte for byte, from a table that a workstation has left; ExecuTorch itself is not needed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ksm_edge.bundle.mobile import (
    DATA,
    HEAD_BIAS,
    HEAD_WEIGHT,
    PROGRAM,
    ROWS,
    TABLE,
    UNUSED,
    MobileProgram,
    Placed,
    mobile_program,
)
from ksm_edge.cli import export
from ksm_edge.errors import DamagedFileError, UnsupportedError, UsageError

WEIGHT = np.arange(12, dtype=np.float32).reshape(2, 3, 1, 2)
HEAD = np.array([[1, 2], [3, 4]], np.float32), np.array([5, 6], np.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A conv (2, 3, 1, 2) in the order (O, kh, kw, I) behind four bytes not ours, then three rows of a head."""
    (tmp_path / PROGRAM).write_bytes(b"program")
    (tmp_path / DATA).write_bytes(b"\x07" * 96)
    tensors = {
        "a.weight": Placed(4, (0, 2, 3, 1), (2, 3, 1, 2)),
        HEAD_WEIGHT: Placed(52, (0, 1), (3, 2)),
        HEAD_BIAS: Placed(76, (0,), (3,)),
    }
    (tmp_path / TABLE).write_text(MobileProgram(tmp_path / PROGRAM, tmp_path / DATA, 3, tensors).table())
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
    for weights in ({}, {"a.weight": WEIGHT, "b.weight": WEIGHT}, {"a.weight": WEIGHT[0]}, {"a.weight": WEIGHT[:1]}):
        with pytest.raises(UnsupportedError, match=r"[ab]\.weight"):
            program.data_with(weights, *HEAD)
    with pytest.raises(UsageError, match="4 classes, the program 3 rows"):
        program.data_with({"a.weight": WEIGHT}, np.zeros((4, 2), np.float32), np.zeros(4, np.float32))


@pytest.mark.parametrize("name", [PROGRAM, DATA])
def test_a_file_that_changed_is_refused(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"something else")
    with pytest.raises(DamagedFileError, match=name.replace(".", r"\.")):
        mobile_program(folder)


@pytest.mark.parametrize("text", ["", "[]", '{"rows": 3}', '{"rows": "x", "sha256": {}, "tensors": {}}'])
def test_a_table_that_is_none_is_refused(folder: Path, text: str) -> None:
    (folder / TABLE).write_text(text)
    with pytest.raises(DamagedFileError, match=r"executorch\.json"):
        mobile_program(folder)


def test_any_digit_of_the_table_counts_and_no_space(folder: Path) -> None:
    text = (folder / TABLE).read_text()
    (folder / TABLE).write_text(json.dumps(json.loads(text)))
    assert mobile_program(folder).rows == 3
    for place in (i for i, letter in enumerate(text) if letter.isdigit()):
        (folder / TABLE).write_text(text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :])
        with pytest.raises(DamagedFileError):
            mobile_program(folder)


def test_the_command_line_says_the_rows_that_there_are() -> None:
    assert export.ROWS == ROWS


def test_a_bundle_without_a_program_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="--executorch, where torch is"):
        mobile_program(tmp_path)
