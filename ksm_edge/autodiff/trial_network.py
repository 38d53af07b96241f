"""A small network that has all of this project's operators in its gradient graph, for `runtimes.trial`.

Up to its smooth activations every number is a multiple of a power of two, and what goes into a clip or a pool is never
at a bound: last bits, which are others on every processor, decide no gradient. A sum of whole weights and of multiples
of g is one of g, and a bias keeps it g / 2 away from the bounds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ksm_edge.autodiff.gradient_graph import FEATURES, IMAGE, GradientGraph, build
from ksm_edge.autodiff.spec import GradientSpec
from ksm_edge.autodiff.tiles import PLACES, transform_into
from ksm_edge.bundle.layers import Layer

# No side of anything is a multiple of what a register holds, nor of a tile.
SIZE, IMAGES, CLASSES, CHANNELS, WIDE = 49, 2, 3, 18, 58
BOUNDS = {"low": np.array(0, np.float32), "high": np.array(6, np.float32)}


@dataclass(frozen=True)
class _Step:
    """A conv and the activation behind it, if any, which are called NAME and NAME.y."""

    name: str
    weight_shape: tuple[int, int, int, int]
    activation: str = ""
    groups: int = 1
    stride: int = 1
    unit: float = 1.0  # of its weights, which are whole numbers of it


_STEPS = (
    _Step("stem", (CHANNELS, 3, 1, 1), "Relu"),
    _Step("wide", (WIDE, CHANNELS, 1, 1), "Clip"),  # done along with the next one, as its result is large
    _Step("depth", (WIDE, 1, 3, 3), "Clip", groups=WIDE),
    _Step("halved", (WIDE, 1, 5, 5), "Relu", groups=WIDE, stride=2),
    # The pool is here: what it compares is exact, so that of equal numbers each graph takes the same.
    _Step("tiles", (CHANNELS, WIDE, 3, 3), "Clip"),
    _Step("apart", (CHANNELS, CHANNELS, 1, 1), "Relu", stride=2),
    _Step("hard", (CHANNELS, 1, 3, 3), "HardSwish", groups=CHANNELS),
    _Step("mixed", (WIDE, CHANNELS, 1, 1), "Swish", unit=2**-6),
    _Step("smooth", (WIDE, 1, 3, 3), "Swish", groups=WIDE),
    _Step("narrow", (CHANNELS, WIDE, 1, 1), unit=2**-6),
)
_POOLED = "halved"
LAYERS = tuple(Layer(step.name, step.weight_shape, step.groups, 0.0, False) for step in _STEPS)


def spec(*, own: bool, half_products: bool = False) -> GradientSpec:
    """With this project's operators, or with standard ones alone; outputs are the same either way."""
    names = frozenset(layer.name for layer in LAYERS)
    return GradientSpec(
        IMAGES, SIZE, CLASSES, names, own=own, inside=not own, tile_bytes=2**22, half_products=half_products
    )


@dataclass(frozen=True)
class Example:
    """A gradient graph of this network, and numbers for it: float32, and the same ones for every graph."""

    model: bytes
    inputs: dict[str, np.ndarray]
    externals: dict[str, np.ndarray]  # initializers
    outputs: tuple[str, ...]


def example(spec: GradientSpec) -> Example:
    """Of the graph that is asked for."""
    graph = build(_network(), LAYERS, spec)
    given = _arrays(graph)
    inputs, externals = (
        {name: np.ascontiguousarray(given[name], np.float32) for name in names}
        for names in (graph.inputs, graph.externals)
    )
    return Example(graph.model.SerializeToString(), inputs, externals, tuple(graph.outputs))


def _network() -> onnx.ModelProto:
    nodes, x = [], IMAGE
    for step in _STEPS:
        given = [x, f"{step.name}.weight", f"{step.name}.bias"]
        kernel = step.weight_shape[2:]
        around = {"kernel_shape": kernel, "strides": [step.stride] * 2, "pads": [kernel[0] // 2] * 4}
        nodes.append(helper.make_node("Conv", given, [step.name], name=step.name, group=step.groups, **around))
        x = step.name
        if step.activation:
            x = f"{step.name}.y"
            nodes += _activation(step.activation, step.name, x)
        if step.name == _POOLED:
            pool = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}
            nodes.append(helper.make_node("MaxPool", [x], ["pool"], name="pool", **pool))
            x = "pool"
    nodes.append(helper.make_node("Flatten", [x], [FEATURES], name="end"))
    image = helper.make_tensor_value_info(IMAGE, TensorProto.FLOAT, ["N", 3, "H", "W"])
    features = helper.make_tensor_value_info(FEATURES, TensorProto.FLOAT, ["N", "F"])
    given = [numpy_helper.from_array(value, name) for name, value in BOUNDS.items()]
    given += [external for layer in LAYERS for external in _externals(layer)]
    graph = helper.make_graph(nodes, "trial", [image], [features], given)
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


def _activation(kind: str, x: str, y: str) -> list[onnx.NodeProto]:
    if kind == "Swish":
        gate = f"{x}.gate"
        parts = (("Sigmoid", [x], gate), ("Mul", [x, gate], y))
        return [helper.make_node(op, given, [made], name=made) for op, given, made in parts]
    return [helper.make_node(kind, [x, *(BOUNDS if kind == "Clip" else ())], [y], name=y)]


def _externals(layer: Layer) -> list[TensorProto]:
    found = []
    for part, shape in (("weight", layer.weight_shape), ("bias", layer.weight_shape[:1])):
        tensor = TensorProto(name=f"{layer.name}.{part}", data_type=TensorProto.FLOAT, dims=shape)
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="given")
        found.append(tensor)
    return found


def _arrays(graph: GradientGraph) -> dict[str, np.ndarray]:
    """By the names of its inputs and external initializers, and some more."""
    rng = np.random.default_rng(0)
    features = graph.inputs["head:weight"][1]
    given: dict[str, np.ndarray] = {
        IMAGE: rng.integers(-4, 5, (IMAGES, 3, SIZE, SIZE)),
        "target": rng.dirichlet(np.ones(CLASSES), IMAGES) / IMAGES,
        "head:weight": rng.standard_normal((CLASSES, features)) / np.sqrt(features),
        "head:bias": rng.standard_normal(CLASSES),
    }
    for number, step in enumerate(_STEPS):
        given |= _parameters(step, 0.5 ** (number + 1), rng)
        if graph.forms[step.name] == "winograd":
            given[f"{step.name}.weight"] = _transformed(given[f"{step.name}.pristine"])
    return given | {name: np.zeros(shape) for name, shape in graph.inputs.items() if name.startswith("acc:")}


def _parameters(step: _Step, offset: float, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """By all the names that a graph may ask for them by."""
    O, I, *_ = step.weight_shape
    weight = step.unit * rng.integers(-1, 2, step.weight_shape)
    found = {
        "weight": weight,
        "pristine": weight,
        "matrix": weight[:, :, 0, 0],
        "turned": weight[:, :, ::-1, ::-1].swapaxes(0, 1),
        "flipped": weight[:, :, ::-1, ::-1],
        "mask": np.ones((O, I, 1, 1)),
        "scale": rng.integers(1, 3, O),
        "bias": rng.integers(-2, 3, O) + offset,
    }
    return {f"{step.name}.{part}": array for part, array in found.items()}


def _transformed(weight: np.ndarray) -> np.ndarray:
    O, I, *_ = weight.shape
    made = np.empty((PLACES, O, I), np.float32)
    transform_into(made, weight.astype(np.float32), np.ones((O, I), np.float32))
    return made
