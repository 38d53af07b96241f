"""Operators that standard ONNX has none of, compiled from `ksm_edge/_operators.c`: where they apply, and their nodes.

    Depthwise          x, W, scale, bias -> y: the conv, its mask's scale, its bias and the activation behind it
    DepthwiseGradient  dy, y, x, W, scale, two accumulators -> dx, these, sum dx: through the activation behind, the
                       conv and, where the conv is all that reads x, the activation in front of it
    Gate               dy, y -> dz, sum dz: through an activation

Each goes over memory once. What they save over standard operators is passes over memory, and the change into a blocked
layout and back around every depthwise conv. dx may take the memory of x, and dz that of dy.

    WidenedDepthwise          x, V, v, W, scale, bias -> y, room: Depthwise of what a 1x1 conv (V, v) and its activation
                              make of x
    WidenedDepthwiseGradient  dy, y, x, V, v, W, scale, four accumulators -> dx, these, room

What the 1x1 conv makes of an image, the largest tensors of an inverted residual network, is never in memory: GROUP
channels are made at a time, and again for the gradient. The room for these is an output that nobody reads.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from ksm_edge.autodiff.graph import OWN, Emitter, Node, Shape
from ksm_edge.autodiff.tape import Tape
from ksm_edge.bundle.layers import Layer

MOST_TAPS, LONGEST_STRIDE = 49, 2  # of a kernel, as in _operators.c
GROUP = 8  # channels that are made at a time
# In-channels and result of a 1x1 conv that is done along: where it has more to multiply, or what it makes stays in the
# cache, ONNX Runtime's products are as quick.
FEW_INSIDE = 32
LARGE_BYTES = 2**19
# (input, output): where nobody reads the first later, ONNX Runtime gives its memory to the second.
IN_PLACE = {"DepthwiseGradient": (2, 0), "Gate": (0, 0)}
FORWARD = ("Depthwise", "WidenedDepthwise")
EVERYTHING = (-math.inf, math.inf)

Bounds = tuple[float, float]


def bounds_of(node: Node, constants: Mapping[str, np.ndarray]) -> Bounds | None:
    """Between which numbers an activation's output lets gradients pass, if that is all there is to it."""
    if node.op == "Relu":
        return 0.0, math.inf
    if node.op == "Clip" and all(name in constants for name in node.inputs[1:3]):
        low, high = (float(constants[name]) for name in node.inputs[1:3])
        return low, high
    return None


@dataclass(frozen=True)
class Depthwise:
    """A depthwise conv and the activations that its operators do along with it."""

    node: Node
    layer: Layer
    x: Shape  # of the depthwise conv, also where that is never made as a whole
    y: Shape
    before: Node | None = None
    behind: Node | None = None
    before_bounds: Bounds = EVERYTHING
    behind_bounds: Bounds = EVERYTHING
    wide: Node | None = None  # the 1x1 conv in front of `before`, where it is done along
    inside: int = 0  # its in-channels

    @property
    def output(self) -> str:
        return (self.behind or self.node).output

    @property
    def attributes(self) -> dict[str, Any]:
        get = self.node.attributes.get
        return {
            "image_shape": [self.x[0], self.inside or self.x[1], *self.x[2:]],
            "output_shape": list(self.y),
            "kernel_shape": list(self.layer.weight_shape[2:]),
            "strides": get("strides", [1, 1]),
            "pads": get("pads", [0] * 4),
            **dict(zip(("input_low", "input_high"), self.before_bounds, strict=True)),
            **dict(zip(("low", "high"), self.behind_bounds, strict=True)),
        }

    def forward(self, emit: Emitter) -> None:
        given = [*self._wide_parameters, *(f"{self.layer.name}.{part}" for part in ("weight", "scale", "bias"))]
        x = (self.wide or self.node).inputs[0]
        if self.wide:
            made = [self.output, emit.fresh("room")]
            emit.many("WidenedDepthwise", x, *given, names=made, domain=OWN, **self.attributes)
        else:
            emit("Depthwise", x, *given, name=self.output, domain=OWN, **self.attributes)

    @property
    def _wide_parameters(self) -> list[str]:
        return [f"{self.wide.name}.weight", f"{self.wide.name}.bias"] if self.wide else []

    def backward(self, tape: Tape, dy: str) -> None:
        """From the gradient behind the activation behind to the one in front of the activation, or conv, in front."""
        emit, name, x, C = tape.emit, self.layer.name, (self.wide or self.node).inputs[0], self.x[1]
        y = self.output if self.behind else dy  # there is nothing to pass
        totals: dict[str, Shape] = {f"{name}.product": (C,), f"{name}.dbias": (C,)}
        if self.wide:
            totals = {f"{self.wide.name}.product": (C, self.inside), f"{self.wide.name}.dbias": (C,)} | totals
        before = [emit.input(f"acc:{total}", shape) for total, shape in totals.items()]
        given = [dy, y, x, *self._wide_parameters, f"{name}.weight", f"{name}.scale", *before]
        made = [emit.fresh("dx"), *(emit.output(total, shape) for total, shape in totals.items())]
        if self.wide:
            made.append(emit.fresh("room"))
            emit.many("WidenedDepthwiseGradient", *given, names=made, domain=OWN, **self.attributes)
        else:
            made.append(emit.fresh("dx_sum"))
            emit.many("DepthwiseGradient", *given, names=made, domain=OWN, **self.attributes)
            tape.sums[made[0]] = made[-1]
        tape.add(x, made[0])


def can_do(node: Node, layer: Layer) -> bool:
    """Whether the operators can do this depthwise conv."""
    _, _, kh, kw = layer.weight_shape
    strides, dilations = (node.attributes.get(name, [1, 1]) for name in ("strides", "dilations"))
    top, left, bottom, right = node.attributes.get("pads", [0] * 4)
    padded = 0 <= min(top, bottom) <= max(top, bottom) < kh and 0 <= min(left, right) <= max(left, right) < kw
    return padded and kh * kw <= MOST_TAPS and max(strides) <= LONGEST_STRIDE and max(dilations) == 1


def depthwise(
    node: Node,
    layers: Mapping[str, Layer],
    nodes: Sequence[Node],
    shapes: Mapping[str, Shape],
    constants: Mapping[str, np.ndarray],
    wide: Collection[str],
) -> Depthwise:
    """This conv with what is around it that nothing else reads in between. `wide`: 1x1 convs that may be done along."""
    makers = {other.output: other for other in nodes}
    readers: dict[str, list[Node]] = {}
    for other in nodes:
        for name in other.inputs:
            readers.setdefault(name, []).append(other)

    def in_front(of: Node) -> Node | None:
        """What makes its input for it alone."""
        return makers.get(of.inputs[0]) if len(readers[of.inputs[0]]) == 1 else None

    found: dict[str, Any] = {}
    behind = readers.get(node.output, [])
    around = {"before": in_front(node), "behind": behind[0] if len(behind) == 1 else None}
    for where, near in around.items():
        if near is not None and (bounds := bounds_of(near, constants)) is not None:
            found |= {where: near, f"{where}_bounds": bounds}
    x = shapes[node.inputs[0]]
    conv = in_front(found["before"]) if "before" in found else None
    if conv is not None and conv.name in wide:
        inside = layers[conv.name].weight_shape[1]
        strides = conv.attributes.get("strides", [1, 1])
        if inside <= FEW_INSIDE and inside % 2 == 0 and max(strides) == 1 and 4 * math.prod(x[1:]) >= LARGE_BYTES:
            found |= {"wide": conv, "inside": inside}
    return Depthwise(node, layers[node.name], x, shapes[node.output], **found)


def gate(tape: Tape, node: Node, dy: str, bounds: Bounds) -> None:
    """The gradient in front of an activation, from the one behind it."""
    emit, shape = tape.emit, tape.shapes[node.output]
    dz, dz_sum = emit.fresh("dz"), emit.fresh("dz_sum")
    low, high = bounds
    given = {"image_shape": list(shape), "low": low, "high": high}
    emit.many("Gate", dy, node.output, names=[dz, dz_sum], domain=OWN, **given)
    tape.sums[dz] = dz_sum
    tape.add(node.inputs[0], dz)


def declare_shapes(model: onnx.ModelProto) -> None:
    """Write down the shapes of what these operators make, which no shape inference knows; accumulators are known."""
    graph = model.graph
    known = {value.name for value in (*graph.input, *graph.output, *graph.value_info)}
    for node in graph.node:
        if node.domain != OWN:
            continue
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        n, C, H, W = attributes["image_shape"]
        first = attributes["output_shape"] if node.op_type in FORWARD else (n, C, H, W)
        last = (GROUP, H, W) if node.op_type.startswith("Widened") else (C,)
        for name, shape in ((node.output[0], first), (node.output[-1], last)):
            if name not in known:
                known.add(name)
                graph.value_info.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))
