"""Small networks that have all of this project's operators in their gradient graphs, for `runtimes.trial`.

Last bits, which are others on every processor, decide no gradient in them. What goes into a clip or a pool is whole
numbers times a power of two: sums of them are exact, and a bias keeps them away from the clip's bounds, by more than
Winograd's domain rounds where that comes before. Behind smooth activations there are neither. So that gradients are
not lost in clips, weights are small where many are summed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from zlib import crc32

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ksm_edge.autodiff.example import Example
from ksm_edge.autodiff.gradient_graph import FEATURES, IMAGE, GradientGraph, build
from ksm_edge.autodiff.spec import FLOATS, GradientSpec
from ksm_edge.autodiff.tiles import PLACES, transform_into
from ksm_edge.bundle.layers import Layer

# Behind the pool images have 49 pixels a side: hardly a side of anything is a multiple of what a register holds, or of
# a tile, and WIDE channels are large enough for a 1x1 conv to be done along with the next one.
SIZE, CLASSES, CHANNELS, WIDE = 97, 3, 18, 58
USUAL = 3.0  # number behind an activation
BOUNDS = {"low": np.array(0, np.float32), "high": np.array(6, np.float32)}


@dataclass(frozen=True)
class _Step:
    """A conv and the activation behind it, if any, which are called NAME and NAME.y."""

    name: str
    weight_shape: tuple[int, int, int, int]
    activation: str = ""
    stride: int = 1
    unit: float = 1.0  # of its weights, which are -1, 0 and 1 times it

    @property
    def is_depthwise(self) -> bool:
        return self.weight_shape[1] == 1

    @property
    def layer(self) -> Layer:
        O = self.weight_shape[0]
        return Layer(self.name, self.weight_shape, groups=O if self.is_depthwise else 1, eps=0.0, has_norm=False)

    @property
    def output(self) -> str:
        return f"{self.name}.y" if self.activation else self.name


# In front of each network, with a pool behind it.
_STEM = _Step("stem", (CHANNELS, 3, 1, 1), "Relu")
_NETWORKS: dict[str, tuple[_Step, ...]] = {
    "by tiles": (
        _Step("tiles", (CHANNELS, CHANNELS, 3, 3), "Clip", unit=2**-4),
        _Step("apart", (CHANNELS, CHANNELS, 1, 1), "Relu", stride=2),
        _Step("seven", (CHANNELS, 1, 7, 7), "Swish", unit=2**-2),
        _Step("end", (CHANNELS, 1, 5, 5), stride=2, unit=2**-2),
    ),
    "with clips": (
        _Step("wide", (WIDE, CHANNELS, 1, 1), "Clip", unit=2**-2),
        _Step("depth", (WIDE, 1, 3, 3), "Clip", unit=2**-2),
        _Step("halved", (WIDE, 1, 3, 3), "Clip", stride=2, unit=2**-2),
        _Step("five", (WIDE, 1, 5, 5), "HardSwish", stride=2, unit=2**-2),
        _Step("end", (CHANNELS, WIDE, 1, 1), unit=2**-3),
    ),
    "smooth": (
        _Step("wide", (WIDE, CHANNELS, 1, 1), "Swish", unit=2**-3),
        _Step("depth", (WIDE, 1, 3, 3), "Swish", stride=2),
        _Step("narrow", (CHANNELS, WIDE, 1, 1), "Swish", unit=2**-3),
        _Step("end", (CHANNELS, 1, 3, 3), stride=2),
    ),
}
NAMES = tuple(_NETWORKS)
# Of a second one its gradient graph of standard operators would have more memory than compiling others takes.
IMAGES = {"by tiles": 2, "with clips": 1, "smooth": 2}


def example(name: str, *, own: bool, products: str = FLOATS) -> Example:
    """Of one of NAMES, with this project's operators, or with standard ones alone: outputs are the same either way."""
    steps = (_STEM, *_NETWORKS[name])
    layers = [step.layer for step in steps]
    learning = frozenset(layer.name for layer in layers)
    spec = GradientSpec(IMAGES[name], SIZE, CLASSES, learning, own=own, inside=not own, products=products)
    graph = build(_network(steps), layers, replace(spec, tile_bytes=2**22))
    given = _arrays(steps, graph)
    inputs, externals = (
        {name: np.ascontiguousarray(given[name], np.float32) for name in names}
        for names in (graph.inputs, graph.externals)
    )
    return Example(graph.model.SerializeToString(), inputs, externals, tuple(graph.outputs))


def _network(steps: Sequence[_Step]) -> onnx.ModelProto:
    nodes: list[onnx.NodeProto] = []
    x = IMAGE
    for step in steps:
        nodes += _nodes(step, x)
        x = step.output
        if step == _STEM:
            pool = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1] * 4}
            nodes.append(helper.make_node("MaxPool", [x], ["pool"], name="pool", **pool))
            x = "pool"
    nodes.append(helper.make_node("Flatten", [x], [FEATURES], name="flat"))
    image = helper.make_tensor_value_info(IMAGE, TensorProto.FLOAT, ["N", 3, "H", "W"])
    features = helper.make_tensor_value_info(FEATURES, TensorProto.FLOAT, ["N", "F"])
    given = [numpy_helper.from_array(value, name) for name, value in BOUNDS.items()]
    given += [external for step in steps for external in _externals(step)]
    graph = helper.make_graph(nodes, "trial", [image], [features], given)
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


def _nodes(step: _Step, x: str) -> Iterator[onnx.NodeProto]:
    kernel = step.weight_shape[2:]
    around = {"kernel_shape": kernel, "strides": [step.stride] * 2, "pads": [kernel[0] // 2] * 4}
    given = [x, f"{step.name}.weight", f"{step.name}.bias"]
    yield helper.make_node("Conv", given, [step.name], name=step.name, group=step.layer.groups, **around)
    if step.activation == "Swish":  # as torch exports it
        gate = f"{step.name}.gate"
        yield helper.make_node("Sigmoid", [step.name], [gate], name=gate)
        yield helper.make_node("Mul", [step.name, gate], [step.output], name=step.output)
    elif step.activation:
        bounds = BOUNDS if step.activation == "Clip" else ()
        yield helper.make_node(step.activation, [step.name, *bounds], [step.output], name=step.output)


def _externals(step: _Step) -> Iterator[TensorProto]:
    for part, shape in (("weight", step.weight_shape), ("bias", step.weight_shape[:1])):
        tensor = TensorProto(name=f"{step.name}.{part}", data_type=TensorProto.FLOAT, dims=shape)
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="given")
        yield tensor


def _arrays(steps: Sequence[_Step], graph: GradientGraph) -> dict[str, np.ndarray]:
    """By the names of its inputs and external initializers, and some more."""
    images, features = graph.inputs[IMAGE][0], graph.inputs["head:weight"][1]
    target = _uniform("target", (images, CLASSES))
    given: dict[str, np.ndarray] = {
        IMAGE: _whole(IMAGE, graph.inputs[IMAGE], -4, 4),
        "target": target / target.sum() / images,
        "head:weight": _uniform("head:weight", (CLASSES, features), 0.5 / np.sqrt(features)),
        "head:bias": _uniform("head:bias", (CLASSES,)),
    }
    between = 1.0  # what numbers are apart, in front of the step
    for step in steps:
        between *= step.unit
        given |= _parameters(step, between / 2)
        between /= 2
        if graph.forms[step.name] == "winograd":
            given[f"{step.name}.weight"] = _transformed(given[f"{step.name}.pristine"])
    # What runs before have left.
    left = {name: _uniform(name, shape, 0.5) for name, shape in graph.inputs.items() if name.startswith("acc:")}
    return given | left


def _parameters(step: _Step, beside: float) -> dict[str, np.ndarray]:
    """By all the names that a graph may ask for them by. Biases are whole numbers and `beside`: such as to have what is
    made of usual numbers in the middle of a clip.
    """
    O, I, *_ = step.weight_shape
    weight = step.unit * _whole(f"{step.name}.weight", step.weight_shape, -1, 1)
    scale = _whole(f"{step.name}.scale", (O,), 1, 2)
    usual = USUAL * weight.sum(axis=(1, 2, 3)) * (scale if step.is_depthwise else 1)
    found = {
        "weight": weight,
        "pristine": weight,
        "matrix": weight[:, :, 0, 0],
        "turned": weight[:, :, ::-1, ::-1].swapaxes(0, 1),
        "flipped": weight[:, :, ::-1, ::-1],
        "mask": np.ones((O, I, 1, 1)),
        "scale": scale,
        "bias": np.round(3 - usual) + beside,
    }
    return {f"{step.name}.{part}": array for part, array in found.items()}


def _whole(name: str, shape: tuple[int, ...], least: int, most: int) -> np.ndarray:
    """Whole numbers, each as often."""
    return np.floor(least + (most + 1 - least) * (0.5 + _uniform(name, shape) / 2))


def _uniform(name: str, shape: tuple[int, ...], largest: float = 1.0) -> np.ndarray:
    """Between -largest and largest, by the name and each one's place alone, mixed as splitmix64 does (Steele, Lea and
    Flood 2014): numpy's generators would take 2 MiB, which a process that compiles has not.
    """
    mixed = np.arange(1, 1 + math.prod(shape), dtype=np.uint64) + np.uint64(crc32(name.encode()))
    mixed *= np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return largest * ((mixed >> np.uint64(11)) / 2**52 - 1).reshape(shape)


def _transformed(weight: np.ndarray) -> np.ndarray:
    O, I, *_ = weight.shape
    made = np.empty((PLACES, O, I), np.float32)
    transform_into(made, weight.astype(np.float32), np.ones((O, I), np.float32))
    return made
