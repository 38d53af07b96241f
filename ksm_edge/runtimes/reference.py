"""The oracle: ONNX's own reference evaluator in numpy, for tests and for explaining a runtime's numbers.

It knows the operators of ONNX itself and, for training graphs, those of `reference_operators`. Weights given as float64
make it a float64 oracle.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from ksm_edge.errors import UnsupportedError
from ksm_edge.runtimes.reference_operators import NEW_OPS


def available() -> str | None:
    return None  # onnx and numpy come with every install


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
