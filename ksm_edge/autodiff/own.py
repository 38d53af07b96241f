"""Operators that standard ONNX has none of, compiled from `ksm_edge/_operators.c`: where they apply, and their nodes.

    Depthwise          x, W, scale, bias -> y: the conv, its mask's scale, its bias and the activation behind it
    DepthwiseGradient  dy, y, x, W, scale, two accumulators -> dx, these, sum dx: through the activation behind, the
                       conv and, where the conv is all that reads x, the activation in front of it
    Gate               dy, y -> dz, sum dz: through an activation

Each goes over memory once. What they save over standard operators is passes over memory, and the change into a blocked
layout and back around every depthwise conv. dx may take the memory of x, and dz that of dy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from ksm_edge.autodiff.graph import OWN, Emitter, Node, Shape
from ksm_edge.autodiff.tape import Tape
from ksm_edge.bundle.layers import Layer

MOST_TAPS, LONGEST_STRIDE = 49, 2  # of a kernel, as in _operators.c
# (input, output): where nobody reads the first later, ONNX Runtime gives its memory to the second.
IN_PLACE = {"DepthwiseGradient": (2, 0), "Gate": (0, 0)}
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
    x: Shape
    y: Shape
    before: Node | None = None
    behind: Node | None = None
    before_bounds: Bounds = EVERYTHING
    behind_bounds: Bounds = EVERYTHING

    @property
    def output(self) -> str:
        return (self.behind or self.node).output

    @property
    def attributes(self) -> dict[str, Any]:
        get = self.node.attributes.get
        return {
            "image_shape": list(self.x),
            "output_shape": list(self.y),
            "kernel_shape": list(self.layer.weight_shape[2:]),
            "strides": get("strides", [1, 1]),
            "pads": get("pads", [0] * 4),
            **dict(zip(("input_low", "input_high"), self.before_bounds, strict=True)),
            **dict(zip(("low", "high"), self.behind_bounds, strict=True)),
        }

    def forward(self, emit: Emitter) -> None:
        parameters = (f"{self.layer.name}.{part}" for part in ("weight", "scale", "bias"))
        emit("Depthwise", self.node.inputs[0], *parameters, name=self.output, domain=OWN, **self.attributes)

    def backward(self, tape: Tape, dy: str) -> None:
        """From the gradient behind the activation behind to the one in front of the activation in front."""
        emit, name, x, C = tape.emit, self.layer.name, self.node.inputs[0], self.x[1]
        y = self.output if self.behind else dy  # there is nothing to pass
        sums = {part: emit.output(f"{name}.{part}", (C,)) for part in ("product", "dbias")}
        before = [emit.input(f"acc:{total}", (C,)) for total in sums.values()]
        dx, dx_sum = emit.fresh("dx"), emit.fresh("dx_sum")
        given = [dy, y, x, f"{name}.weight", f"{name}.scale", *before]
        made = [dx, *sums.values(), dx_sum]
        emit.many("DepthwiseGradient", *given, names=made, domain=OWN, **self.attributes)
        tape.sums[dx] = dx_sum
        tape.add(x, dx)


def can_do(node: Node, layer: Layer) -> bool:
    """Whether the operators can do this depthwise conv."""
    _, _, kh, kw = layer.weight_shape
    strides, dilations = (node.attributes.get(name, [1, 1]) for name in ("strides", "dilations"))
    top, left, bottom, right = node.attributes.get("pads", [0] * 4)
    padded = 0 <= min(top, bottom) <= max(top, bottom) < kh and 0 <= min(left, right) <= max(left, right) < kw
    return padded and kh * kw <= MOST_TAPS and max(strides) <= LONGEST_STRIDE and max(dilations) == 1


def depthwise(
    node: Node, layer: Layer, nodes: Sequence[Node], shapes: Mapping[str, Shape], constants: Mapping[str, np.ndarray]
) -> Depthwise:
    """This conv with the activations around it that nothing else reads in between."""
    x, y = node.inputs[0], node.output
    found: dict[str, Any] = {}
    readers = {name: [other for other in nodes if name in other.inputs] for name in (x, y)}
    makers = [other for other in nodes if x in other.outputs]
    around = {"before": makers if readers[x] == [node] else [], "behind": readers[y] if len(readers[y]) == 1 else []}
    for where, others in around.items():
        if others and (bounds := bounds_of(others[0], constants)) is not None:
            found |= {where: others[0], f"{where}_bounds": bounds}
    return Depthwise(node, layer, shapes[x], shapes[y], **found)


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
    """Write down the shapes of what these operators make, which no shape inference knows."""
    graph = model.graph
    known = {value.name for value in (*graph.input, *graph.output, *graph.value_info)}
    kind = next((value.type.tensor_type.elem_type for value in graph.input), onnx.TensorProto.FLOAT)
    for node in graph.node:
        if node.domain != OWN:
            continue
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        whole = attributes["output_shape" if node.op_type == "Depthwise" else "image_shape"]
        for place, name in enumerate(node.output):
            if name not in known:
                shape = whole if place == 0 else whole[1:2]
                graph.value_info.append(onnx.helper.make_tensor_value_info(name, kind, shape))
