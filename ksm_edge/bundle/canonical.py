"""One operator after another, rewritten into the few forms a frozen graph may hold.

A frozen graph is what the runtimes and the gradient graph are built for: Conv with an explicit bias and explicit
pads, a handful of activations, pools and joins, all weights outside. `REWRITES` maps each operator that may come in
to the function that writes it down; whatever is not there is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx

from ksm_edge.bundle.incoming import Incoming, Node
from ksm_edge.errors import UnsupportedError

ADVICE = "Replace it in the network and export again, or end the backbone before it with --features NODE"
OF_CONSTANTS = (
    "where only image-dependent tensors are supported; if it normalises the image, leave it out and say so with --mean "
    "and --std. Else: " + ADVICE
)
NO_BORDER = (0, 0, 0, 0)  # top, left, bottom, right


@dataclass(frozen=True)
class Value:
    """A tensor of the frozen graph."""

    name: str
    kind: str  # "map" (N, C, H, W), "pooled" (N, C, 1, 1) or "vector" (N, C)
    channels: int
    border: tuple[int, ...] = NO_BORDER  # zeros around it that a Conv adds by itself: the tensor comes without


@dataclass
class Draft:
    """A frozen graph while it is written."""

    source: Incoming
    uses: Mapping[str, int]  # how many nodes read an incoming tensor
    flat_length: int | None  # values per image the Linear behind the features takes
    values: dict[str, Value] = field(default_factory=dict)  # by incoming name
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    bordered: dict[Value, Value] = field(default_factory=dict)  # with their border in the tensor

    def emit(self, op: str, inputs: list[str], kind: str, channels: int, **attributes: Any) -> Value:
        """Append a node named after its operator, such as relu:3, and give the tensor it makes."""
        name = self.next_name(op)
        self.counts[op] = self.counts.get(op, 0) + 1
        self.nodes.append(onnx.helper.make_node(op, inputs, [f"{name}.out"], name=name, **attributes))
        return Value(f"{name}.out", kind, channels)

    def inline(self, name: str, array: np.ndarray) -> str:
        """Keep a small constant inside the graph."""
        self.initializers.append(onnx.numpy_helper.from_array(array, name))
        return name

    def next_name(self, op: str) -> str:
        """What `emit` will call the next node of this operator. No layer's name holds a colon."""
        return f"{op.lower()}:{self.counts.get(op, 0) + 1}"

    def value(self, node: Node, index: int = 0) -> Value:
        """The tensor behind an input; raises UnsupportedError for a constant, which no canonical form takes."""
        self.bare_value(node, index)
        return self.whole(node.input(index))

    def whole(self, name: str) -> Value:
        """The tensor that an incoming name stands for, with its border in it."""
        value = self.values[name]
        if value.border == NO_BORDER:
            return value
        if value not in self.bordered:
            self.bordered[value] = _emit_pad(self, value, _on_pixels(value.border))
        return self.bordered[value]

    def bare_value(self, node: Node, index: int = 0) -> Value:
        """As `value`, its border left to who asks."""
        name = node.input(index)
        if name in self.values:
            return self.values[name]
        if name in self.source.declared:
            raise UnsupportedError(f"{node.label} takes the graph's input {name!r}; a backbone has one, the image")
        raise UnsupportedError(f"{node.label} takes the constant {name!r} {OF_CONSTANTS}")

    def static(self, node: Node, index: int, attribute: str) -> np.ndarray | None:
        """A setting that is an attribute in old opsets and an input in new ones; None where it is left out."""
        if attribute in node.attributes:
            return np.asarray(node.attributes[attribute])
        name = node.input(index)
        if not name:
            return None
        if name not in self.source.constants:
            raise UnsupportedError(f"{node.label}: {attribute} is computed from the image's size; make it a constant")
        return self.source.constants[name]


def canonicalise(draft: Draft, node: Node) -> None:
    """Write `node` into the draft; raises UnsupportedError naming it where its operator or form is not supported."""
    rewrite = REWRITES.get(node.op)
    if rewrite is None:
        constants = [name for name in node.inputs if name in draft.source.constants]
        if constants and node.op in ("Sub", "Div"):
            raise UnsupportedError(
                f"{node.label}: {node.op} is not supported. It takes the constant {constants[0]!r} {OF_CONSTANTS}"
            )
        raise UnsupportedError(f"{node.label}: {node.op} is not supported; supported are {_supported()}. {ADVICE}")
    draft.values[node.outputs[0]] = rewrite(draft, node)


def _supported() -> str:
    return ", ".join(sorted({*REWRITES, "Conv", "BatchNormalization", "Dropout", "Identity"}))


def pool(draft: Draft, value: Value) -> Value:
    """A map's mean over its pixels, (N, C, 1, 1)."""
    return draft.emit("GlobalAveragePool", [value.name], "pooled", value.channels)


def flatten(draft: Draft, value: Value) -> Value:
    """Pooled features as (N, C)."""
    return draft.emit("Flatten", [value.name], "vector", value.channels, axis=1)


def _refuse(node: Node, why: str) -> UnsupportedError:
    return UnsupportedError(f"{node.label}: {why}. {ADVICE}")


def _elementwise(draft: Draft, node: Node) -> Value:
    x = draft.value(node)
    attributes = {"HardSigmoid": {"alpha": 0.2, "beta": 0.5} | dict(node.attributes)}.get(node.op, {})
    return draft.emit(node.op, [x.name], x.kind, x.channels, **attributes)


def _clip(draft: Draft, node: Node) -> Value:
    x = draft.value(node)
    low, high = _number(draft, node, 1, "min"), _number(draft, node, 2, "max")
    if low == 0 and (high is None or high > 1e30):
        return draft.emit("Relu", [x.name], x.kind, x.channels)
    limits = np.finfo(np.float32)
    name = draft.next_name("Clip")
    ends = [
        draft.inline(f"{name}.{end}", np.array(default if given is None else given, np.float32))
        for end, given, default in (("min", low, limits.min), ("max", high, limits.max))
    ]
    return draft.emit("Clip", [x.name, *ends], x.kind, x.channels)


def _number(draft: Draft, node: Node, index: int, attribute: str) -> float | None:
    """A setting that is a number, of whatever shape: exporters write scalars as (1,) too. None where it is left out."""
    setting = draft.static(node, index, attribute)
    if setting is not None and setting.size != 1:
        raise _refuse(node, f"its {attribute} has {setting.size} elements; one is supported")
    return None if setting is None else float(setting.item())


def _add(draft: Draft, node: Node) -> Value:
    if len(node.inputs) != 2:
        raise _refuse(node, f"it adds {len(node.inputs)} tensors; 2 are supported")
    a, b = draft.value(node, 0), draft.value(node, 1)
    if (a.kind, a.channels) != (b.kind, b.channels):
        raise _refuse(node, "it adds tensors of different shapes")
    return draft.emit("Add", [a.name, b.name], a.kind, a.channels)


def _mul(draft: Draft, node: Node) -> Value:
    """A product of equals, or of a map and one factor per channel (squeeze-and-excite)."""
    a, b = draft.value(node, 0), draft.value(node, 1)
    kinds = {a.kind, b.kind}
    if a.channels != b.channels or (len(kinds) > 1 and kinds != {"map", "pooled"}):
        raise _refuse(node, "it multiplies tensors whose shapes neither agree nor give one factor per channel")
    return draft.emit("Mul", [a.name, b.name], "map" if "map" in kinds else a.kind, a.channels)


def _concat(draft: Draft, node: Node) -> Value:
    parts = [draft.value(node, index) for index in range(len(node.inputs))]
    if node.attributes["axis"] not in (1, -3) or len({part.kind for part in parts}) != 1 or parts[0].kind == "vector":
        raise _refuse(node, "only feature maps joined along their channels are supported")
    channels = sum(part.channels for part in parts)
    return draft.emit("Concat", [part.name for part in parts], parts[0].kind, channels, axis=1)


def _window_pool(draft: Draft, node: Node) -> Value:
    x = draft.value(node)
    if any(draft.uses.get(name) for name in node.outputs[1:]):
        raise _refuse(node, "its Indices output is used")
    known = ("kernel_shape", "strides", "pads", "dilations", "ceil_mode", "count_include_pad")
    attributes = {name: node.attributes[name] for name in known if name in node.attributes}
    attributes = {"strides": [1, 1], "pads": [0, 0, 0, 0]} | attributes
    if len(attributes["kernel_shape"]) != 2 or node.attributes.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise _refuse(node, "only 2-D windows with explicit pads are supported")
    if node.op == "MaxPool" and attributes.get("ceil_mode") and _may_begin_outside(attributes):
        raise _refuse(node, "with ceil_mode, and strides and pads larger than its kernel, a window may lie outside")
    if node.op == "AveragePool":
        uneven = any(attributes["pads"]) and not attributes.get("count_include_pad")
        if uneven or attributes.get("ceil_mode"):
            raise _refuse(node, "its windows differ in size: no padding, or count_include_pad=1, is supported")
        if set(attributes.pop("dilations", [1, 1])) != {1}:  # this graph's opset has none
            raise _refuse(node, "dilated windows are not supported")
    return draft.emit(node.op, [x.name], "map", x.channels, **attributes)


def _may_begin_outside(window: Mapping[str, Any]) -> bool:
    """Whether, rounding up, the last window would begin behind the image, where runtimes leave it out.

    onnx's shape inference counts it all the same, and so nobody knows how large the map is.
    """
    sides = zip(
        window["kernel_shape"], window.get("dilations", [1, 1]), window["strides"], window["pads"][2:], strict=True
    )
    return any(stride + behind > (k - 1) * dilation + 1 for k, dilation, stride, behind in sides)


def _global_pool(draft: Draft, node: Node) -> Value:
    return pool(draft, draft.value(node))


def _reduce_mean(draft: Draft, node: Node) -> Value:
    x = draft.value(node)
    axes = draft.static(node, 1, "axes")
    if x.kind == "vector" or axes is None or sorted(int(axis) % 4 for axis in axes) != [2, 3]:
        raise _refuse(node, "only the mean over height and width is supported")
    pooled = pool(draft, x)
    return pooled if node.attributes.get("keepdims", 1) else flatten(draft, pooled)


def _flatten(draft: Draft, node: Node) -> Value:
    """Flatten, Reshape or Squeeze of pooled features. A map is pooled first where that cannot change its length."""
    x = draft.value(node)
    if node.op == "Reshape" and _target_axes(draft, node) not in (2, None):
        raise _refuse(node, "only a Reshape of pooled features to (N, C) is supported")
    if x.kind == "map" and x.channels == draft.flat_length:
        x = pool(draft, x)  # as many values as channels: the map is 1 x 1 at the size the net was made for
    if x.kind == "map":
        raise UnsupportedError(
            f"{node.label} flattens a feature map that is not pooled, so its length depends on the image's size; "
            f"end the backbone at the map with --features {node.inputs[0]!r}: its mean over the pixels is then taken"
        )
    return x if x.kind == "vector" else flatten(draft, x)


def _target_axes(draft: Draft, node: Node) -> int | None:
    """How many axes a Reshape makes; None where that is not told by a constant, or by what it is joined from."""
    name, constants = node.input(1), draft.source.constants
    if name in constants:
        return constants[name].size
    joined = next((other for other in draft.source.nodes if name in other.outputs), None)
    if joined is None or joined.op != "Concat":
        return None
    return sum(constants[part].size if part in constants else 1 for part in joined.inputs)  # 1: the number of images


def _slice(draft: Draft, node: Node) -> Value:
    x = draft.value(node)
    starts, ends = draft.static(node, 1, "starts"), draft.static(node, 2, "ends")
    axes, steps = draft.static(node, 3, "axes"), draft.static(node, 4, "steps")
    if starts is None or ends is None or x.kind != "map":
        raise _refuse(node, "only a Slice of a feature map with constant starts and ends is supported")
    axes = np.arange(len(starts)) if axes is None else np.asarray(axes) % 4
    steps = np.ones(len(starts)) if steps is None else steps
    if (np.asarray(steps) < 1).any() or 0 in axes:
        raise _refuse(node, "only positive steps, and none over the images, are supported")
    channels = x.channels
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if axis == 1:
            channels = len(range(*slice(int(start), int(end), int(step)).indices(channels)))
    name = draft.next_name("Slice")
    settings = zip(("starts", "ends", "axes", "steps"), (starts, ends, axes, steps), strict=True)
    inputs = [draft.inline(f"{name}.{key}", np.asarray(array, np.int64)) for key, array in settings]
    return draft.emit("Slice", [x.name, *inputs], "map", channels)


def _pad(draft: Draft, node: Node) -> Value:
    x = draft.bare_value(node)
    pads, fill, axes = draft.static(node, 1, "pads"), _number(draft, node, 2, "value"), draft.static(node, 3, "axes")
    if node.attributes.get("mode", "constant") != "constant" or pads is None or fill not in (0, None):
        raise _refuse(node, "only padding with the constant 0 is supported")
    whole = np.zeros((2, 4), np.int64)
    whole[:, slice(None) if axes is None else np.asarray(axes) % 4] = np.asarray(pads).reshape(2, -1)
    if x.kind == "vector" or whole.min() < 0 or whole[:, 0].any():
        raise _refuse(node, "only padding of channels and pixels by no less than 0 is supported")
    if not whole.any():
        return x
    whole += _on_pixels(x.border)
    if whole[:, 1].any():
        return _emit_pad(draft, x, whole)
    return replace(x, kind="map", border=tuple(int(pad) for pad in whole[:, 2:].ravel()))


def _on_pixels(border: tuple[int, ...]) -> np.ndarray:
    """Pads (2, 4), in front and behind, of (N, C, H, W)."""
    pads = np.zeros((2, 4), np.int64)
    pads[:, 2:] = np.reshape(border, (2, 2))
    return pads


def _emit_pad(draft: Draft, x: Value, pads: np.ndarray) -> Value:
    """`x` without its border, and with these pads (2, 4)."""
    name = draft.next_name("Pad")
    settings = [draft.inline(f"{name}.pads", pads.ravel()), draft.inline(f"{name}.fill", np.array(0, np.float32))]
    return draft.emit("Pad", [x.name, *settings], "map", x.channels + int(pads[:, 1].sum()), mode="constant")


REWRITES: dict[str, Callable[[Draft, Node], Value]] = {
    "Add": _add,
    "AveragePool": _window_pool,
    "Clip": _clip,
    "Concat": _concat,
    "Flatten": _flatten,
    "GlobalAveragePool": _global_pool,
    "HardSigmoid": _elementwise,
    "HardSwish": _elementwise,
    "MaxPool": _window_pool,
    "Mul": _mul,
    "Pad": _pad,
    "ReduceMean": _reduce_mean,
    "Relu": _elementwise,
    "Reshape": _flatten,
    "Sigmoid": _elementwise,
    "Slice": _slice,
    "Squeeze": _flatten,
    "Sum": _add,
}
