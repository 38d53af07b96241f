"""Operators that standard ONNX has none of, written in C (`ksm_edge/_depthwise.h`): where they apply, their nodes.

    Depthwise          x, W, scale, bias -> y: the conv, its mask's scale, its bias and the activation behind it
    DepthwiseGradient  dy, y, x, W, scale, bias, two accumulators -> dx, these, sum dx: through the activation behind,
                       the conv and, where the conv is all that reads it, the activation in front of it
    Gate               dy, y -> dz, sum dz: through an activation

Each goes over memory once. What they save over standard operators is passes over memory, and the change into a blocked
layout and back around every depthwise conv. dx may take the memory of x, and dz that of dy.

    WidenedDepthwise          x, V, v, W, scale, bias -> y: Depthwise of what a 1x1 conv (V, v) and its activation make
                              of x
    WidenedDepthwiseGradient  dy, y, x, V, v, W, scale, bias, four accumulators -> dx, these

What the 1x1 conv makes of an image, the largest tensors of an inverted residual network, is never in memory: GROUP
channels are made at a time, and again for the gradient. The room for these is no output: the next operator has it after
this one.

An activation is a clip, whose result tells what gradients it passed, or one of SMOOTH: of these what they were given is
kept in place of their result, or made again, so that x is what stands in front of such an activation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from ksm_edge.autodiff import products, windows, winograd
from ksm_edge.autodiff.graph import OWN, Emitter, Node, Shape
from ksm_edge.autodiff.tape import Gradient, Tape
from ksm_edge.bundle.layers import Layer

MOST_TAPS, LONGEST_STRIDE = 49, 2  # of a kernel, as in _depthwise.h
GROUP = 8  # channels that are made at a time
IMAGE_RANK = 4
# In-channels and result of a 1x1 conv that is done along: where it has more to multiply, or what it makes stays in the
# cache, ONNX Runtime's products are as quick (ours have not been set beside it).
FEW_INSIDE = 32
LARGE_BYTES = 2**19
# (input, output): where nobody reads the first later, ONNX Runtime gives its memory to the second.
IN_PLACE = {"DepthwiseGradient": (2, 0), "Gate": (0, 0)}
FORWARD = ("Depthwise", "WidenedDepthwise")
WIDENED = ("WidenedDepthwise", "WidenedDepthwiseGradient")  # these do a 1x1 conv along
WORD_BYTES = 4
SMOOTH = {"HardSwish": 1, "Swish": 2}  # by their numbers there; 0 is a clip


@dataclass(frozen=True)
class Activation:
    """As the operators know them."""

    kind: int = 0
    low: float = -math.inf  # of a clip, which passes gradients strictly between
    high: float = math.inf


def activation_of(node: Node, constants: Mapping[str, np.ndarray]) -> Activation | None:
    """The activation that a node is, if the operators know it."""
    if node.op in SMOOTH:
        return Activation(SMOOTH[node.op])
    if node.op == "Relu":
        return Activation(low=0.0)
    if node.op == "Clip" and all(name in constants for name in node.inputs[1:3]):
        low, high = (float(constants[name]) for name in node.inputs[1:3])
        return Activation(low=low, high=high)
    return None


@dataclass(frozen=True)
class Depthwise:
    """A depthwise conv and the activations that its operators do along with it."""

    node: Node
    layer: Layer
    x_shape: Shape  # of the conv's input, also where that is never made as a whole
    y_shape: Shape
    before: Node | None = None
    behind: Node | None = None
    activation_before: Activation = Activation()
    activation_behind: Activation = Activation()
    wide: Node | None = None  # the 1x1 conv in front of `before`, where it is done along
    inside: int = 0  # its in-channels

    @property
    def done_along(self) -> list[Node]:
        """Nodes of the forward pass that are part of this one; a clip in front is part of the conv in front of it."""
        smooth = self.before if self.activation_before.kind else None
        around = [self.wide, self.before, self.behind] if self.wide else [smooth, self.behind]
        return [node for node in around if node is not None]

    @property
    def x(self) -> str:
        if self.wide:
            return self.wide.inputs[0]
        return self.before.inputs[0] if self.before and self.activation_before.kind else self.node.inputs[0]

    @property
    def y(self) -> str:
        return (self.behind or self.node).output

    @property
    def attributes(self) -> dict[str, Any]:
        get, before, behind = self.node.attributes.get, self.activation_before, self.activation_behind
        return {
            "image_shape": [self.x_shape[0], self.inside or self.x_shape[1], *self.x_shape[2:]],
            "output_shape": list(self.y_shape),
            "kernel_shape": list(self.layer.weight_shape[2:]),
            "strides": get("strides", [1, 1]),
            "pads": get("pads", [0] * 4),
            **{"input_kind": [before.kind], "input_low": before.low, "input_high": before.high},
            **{"kind": [behind.kind], "low": behind.low, "high": behind.high},
        }

    @property
    def parameters(self) -> list[str]:
        wide = [f"{self.wide.name}.weight", f"{self.wide.name}.bias"] if self.wide else []
        return wide + [f"{self.layer.name}.{part}" for part in ("weight", "scale", "bias")]

    def forward(self, emit: Emitter) -> None:
        op = "WidenedDepthwise" if self.wide else "Depthwise"
        emit(op, self.x, *self.parameters, name=self.y, domain=OWN, **self.attributes)

    def backward(self, tape: Tape, dy: str) -> None:
        """From the gradient behind the activation behind to the one in front of the activation, or conv, in front."""
        emit, name, C = tape.emit, self.layer.name, self.x_shape[1]
        y = dy if self.behind is None or self.activation_behind.kind else self.y  # else it is not looked at
        totals: dict[str, Shape] = {f"{name}.product": (C,), f"{name}.dbias": (C,)}
        if self.wide:
            totals = {f"{self.wide.name}.product": (C, self.inside), f"{self.wide.name}.dbias": (C,)} | totals
        before = [emit.input(f"acc:{total}", shape) for total, shape in totals.items()]
        made = [emit.fresh("dx"), *(emit.output(total, shape) for total, shape in totals.items())]
        op = "WidenedDepthwiseGradient" if self.wide else "DepthwiseGradient"
        if not self.wide:
            made.append(emit.fresh("dx_sum"))
            tape.sums[made[0]] = made[-1]
        emit.many(op, dy, y, self.x, *self.parameters, *before, names=made, domain=OWN, **self.attributes)
        tape.add((self.wide or self.before or self.node).inputs[0], made[0])


def can_do(node: Node, layer: Layer) -> bool:
    """Whether the operators can do this depthwise conv."""
    _, _, kh, kw = layer.weight_shape
    strides, dilations = (node.attributes.get(name, [1, 1]) for name in ("strides", "dilations"))
    top, left, bottom, right = node.attributes.get("pads", [0] * 4)
    padded = 0 <= min(top, bottom) <= max(top, bottom) < kh and 0 <= min(left, right) <= max(left, right) < kw
    return padded and kh * kw <= MOST_TAPS and max(strides) <= LONGEST_STRIDE and max(dilations) == 1


def find(
    nodes: Sequence[Node],
    forms: Mapping[str, str],
    layers: Mapping[str, Layer],
    shapes: Mapping[str, Shape],
    constants: Mapping[str, np.ndarray],
    *,
    widened: bool = True,
) -> dict[str, Depthwise]:
    """The depthwise convs that the operators do, by name, each with what is around it and is done along.

    `forms`: of the convs that may be done, see `conv`; `widened`: 1x1 convs may be done along.
    """
    makers = {node.output: node for node in nodes}
    readers: dict[str, list[Node]] = {}
    for node in nodes:
        for name in node.inputs:
            readers.setdefault(name, []).append(node)

    def in_front(node: Node) -> Node | None:
        """What makes its input for it alone."""
        return makers.get(node.inputs[0]) if len(readers[node.inputs[0]]) == 1 else None

    def behind(node: Node) -> Node | None:
        """What alone reads its output."""
        found = readers.get(node.output, [])
        return found[0] if len(found) == 1 else None

    done: dict[str, Depthwise] = {}
    taken: set[str] = set()  # activations that are done along with the conv in front of them
    for node in nodes:
        if forms.get(node.name) != "channel" or not can_do(node, layers[node.name]):
            continue
        found: dict[str, Any] = {}
        for where, near in {"before": in_front(node), "behind": behind(node)}.items():
            if near is not None and near.name not in taken and (known := activation_of(near, constants)) is not None:
                found |= {where: near, f"activation_{where}": known}
        x = shapes[node.inputs[0]]
        wide = in_front(found["before"]) if widened and "before" in found else None
        if wide is not None and forms.get(wide.name) == "pointwise" and _is_worth_it(wide, layers[wide.name], x):
            found |= {"wide": wide, "inside": layers[wide.name].weight_shape[1]}
        done[node.name] = conv = Depthwise(node, layers[node.name], x, shapes[node.output], **found)
        taken |= {conv.behind.name} if conv.behind else set()
    return done


def _is_worth_it(node: Node, layer: Layer, made: Shape) -> bool:
    """Whether a 1x1 conv is to be done along, and can be."""
    inside, strides = layer.weight_shape[1], node.attributes.get("strides", [1, 1])
    return inside <= FEW_INSIDE and inside % 2 == 0 and max(strides) == 1 and 4 * math.prod(made[1:]) >= LARGE_BYTES


def gate(tape: Tape, node: Node, dy: Gradient) -> bool:
    """Leave the gradient in front of an activation, from the one behind it; False where it is not one of ours."""
    emit, shape, activation = tape.emit, tape.shapes[node.output], activation_of(node, tape.emit.constants)
    if activation is None or len(shape) != IMAGE_RANK:
        return False
    dz, dz_sum = emit.fresh("dz"), emit.fresh("dz_sum")
    y = node.inputs[0] if activation.kind else node.output
    given = {"image_shape": list(shape), "kind": [activation.kind], "low": activation.low, "high": activation.high}
    emit.many("Gate", tape.whole(dy, node.output), y, names=[dz, dz_sum], domain=OWN, **given)
    tape.sums[dz] = dz_sum
    tape.add(node.inputs[0], dz)
    return True


def declare_shapes(model: onnx.ModelProto) -> None:
    """Write down the shapes of what these operators make, which no shape inference knows; accumulators are known."""
    graph = model.graph
    known = {value.name for value in (*graph.input, *graph.output, *graph.value_info)}
    for node in graph.node:
        if node.domain != OWN:
            continue
        for name, shape in _made(node, _attributes(node)):
            if name not in known:
                known.add(name)
                graph.value_info.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))


def _made(node: onnx.NodeProto, attributes: Mapping[str, Any]) -> list[tuple[str, Sequence[int]]]:
    """Outputs of one of these operators that are no accumulators, with their shapes."""
    if node.op_type in winograd.OPERATORS:
        return [(node.output[0], winograd.made_shape(node.op_type, attributes))]
    if node.op_type in windows.OPERATORS:
        return [(node.output[0], windows.made_shape(node.op_type, attributes))]
    if node.op_type in products.OPERATORS:
        return [(node.output[0], products.made_shape(attributes))]
    n, C, H, W = attributes["image_shape"]
    if node.op_type in FORWARD:
        return [(node.output[0], attributes["output_shape"])]
    sums = [] if node.op_type in WIDENED else [(node.output[-1], (C,))]
    return [(node.output[0], (n, C, H, W)), *sums]


def room_bytes(model: onnx.ModelProto) -> int:
    """What these operators need to work in, the one that needs most: a room stays until the last session ends."""
    return WORD_BYTES * max((_room_words(node) for node in model.graph.node), default=0)


def _room_words(node: onnx.NodeProto) -> int:
    if node.op_type in products.OPERATORS:
        return products.room_words(node.op_type, _attributes(node))
    return GROUP * math.prod(_attributes(node)["image_shape"][2:]) if node.op_type in WIDENED else 0


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
