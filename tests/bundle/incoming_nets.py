"""Small classifiers as they come in, to be frozen: ONNX graphs written node by node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Weights = Mapping[str, np.ndarray]


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    """A state dict: conv1 (4, 3, 3, 3) with batch-norm bn1, conv2 (6, 4, 1, 1) with a bias, fc (2, 6)."""
    rng = np.random.default_rng(seed)
    shapes = {
        "conv1.weight": (4, 3, 3, 3),
        "bn1.weight": (4,),
        "bn1.bias": (4,),
        "bn1.running_mean": (4,),
        "bn1.running_var": (4,),
        "conv2.weight": (6, 4, 1, 1),
        "conv2.bias": (6,),
        "fc.weight": (2, 6),
        "fc.bias": (2,),
    }
    drawn = {name: rng.uniform(-1, 1, shape).astype(np.float32) for name, shape in shapes.items()}
    drawn["bn1.running_var"] = np.abs(drawn["bn1.running_var"]) + np.float32(0.5)
    return drawn


def node(op: str, inputs: str, output: str, **attributes: object) -> onnx.NodeProto:
    """A node named after its output; inputs are separated by spaces, "-" leaves one out."""
    names = ["" if name == "-" else name for name in inputs.split()]
    return helper.make_node(op, names, [output], name=f"/{output}", **attributes)


CONV1 = node("Conv", "image conv1.weight", "c1", pads=[1, 1, 1, 1])
NORM1 = node("BatchNormalization", "c1 bn1.weight bn1.bias bn1.running_mean bn1.running_var", "n1", epsilon=1e-3)
RELU1 = node("Relu", "n1", "r1")
CONV2 = node("Conv", "r1 conv2.weight conv2.bias", "c2")
POOL = node("GlobalAveragePool", "c2", "p")
FLAT = node("Flatten", "p", "f", axis=1)
LINEAR = node("Gemm", "f fc.weight fc.bias", "logits", transB=1)
CLASSIFIER = (CONV1, NORM1, RELU1, CONV2, POOL, FLAT, LINEAR)


def graph(
    nodes: Sequence[onnx.NodeProto] = CLASSIFIER,
    tensors: Weights | None = None,
    *,
    weightless: bool = False,
    constants: Weights | None = None,
    opset: int = 17,
) -> onnx.ModelProto:
    """A model of `nodes`, whose last output is its own; parameters inside, or asked for as inputs if `weightless`."""
    tensors = weights() if tensors is None else tensors
    inputs = [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, "H", "W"])]
    inside = dict(constants or {})
    if weightless:
        inputs += [helper.make_tensor_value_info(n, TensorProto.FLOAT, t.shape) for n, t in tensors.items()]
    else:
        inside |= tensors
    output = helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)
    initializers = [numpy_helper.from_array(tensor, name) for name, tensor in inside.items()]
    made = helper.make_graph(list(nodes), "incoming", inputs, [output], initializers)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def run(model: onnx.ModelProto, tensor: str, image: np.ndarray) -> np.ndarray:
    """The value of `tensor` in a model that holds its weights, by ONNX Runtime."""
    import onnxruntime

    model = onnx.ModelProto.FromString(model.SerializeToString())
    model.graph.output.append(onnx.ValueInfoProto(name=tensor))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run([tensor], {"image": image})[0]
