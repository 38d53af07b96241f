"""Max pools by torch are those of ONNX Runtime, whose pads, dilations and rounding torch says in other ways."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from ksm_edge.runtimes.pytorch import OPERATORS

POOLS = {
    "plain": {"kernel_shape": [2, 2], "strides": [2, 2]},
    "padded": {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]},
    "pads that differ": {"kernel_shape": [3, 2], "strides": [2, 1], "pads": [0, 1, 1, 0]},
    "dilated": {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1], "dilations": [2, 2]},
    "dilated, pads that differ": {"kernel_shape": [2, 3], "strides": [1, 2], "pads": [1, 0, 0, 1], "dilations": [3, 1]},
    "rounded up": {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1},
    "rounded up, padded": {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1], "ceil_mode": 1},
}


@pytest.mark.torch
@pytest.mark.parametrize("size", [9, 10, 13])
@pytest.mark.parametrize("name", POOLS)
def test_a_max_pool_is_the_one_of_onnxruntime(name: str, size: int) -> None:
    torch = pytest.importorskip("torch")
    image = np.random.default_rng(0).standard_normal((2, 3, size, size)).astype(np.float32)
    node = helper.make_node("MaxPool", ["x"], ["y"], **POOLS[name])
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y")]
    values[0].type.tensor_type.shape.CopyFrom(onnx.TensorShapeProto(dim=[onnx.TensorShapeProto.Dimension()] * 4))
    graph = helper.make_graph([node], "pool", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = OPERATORS["MaxPool"](torch, [torch.tensor(image)], POOLS[name])
    np.testing.assert_array_equal(found.numpy(), session.run(None, {"x": image})[0])
