"""A bundle's ExecuTorch program: its weights lie outside, so a task on a phone is one data file beside it.

    backbone.pte       image (1, 3, S, S) -> features (1, F), logits (1, ROWS); written where torch is
    backbone.ptd       the plain backbone's weights and an empty head, as ExecuTorch's data files are
    executorch.json    where in such a file each tensor lies, and the digests of both

What a task changes are values, never their places. So a task's data file is that of the backbone with its values
written over, which takes numpy alone. A task has fewer classes than the program has rows: the logits of the others are
UNUSED, which no softmax sees.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ksm_edge.bundle.digest import file_sha256
from ksm_edge.bundle.layers import Bundle
from ksm_edge.errors import DamagedFileError, UnsupportedError, UsageError

PROGRAM, DATA, TABLE = "backbone.pte", "backbone.ptd", "executorch.json"
HEAD_WEIGHT, HEAD_BIAS = "head.weight", "head.bias"
ROWS = 64
UNUSED = -1e4  # a logit; half precision holds it


@dataclass(frozen=True)
class Placed:
    """A tensor in a data file: float32 from byte `offset` on, with its axes in that order."""

    offset: int
    axes: tuple[int, ...]


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
        features = np.zeros((0, 0)) if head_weight is None else head_weight
        if len(features) > self.rows:
            raise UsageError(
                f"the task has {len(features)} classes, the program {self.rows} rows: "
                f"export the bundle again with --executorch {len(features)} or more"
            )
        if strange := sorted((weights.keys() | {HEAD_WEIGHT, HEAD_BIAS}) ^ self.tensors.keys()):
            raise UnsupportedError(f"the weights are not those of {self.program}: {', '.join(strange[:3])}")
        data = bytearray(self.data.read_bytes())
        bias = np.full(self.rows, UNUSED, np.float32)
        if head_weight is not None and head_bias is not None:
            bias[: len(head_bias)] = head_bias
            self._put(data, HEAD_WEIGHT, np.pad(head_weight, ((0, self.rows - len(head_weight)), (0, 0))))
        self._put(data, HEAD_BIAS, bias)
        for name, weight in weights.items():
            self._put(data, name, weight)
        return bytes(data)

    def _put(self, data: bytearray, name: str, array: np.ndarray) -> None:
        placed = self.tensors[name]
        if array.ndim != len(placed.axes):
            raise UnsupportedError(f"{name}: an array of {array.ndim} dimensions, the program's has {len(placed.axes)}")
        values = np.ascontiguousarray(array.transpose(placed.axes), "<f4").tobytes()
        data[placed.offset : placed.offset + len(values)] = values


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
    try:
        for name in (PROGRAM, DATA):
            if file_sha256(folder / name) != table["sha256"][name]:
                raise DamagedFileError(f"{folder / name} is not what was written; export the bundle again")
        tensors = {name: Placed(int(offset), tuple(axes)) for name, (offset, *axes) in table["tensors"].items()}
        return MobileProgram(folder / PROGRAM, folder / DATA, int(table["rows"]), tensors)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise DamagedFileError(f"{folder}: its ExecuTorch program cannot be read: {error!r}") from error


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
