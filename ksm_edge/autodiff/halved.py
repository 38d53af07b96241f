"""Less memory for a little error: what the forward pass keeps for the backward pass is kept in half precision.

A tensor is rounded behind the last operator of the forward pass that reads it, and widened again in front of the first
of the backward pass that does. So answers and loss are what they were, to the bit; gradients are made from what was
kept, of which a number errs by up to 2^-11 of itself, or 2^-25. One beyond 65504 becomes infinite, and so do gradients,
at which a training stops.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import onnx
from onnx import TensorProto, helper

from ksm_edge.autodiff.liveness import peak_bytes, with_shapes
from ksm_edge.autodiff.spec import HALF_SHARE

HALF, WIDENED = "~half", "~widened"  # behind the names of what is kept, and of what is read
LEAST_BYTES = 2**14  # less is not worth two operators
IMAGE_RANK = 4
FLOATS = (TensorProto.FLOAT, TensorProto.DOUBLE)


def taken_bytes(model: onnx.ModelProto) -> int:
    """What its tensors take at the worst moment, with gaps where some are kept in half precision."""
    return int(peak_bytes(model) * (HALF_SHARE if is_halved(model) else 1))


def is_halved(model: onnx.ModelProto) -> bool:
    return any(node.output[0].endswith(HALF) for node in model.graph.node if node.output)


def with_halves(model: onnx.ModelProto, forward: int) -> onnx.ModelProto:
    """The same in half precision if it then takes less."""
    return min(model, kept_in_half(model, forward), key=taken_bytes)


def kept_in_half(model: onnx.ModelProto, forward: int) -> onnx.ModelProto:
    """The gradient graph, of which the first `forward` nodes are the forward pass, that keeps its images in half."""
    nodes, large = list(model.graph.node), _large_images(model)
    made = {name for node in nodes[:forward] for name in node.output} & large.keys()
    last_read = {name: i for i, node in enumerate(nodes[:forward]) for name in (*node.output, *node.input)}
    first_read = {name: i for i in reversed(range(forward, len(nodes))) for name in nodes[i].input if name in made}
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:]
    for i, node in enumerate(nodes):
        wanted = [name for name in first_read if first_read[name] == i]
        done = [name for name in first_read if last_read[name] == i]
        result.graph.node.extend(_cast(name + HALF, name + WIDENED, large[name]) for name in wanted)
        result.graph.node.append(_reading_widened(node, first_read) if i >= forward else node)
        result.graph.node.extend(_cast(name, name + HALF, TensorProto.FLOAT16) for name in done)
    return result


def _large_images(model: onnx.ModelProto) -> dict[str, int]:
    """Kinds of number, by name, of the tensors (n, C, h, w) that are worth it."""
    found = {}
    for info in with_shapes(model).graph.value_info:
        kind, sides = info.type.tensor_type.elem_type, info.type.tensor_type.shape.dim
        if kind in FLOATS and len(sides) == IMAGE_RANK and 4 * math.prod(d.dim_value for d in sides) >= LEAST_BYTES:
            found[info.name] = kind
    return found


def _cast(x: str, y: str, kind: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [x], [y], name=f"Cast.{y}", to=kind)


def _reading_widened(node: onnx.NodeProto, kept: Collection[str]) -> onnx.NodeProto:
    twin = onnx.NodeProto()
    twin.CopyFrom(node)
    twin.input[:] = [name + WIDENED if name in kept else name for name in node.input]
    return twin
