from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper
from tiny import tiny_bundle, tiny_graph

from ksm_edge.errors import UnsupportedError
from ksm_edge.fuse import fuse
from ksm_edge.runtimes.onnxruntime import session_options
from ksm_edge.runtimes.reference import evaluate


def fused_matmul(**attributes: object):
    node = helper.make_node("FusedMatMul", ["a", "b"], ["y"], domain="com.microsoft", **attributes)
    value = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, None)  # noqa: E731
    graph = helper.make_graph([node], "g", [value("a"), value("b")], [value("y")])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, ir_version=8, opset_imports=opsets)


@pytest.mark.parametrize(("left", "right"), [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_fused_matmul_is_onnx_runtimes(left: int, right: int) -> None:
    import onnxruntime

    rng = np.random.default_rng(0)
    a = rng.standard_normal((2, 4, 3) if left else (2, 3, 4)).astype(np.float32)
    b = rng.standard_normal((2, 5, 4) if right else (2, 4, 5)).astype(np.float32)
    model = fused_matmul(transA=left, transB=right, alpha=0.5)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), session_options(1), providers=["CPUExecutionProvider"]
    )
    feeds = {"a": a, "b": b}
    np.testing.assert_allclose(evaluate(model, feeds)["y"], session.run(["y"], feeds)[0], rtol=1e-5, atol=1e-6)


def test_fused_matmul_keeps_float64() -> None:
    a, b = np.eye(2) / 3, np.eye(2)
    np.testing.assert_array_equal(evaluate(fused_matmul(), {"a": a, "b": b})["y"], a)


def test_what_fused_matmul_does_not_know_is_not_guessed() -> None:
    with pytest.raises(UnsupportedError, match="transBatchA=1"):
        evaluate(fused_matmul(transBatchA=1), {"a": np.eye(2), "b": np.eye(2)})


def test_evaluate_takes_external_weights_and_leaves_the_model_alone(tmp_path) -> None:
    model = tiny_graph()
    before = model.SerializeToString()
    image = np.ones((1, 3, 16, 16), np.float32)
    outputs = evaluate(model, {"image": image}, fuse(tiny_bundle(tmp_path), None))
    assert outputs["features"].shape == (1, 10)
    assert model.SerializeToString() == before
