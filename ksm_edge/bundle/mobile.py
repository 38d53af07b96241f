"""A bundle's ExecuTorch program: its weights lie outside, so a task on a phone is one data file beside it.

    backbone.pte       image (1, 3, S, S) -> features (1, F), logits (1, ROWS); written where torch is
    backbone.ptd       the plain backbone's weights and an empty head, as ExecuTorch's data files are
    executorch.json    where in such a file each tensor lies, and the digests of both

What a task changes are values, never their places. So a task's data file is that of the backbone with its values
written over, which takes numpy alone. A task has fewer classes than the program has rows: the logits of the others are
UNUSED, which no softmax sees.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ksm_edge.bundle.digest import file_sha256
from ksm_edge.bundle.layers import Bundle
from ksm_edge.errors import DamagedFileError, UnsupportedError, UsageError

PROGRAM, DATA, TABLE = "backbone.pte", "backbone.ptd", "executorch.json"
HEAD_WEIGHT, HEAD_BIAS = "ksm_edge.head.weight", "ksm_edge.head.bias"  # no layer of a network has such a name
ROWS = 64
UNUSED = -1e4  # a logit; half precision holds it


@dataclass(frozen=True)
class Placed:
    """A tensor in a data file: float32 from byte `offset` on, with its axes in that order."""

    offset: int
    axes: tuple[int, ...]
    shape: tuple[int, ...]  # in the order that the bundle has it


@dataclass(frozen=True)
class MobileProgram:
    """The program, the plain backbone's data file, and how to write one for a task."""

    program: Path
    data: Path
    rows: int
    tensors: Mapping[str, Placed]  # by the bundle's names, and the head's two

    def data_with(
        self,
        weights: Mapping[str, np.ndarray],
        head_weight: np.ndarray | None = None,
        head_bias: np.ndarray | None = None,
    ) -> bytes:
        """A data file with these fused weights and the head (C, F), (C,); without one all logits are UNUSED.

        UsageError for more classes than the program has rows, UnsupportedError for weights that are not the program's.
        """
        classes = 0 if head_weight is None else len(head_weight)
        if classes > self.rows:
            raise UsageError(
                f"the task has {classes} classes, the program {self.rows} rows: "
                f"export the bundle again with --executorch {classes} or more"
            )
        if strange := sorted((weights.keys() | {HEAD_WEIGHT, HEAD_BIAS}) ^ self.tensors.keys()):
            raise UnsupportedError(f"the weights are not those of {self.program}: {', '.join(strange[:3])}")
        head = np.zeros(self.tensors[HEAD_WEIGHT].shape, np.float32)
        bias = np.full(self.rows, UNUSED, np.float32)
        if head_weight is not None and head_bias is not None:
            head[:classes], bias[:classes] = head_weight, head_bias
        data = bytearray(self.data.read_bytes())
        for name, array in {**weights, HEAD_WEIGHT: head, HEAD_BIAS: bias}.items():
            placed = self.tensors[name]
            if array.shape != placed.shape:
                raise UnsupportedError(f"{name}: an array {array.shape}, the program's is {placed.shape}")
            values = np.ascontiguousarray(array.transpose(placed.axes), "<f4").tobytes()
            data[placed.offset : placed.offset + len(values)] = values
        return bytes(data)

    def table(self) -> str:
        """The table as JSON, with the digests of both files, and of itself."""
        content = {
            "rows": self.rows,
            "sha256": {path.name: file_sha256(path) for path in (self.program, self.data)},
            "tensors": {name: [placed.offset, placed.axes, placed.shape] for name, placed in self.tensors.items()},
        }
        return json.dumps({"checksum": _checksum(content), **content}, indent=1) + "\n"


def mobile_program(folder: Path) -> MobileProgram:
    """The program of the bundle in that folder.

    Raises UnsupportedError where it was exported without one, DamagedFileError where a file is not what was written:
    ExecuTorch would end the process on data whose index is damaged.
    """
    try:
        table = json.loads((folder / TABLE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UnsupportedError(
            f"{folder} has no ExecuTorch program: make the bundle with ksm-edge export ... --executorch, where torch is"
        ) from None
    except (OSError, ValueError) as error:
        raise DamagedFileError(f"{folder / TABLE} cannot be read: {error}") from error
    if not isinstance(table, dict) or table.pop("checksum", None) != _checksum(table):
        raise DamagedFileError(f"{folder / TABLE} is not what was written; export the bundle again")
    for name in (PROGRAM, DATA):
        if not (folder / name).is_file() or file_sha256(folder / name) != table["sha256"][name]:
            raise DamagedFileError(f"{folder / name} is not what was written; export the bundle again")
    tensors = {
        name: Placed(offset, tuple(axes), tuple(shape)) for name, (offset, axes, shape) in table["tensors"].items()
    }
    return MobileProgram(folder / PROGRAM, folder / DATA, table["rows"], tensors)


def _checksum(content: Mapping[str, Any]) -> str:
    """Of a table, however it is spaced."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def task_labels(bundle: Bundle, program: MobileProgram, classes: tuple[str, ...]) -> str:
    """What an app needs to know beside the two files, as JSON: classes in the order of the logits, and the input."""
    contract = {name: getattr(bundle.input, name) for name in ("size", "resize", "mean", "std")}
    table = {
        "classes": classes,
        "rows": program.rows,
        "input": contract,
        "program_sha256": file_sha256(program.program),
    }
    return json.dumps(table, indent=1, ensure_ascii=False) + "\n"
