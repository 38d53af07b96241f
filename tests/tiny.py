"""A backbone of five convs, small enough to read, with each kind of layer the project must cope with.

image (N, 3, H, W)
stem     conv 3x3 stride 2 + batch-norm, ReLU        3 -> 8
dw       depthwise 3x3     + batch-norm, ReLU6       8
project  conv 1x1          + batch-norm              8 -> 8, added to the stem's output
grouped  conv 3x3 groups 2, conv bias + batch-norm   8 -> 6
plain    conv 3x3, bias, no batch-norm, ReLU         6 -> 10
features (N, 10): pooled and flattened
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from ksm_edge.bundle.layers import Bundle, InputContract, Layer, LayerWeights
from ksm_edge.mask import INITIAL_SCORE, score_shape, soft_mask
from ksm_edge.pack.record import LayerState, Pack
from ksm_edge.training.suited import FEATURE_SUM

LAYERS = (
    Layer("stem", (8, 3, 3, 3), 1, 1e-5, True),
    Layer("dw", (8, 1, 3, 3), 8, 1e-3, True),
    Layer("project", (8, 8, 1, 1), 1, 1e-5, True),
    Layer("grouped", (6, 4, 3, 3), 2, 1e-5, True),
    Layer("plain", (10, 6, 3, 3), 1, 0.0, False),
)
FEATURES = 10
INPUT = InputContract(size=16, resize=18, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def tiny_weights(seed: int = 0) -> dict[str, LayerWeights]:
    rng = np.random.default_rng(seed)
    weights = {}
    for layer in LAYERS:
        O, I, kh, kw = layer.weight_shape
        draw = lambda low, high, n=O: rng.uniform(low, high, n).astype(np.float32)  # noqa: E731
        zero, one = np.zeros(O, np.float32), np.ones(O, np.float32)
        weight = (rng.standard_normal(layer.weight_shape) * np.sqrt(2 / (I * kh * kw))).astype(np.float32)
        if layer.has_norm:
            bias = draw(-0.2, 0.2) if layer.name == "grouped" else zero
            tensors = (weight, bias, draw(0.7, 1.3), draw(-0.2, 0.3), draw(-0.2, 0.2), draw(0.5, 1.5))
        else:
            tensors = (weight, zero, one, draw(-0.2, 0.3), zero, one)
        for tensor in tensors:
            tensor.setflags(write=False)
        weights[layer.name] = LayerWeights(*tensors)
    return weights


def tiny_graph() -> onnx.ModelProto:
    """The inference graph as a bundle holds it: conv weights and biases are external initializers without data."""
    conv = {layer.name: {"kernel_shape": layer.weight_shape[2:], "group": layer.groups} for layer in LAYERS}
    nodes = [
        _conv("stem", "image", pads=[1, 1, 1, 1], strides=[2, 2], **conv["stem"]),
        helper.make_node("Relu", ["stem.out"], ["stem.act"]),
        _conv("dw", "stem.act", pads=[1, 1, 1, 1], **conv["dw"]),
        helper.make_node("Clip", ["dw.out", "zero", "six"], ["dw.act"]),
        _conv("project", "dw.act", **conv["project"]),
        helper.make_node("Add", ["project.out", "stem.act"], ["sum"]),
        _conv("grouped", "sum", pads=[1, 1, 1, 1], **conv["grouped"]),
        _conv("plain", "grouped.out", pads=[1, 1, 1, 1], **conv["plain"]),
        helper.make_node("Relu", ["plain.out"], ["plain.act"]),
        helper.make_node("GlobalAveragePool", ["plain.act"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["features"], axis=1),
    ]
    scalars = [helper.make_tensor(n, TensorProto.FLOAT, [], [v]) for n, v in (("zero", 0.0), ("six", 6.0))]
    external = [
        _external(f"{layer.name}.{kind}", shape)
        for layer in LAYERS
        for kind, shape in (("weight", layer.weight_shape), ("bias", layer.weight_shape[:1]))
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, "H", "W"])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["N", FEATURES])],
        scalars + external,
    )
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


def tiny_bundle(folder: Path, seed: int = 0) -> Bundle:
    """A Bundle record whose graph lies in `folder`; its weights are in memory only."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "backbone.onnx").write_bytes(tiny_graph().SerializeToString())
    digest = f"{seed:064x}"
    return Bundle(folder, "tiny", "CC0-1.0", digest, LAYERS, tiny_weights(seed), FEATURES, INPUT, FEATURE_SUM)


def saved_tiny_bundle(folder: Path, seed: int = 0) -> Bundle:
    """The same backbone as a bundle on disk, whole, with its true digest."""
    from ksm_edge.bundle.freeze import Frozen
    from ksm_edge.bundle.load import load_bundle
    from ksm_edge.bundle.write import write_bundle

    frozen = Frozen(tiny_graph(), LAYERS, tiny_weights(seed), FEATURES)
    write_bundle(frozen, folder, recipe="tiny", licence="CC0-1.0", input_contract=INPUT)
    return load_bundle(folder)


def tiny_pack(
    granularity: str = "kernel",
    *,
    soft: bool = True,
    amplify: bool = False,
    statistics: str = "frozen",
    classes: int = 3,
    cut: float = 0.1,
    seed: int = 1,
    changes: Mapping[str, object] | None = None,
) -> Pack:
    """A pack for `tiny_bundle(seed=0)` with about the share `cut` of the kernels not kept; the stem has no mask.

    `amplify`: every other one of them is amplified, if masks are soft.
    """
    rng = np.random.default_rng(seed)
    small = lambda O: rng.normal(0, 0.02, O).astype(np.float32)  # noqa: E731
    layers = {}
    for layer in LAYERS:
        O = layer.weight_shape[0]
        score = rng.uniform(5e-3 - cut * 1e-2, 1.5e-2 - cut * 1e-2, score_shape(layer.weight_shape, granularity))
        if amplify := amplify and soft:
            score.flat[::2] = 2 * INITIAL_SCORE - score.flat[::2]
        mask = None if layer.name == "stem" else soft_mask(score.astype(np.float32), soft=soft, amplify=amplify)
        gamma_delta = small(O) if layer.has_norm else np.zeros(O, np.float32)
        own = (small(O), (1 + small(O)) ** 2) if statistics == "batch" and layer.has_norm else (None, None)
        layers[layer.name] = LayerState(mask, gamma_delta, small(O), *own)
    values = {
        "task": f"tiny {granularity}",
        "classes": tuple(f"class {i}" for i in range(classes)),
        "backbone": f"{0:064x}",
        "recipe": "tiny",
        "granularity": granularity,
        "soft": soft,
        "statistics": statistics,
        "input": INPUT,
        "layers": layers,
        "weight_shapes": {layer.name: layer.weight_shape for layer in LAYERS},
        "head_weight": rng.normal(0, 1, (classes, FEATURES)).astype(np.float32),
        "head_bias": rng.normal(0, 1, classes).astype(np.float32),
        "record": {"steps": 7, "validation_accuracy": 0.5},
        "fused_digest": "",
        "golden_logits": rng.normal(0, 1, (2, classes)).astype(np.float32),
    }
    return Pack(**(values | dict(changes or {})))  # type: ignore[arg-type]


def _conv(name: str, image: str, **attributes: object) -> onnx.NodeProto:
    inputs = [image, f"{name}.weight", f"{name}.bias"]
    return helper.make_node("Conv", inputs, [f"{name}.out"], name=name, **attributes)


def _external(name: str, shape: tuple[int, ...]) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="weights-given-at-session-creation")
    return tensor
