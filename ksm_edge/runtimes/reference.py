"""The oracle: ONNX's own reference evaluator in numpy, for tests and for explaining a runtime's numbers.

It knows the operators of ONNX itself and, for training graphs, the few that those use and it lacks. Weights
given as float64 make it a float64 oracle.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from ksm_edge.errors import UnsupportedError


def available() -> str | None:
    return None  # onnx and numpy come with every install


class FusedMatMul(OpRun):
    """com.microsoft FusedMatMul: alpha * A B, each transposed in its last two dimensions if asked."""

    op_domain = "com.microsoft"

    def _run(
        self, A: np.ndarray, B: np.ndarray, alpha: float = 1.0, transA: int = 0, transB: int = 0, **unused: Any
    ) -> tuple[np.ndarray]:
        for name, value in unused.items():  # transBatchA and transBatchB change the meaning: never guess
            if value:
                raise UnsupportedError(f"FusedMatMul with {name}={value} is not known to the reference runtime")
        left = np.swapaxes(A, -1, -2) if transA else A
        right = np.swapaxes(B, -1, -2) if transB else B
        return (left @ right * A.dtype.type(alpha),)


class DequantizeLinear(OpRun):
    """x * scale without a zero point, the scale a scalar or along `axis`; ONNX's own knows only opset 19 and later."""

    op_domain = ""

    def _run(self, x: np.ndarray, scale: np.ndarray, axis: int = 1) -> tuple[np.ndarray]:
        column = scale.reshape(-1, *[1] * (x.ndim - 1 - axis)) if scale.ndim else scale
        return (x.astype(scale.dtype) * column,)


class Pad(OpRun):
    """Constant padding; a negative pad crops, which ONNX's own does not do."""

    op_domain = ""

    def _run(
        self, x: np.ndarray, pads: np.ndarray, value: np.ndarray | None = None, mode: str = "constant"
    ) -> tuple[np.ndarray]:
        if mode != "constant":
            raise UnsupportedError(f"Pad with mode {mode!r} is not known to the reference runtime, only 'constant'")
        before, behind = np.split(pads, 2)
        grown = np.pad(x, np.maximum([before, behind], 0).T, constant_values=0 if value is None else value)
        kept = [slice(max(0, -b), n - max(0, -e)) for b, e, n in zip(before, behind, grown.shape, strict=True)]
        return (grown[tuple(kept)],)


NEW_OPS = [FusedMatMul, DequantizeLinear, Pad]


def evaluate(
    model: onnx.ModelProto, feeds: Mapping[str, np.ndarray], weights: Mapping[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """All outputs of `model` by name, for inputs by name and, if it declares any, external initializers by name."""
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    _fill(whole.graph, weights or {})
    evaluator = _evaluator(whole)
    outputs = [output.name for output in whole.graph.output]
    return dict(zip(outputs, evaluator.run(outputs, dict(feeds)), strict=True))


class Session:
    """A backbone graph in numpy with one task's weights: slow, and right by construction."""

    def __init__(self, graph: Path | bytes, weights: Mapping[str, np.ndarray], threads: int = 1) -> None:
        """`graph`: an ONNX file or its bytes; `weights`: every external initializer by name; threads are ignored."""
        model = onnx.load_from_string(graph) if isinstance(graph, bytes) else onnx.load(graph, load_external_data=False)
        _fill(model.graph, weights)
        self._evaluator = _evaluator(model)

    def run(self, images: np.ndarray) -> np.ndarray:
        """Images (N, 3, H, W) -> features (N, F), in the dtype of weights and images."""
        (features,) = self._evaluator.run(["features"], {"image": images})
        return features


def _evaluator(model: onnx.ModelProto) -> ReferenceEvaluator:
    try:
        return ReferenceEvaluator(model, new_ops=NEW_OPS)
    except (NotImplementedError, RuntimeError) as error:
        raise UnsupportedError(f"the reference runtime does not know an operator of this graph: {error}") from error


def _fill(graph: onnx.GraphProto, weights: Mapping[str, np.ndarray]) -> None:
    """Put the given arrays in place of the initializers that are declared external."""
    declared = {t.name: t for t in graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL}
    if declared.keys() != weights.keys():
        odd = sorted(declared.keys() ^ weights.keys())
        raise UnsupportedError(f"the graph declares {len(declared)} external weights, {len(weights)} were given: {odd}")
    for name, tensor in declared.items():
        shape = tuple(tensor.dims)
        if shape != weights[name].shape:
            raise UnsupportedError(f"weight {name}: the graph declares {shape}, given {weights[name].shape}")
        tensor.CopyFrom(numpy_helper.from_array(weights[name], name))
