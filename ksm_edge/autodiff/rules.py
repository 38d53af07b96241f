"""One rule per operator that is not a conv: its vector-Jacobian product.

A rule is called with the tape, the node and the gradient of the node's output, and leaves the gradients of the inputs
on the tape. What it reads of the forward pass is kept in memory until then, so rules read outputs that are alive
anyway (an activation's output is the next conv's input) rather than inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from ksm_edge.autodiff import windows
from ksm_edge.autodiff.graph import Node
from ksm_edge.autodiff.tape import Gradient, Tape
from ksm_edge.errors import UnsupportedError

Rule = Callable[[Tape, Node, Gradient], None]
SPATIAL = (2, 3)
BOOL, UINT8 = TensorProto.BOOL, TensorProto.UINT8


def relu(tape: Tape, node: Node, dy: Gradient) -> None:
    tape.add(node.inputs[0], gate(tape, _is_positive(tape, node.output), dy))


def clip(tape: Tape, node: Node, dy: Gradient) -> None:
    """Clip(min, max), ReLU6 being (0, 6): the gradient passes strictly between the bounds."""
    y, low, high = node.output, *node.inputs[1:3]
    above = _is_positive(tape, y) if not tape.emit.constants[low].any() else tape.emit("Greater", y, low)
    tape.add(node.inputs[0], gate(tape, tape.emit("And", above, tape.emit("Less", y, high)), dy))


def _is_positive(tape: Tape, y: str) -> str:
    """Bool tensor: y > 0, for y that is never negative; a cast takes two thirds of a comparison's time."""
    return tape.emit("Cast", y, to=BOOL)


def strictly_between(tape: Tape, x: str, low: str, high: str) -> str:
    """Bool tensor: low < x < high."""
    return tape.emit("And", tape.emit("Greater", x, low), tape.emit("Less", x, high))


def gate(tape: Tape, passed: str, dy: Gradient) -> str:
    """dy where `passed` (bool), 0 elsewhere, with dy's pending channel scale multiplied in by the same operator.

    DequantizeLinear of the mask, with the scale as its per-channel scale, is the cheapest way to a scaled mask that
    ONNX Runtime has: 1.4 ms where Where takes 8.8, in a study on one AMD Zen 5 core, 38.5 MB.
    """
    if dy.scale is None:
        mask = tape.emit("Cast", passed, to=helper.np_dtype_to_tensor_dtype(np.dtype(tape.emit.dtype)))
    else:
        mask = tape.emit("DequantizeLinear", tape.emit("Cast", passed, to=UINT8), dy.scale, axis=1)
    return tape.emit("Mul", mask, dy.name)


def sigmoid(tape: Tape, node: Node, dy: Gradient) -> None:
    y = node.output
    slope = tape.emit("Mul", y, tape.emit("Sub", tape.emit.constant(1.0), y))
    tape.add(node.inputs[0], tape.emit("Mul", tape.scaled(dy), slope))


def hard_sigmoid(tape: Tape, node: Node, dy: Gradient) -> None:
    zero, one = tape.emit.constant(0.0), tape.emit.constant(1.0)
    passed = gate(tape, strictly_between(tape, node.output, zero, one), Gradient(tape.scaled(dy)))
    slope = tape.emit.constant(node.attributes.get("alpha", 0.2))
    tape.add(node.inputs[0], tape.emit("Mul", passed, slope))


def hard_swish(tape: Tape, node: Node, dy: Gradient) -> None:
    """y = x h(x), h = clip(x / 6 + 1/2, 0, 1): dy (h + x / 6 where -3 < x < 3). Its output does not say what x was."""
    x = node.inputs[0]
    inside = strictly_between(tape, x, tape.emit.constant(-3.0), tape.emit.constant(3.0))
    sixth = tape.emit("DequantizeLinear", tape.emit("Cast", inside, to=UINT8), tape.emit.constant(1 / 6))
    h = tape.emit("HardSigmoid", x, alpha=1 / 6, beta=0.5)
    slope = tape.emit("Add", h, tape.emit("Mul", x, sixth))
    tape.add(x, tape.emit("Mul", tape.scaled(dy), slope))


def swish(tape: Tape, node: Node, dy: Gradient) -> None:
    """SiLU, y = x s, s = sigmoid(x): dy s (1 + x (1 - s)) = dy (s + y (1 - s)). s is computed again, not kept."""
    s = tape.emit("Sigmoid", node.inputs[0])
    rest = tape.emit("Mul", node.output, tape.emit("Sub", tape.emit.constant(1.0), s))
    tape.add(node.inputs[0], tape.emit("Mul", tape.scaled(dy), tape.emit("Add", s, rest)))


def add(tape: Tape, node: Node, dy: Gradient) -> None:
    whole = tape.whole(dy, node.output)
    for name in node.inputs:
        tape.add(name, _unbroadcast(tape, whole, node.output, name))


def mul(tape: Tape, node: Node, dy: Gradient) -> None:
    """Also squeeze-and-excite, (n, C, h, w) times (n, C, 1, 1)."""
    whole = tape.whole(dy, node.output)
    for name, other in (node.inputs, node.inputs[::-1]):
        if name in tape.wanted:
            tape.add(name, _unbroadcast(tape, tape.emit("Mul", whole, other), node.output, name))


def _unbroadcast(tape: Tape, gradient: str, output: str, name: str) -> str:
    """Sum a gradient of the output's shape over the axes along which the input `name` was broadcast."""
    if name not in tape.wanted:
        return gradient
    wide, narrow = tape.shapes[output], tape.shapes[name]
    axes = [axis for axis in range(len(narrow)) if narrow[axis] < wide[axis]]
    return tape.emit.sum(gradient, axes, keepdims=True) if axes else gradient


def concat(tape: Tape, node: Node, dy: Gradient) -> None:
    axis = node.attributes["axis"]
    sizes = tape.emit.shape([tape.shapes[name][axis] for name in node.inputs])
    names = [tape.emit.fresh(f"split{index}_") for index in range(len(node.inputs))]
    tape.emit.many("Split", tape.whole(dy, node.output), sizes, names=names, axis=axis)
    for name, part in zip(node.inputs, names, strict=True):
        tape.add(name, part)


def flatten(tape: Tape, node: Node, dy: Gradient) -> None:
    x = node.inputs[0]
    tape.add(x, tape.emit.reshape(tape.scaled(dy), tape.shapes[x]))


def global_average_pool(tape: Tape, node: Node, dy: Gradient) -> None:
    """Every pixel gets the same share: left to be broadcast by whoever takes it."""
    x = node.inputs[0]
    share = tape.emit.constant(1 / (tape.shapes[x][2] * tape.shapes[x][3]))
    tape.add(x, tape.emit("Mul", tape.scaled(dy), share), broadcast=True)


def average_pool(tape: Tape, node: Node, dy: Gradient) -> None:
    """The transpose of a depthwise conv with the constant 1 / (kh kw)."""
    x, (kh, kw) = node.inputs[0], node.attributes["kernel_shape"]
    pads, strides = node.attributes.get("pads", [0] * 4), node.attributes.get("strides", [1, 1])
    if (any(pads) and not node.attributes.get("count_include_pad")) or node.attributes.get("ceil_mode"):
        raise UnsupportedError(
            f"AveragePool {node.name}: its windows differ in size (padding left out of the count, or ceil_mode). "
            "Supported: no padding, or count_include_pad=1; export the network with one of these."
        )
    channels = tape.shapes[x][1]
    weight = tape.emit.constant(np.full((channels, 1, kh, kw), 1 / (kh * kw)))
    spread = transposed_conv(
        tape, tape.whole(dy, node.output), weight, x, node.output, (kh, kw), strides, pads, (1, 1), channels
    )
    tape.add(x, spread)


def transposed_conv(
    tape: Tape,
    dy: str,
    weight: str,
    x: str,
    y: str,
    kernel: Sequence[int],
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
    groups: int,
) -> str:
    """The input gradient of any conv x -> y, shaped like x. Pads are (top, left, bottom, right)."""
    # Rows of the image that no window reached come back as output_padding.
    missing = [
        tape.shapes[x][2 + a]
        - ((tape.shapes[y][2 + a] - 1) * strides[a] + dilations[a] * (kernel[a] - 1) + 1 - pads[a] - pads[a + 2])
        for a in (0, 1)
    ]
    geometry: dict[str, Any] = {
        "strides": list(strides),
        "pads": list(pads),
        "dilations": list(dilations),
        "kernel_shape": list(kernel),
    }
    return tape.emit("ConvTranspose", dy, weight, group=groups, output_padding=missing, **geometry)


def max_pool(tape: Tape, node: Node, dy: Gradient) -> None:
    """Each window's gradient goes to the element that won; the forward pass wrote down which (flat index).

    The operator of this project finds that again.
    """
    x, indices = node.inputs[0], node.outputs[1]
    shape = tape.shapes[x]
    if tape.own:
        shapes, gradient = (shape, tape.shapes[node.output]), tape.whole(dy, node.output)
        tape.add(x, windows.max_pool_gradient(tape.emit, gradient, x, shapes, node.attributes))
        return
    zero = numpy_helper.from_array(np.zeros(1, tape.emit.dtype))
    zeros = tape.emit("ConstantOfShape", tape.emit.shape([int(np.prod(shape))]), value=zero)
    flat = tape.emit.reshape(tape.whole(dy, node.output), [-1])
    where = tape.emit.reshape(indices, [-1])
    spread = tape.emit("ScatterElements", zeros, where, flat, axis=0, reduction="add")
    tape.add(x, tape.emit.reshape(spread, shape))


def slice_(tape: Tape, node: Node, dy: Gradient) -> None:
    """x[start:end:step] on some axes: the gradient goes back to where the elements were, with zeros between."""
    x = node.inputs[0]
    shape, out = tape.shapes[x], tape.shapes[node.output]
    starts, axes, steps = (tape.emit.constants[node.inputs[i]].tolist() for i in (1, 3, 4))
    gradient = tape.whole(dy, node.output)
    # (n, C, h, w) with step 2 on h: (n, C, h, 1, w, 1) padded to (n, C, h, 2, w, 1), then (n, C, 2h, w).
    step = [1] * len(shape)
    for axis, size in zip(axes, steps, strict=True):
        step[axis] = size
    if max(step) > 1:
        apart = [side for size in out for side in (size, 1)]
        after = [side for size in step for side in (0, size - 1)]
        gradient = tape.emit("Pad", tape.emit.reshape(gradient, apart), tape.emit.shape([0] * len(apart) + after))
        gradient = tape.emit.reshape(gradient, [size * by for size, by in zip(out, step, strict=True)])
    before, behind = [0] * len(shape), [size - o * s for size, o, s in zip(shape, out, step, strict=True)]
    for axis, start in zip(axes, starts, strict=True):
        before[axis] = start if start >= 0 else start + shape[axis]
        behind[axis] -= before[axis]
    # A negative pad crops: the last element's zeros may reach past the end.
    tape.add(x, tape.emit("Pad", gradient, tape.emit.shape(before + behind)))


def pad(tape: Tape, node: Node, dy: Gradient) -> None:
    x = node.inputs[0]
    pads = tape.emit.constants[node.inputs[1]].tolist()
    negative = tape.emit.shape([-p for p in pads])
    tape.add(x, tape.emit("Pad", tape.whole(dy, node.output), negative))


RULES: dict[str, Rule] = {
    "Add": add,
    "AveragePool": average_pool,
    "Clip": clip,
    "Concat": concat,
    "Flatten": flatten,
    "GlobalAveragePool": global_average_pool,
    "HardSigmoid": hard_sigmoid,
    "HardSwish": hard_swish,
    "MaxPool": max_pool,
    "Mul": mul,
    "Pad": pad,
    "Relu": relu,
    "Sigmoid": sigmoid,
    "Slice": slice_,
    "Swish": swish,
}
