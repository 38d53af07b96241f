"""What a graph asks of a processor: arithmetic and bytes, operator by operator.

Counted from shapes alone, as an engine that fuses activations into the conv in front of them runs it. A multiplication
and its addition are two operations. Bytes are those of every tensor that is read or written, once for each operator:
what a cache saves is not counted, nor what an engine copies on its own account.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ksm_edge.autodiff import products
from ksm_edge.autodiff.graph import OWN
from ksm_edge.autodiff.liveness import with_shapes

if TYPE_CHECKING:
    import onnx

FLOAT_BYTES = 4
VIEWS = frozenset({"Reshape", "Unsqueeze", "Flatten", "Identity", "Constant", "Shape", "Squeeze"})
# Engines run these as part of the conv in front of them, batch-norm with frozen statistics included.
FUSED_BEHIND_CONV = frozenset({"Relu", "Clip", "HardSigmoid", "Sigmoid", "HardSwish", "BatchNormalization"})
CONVS = frozenset({"Conv", "FusedConv", "ConvTranspose"})
PRODUCTS = frozenset({"MatMul", "FusedMatMul", "Gemm"})


@dataclass(frozen=True)
class Work:
    """One operator's."""

    name: str
    operator: str  # as ONNX calls it
    kind: str  # what decides how near to its peak a processor runs it: one of KINDS
    flops: float
    bytes: float


# Convs of k x k, of 1 x 1 and other matrix products, convs of one channel each, and what only moves data.
KINDS = ("dense", "pointwise", "depthwise", "memory")


def graph_work(model: onnx.ModelProto | Path, size: int, *, eager: bool = False) -> list[Work]:
    """Of every operator that costs something, in the graph's order; weights may be absent.

    `size`: pixels of an image's side; where the graph leaves open how many images there are, it is one. `eager`: as a
    framework runs it that fuses nothing, with a batch-norm behind every conv.
    """
    import onnx

    if isinstance(model, Path):
        model = onnx.load(model, load_external_data=False)
    tensors = _tensors(model, size)
    shapes = {name: shape for name, (shape, _) in tensors.items()}
    behind_conv = frozenset() if eager else _fused(model)
    found = []
    for node in model.graph.node:
        if node.op_type in VIEWS or node.output[0] in behind_conv:
            continue
        named = [tensors[name] for name in (*node.input, *node.output) if name in tensors]
        moved = sum(_size(shape) * item for shape, item in named)
        kind, flops = _arithmetic(node, shapes)
        name = node.name or node.output[0]
        found.append(Work(name, node.op_type, kind, flops, float(moved)))
        if eager and node.op_type == "Conv":
            written = _size(shapes[node.output[0]])
            norm = Work(f"{name}.norm", "BatchNormalization", "memory", 2.0 * written, 2 * FLOAT_BYTES * written)
            found.append(norm)
    return found


def linear_work(name: str, inputs: int, outputs: int) -> Work:
    """Of a linear layer for one image, such as a head: its weights are read once and used once."""
    return Work(name, "Gemm", "memory", 2.0 * inputs * outputs, FLOAT_BYTES * (inputs * outputs + inputs + outputs))


def _arithmetic(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, float]:
    """The operator's kind and operations."""
    if node.op_type in CONVS:
        attributes = _attributes(node)
        weight = shapes[node.input[1]]
        moved = shapes[node.output[0] if node.op_type != "ConvTranspose" else node.input[0]]
        taps = math.prod(weight[2:])
        kind = "dense" if taps > 1 else "pointwise"
        if attributes.get("group", 1) > 1 and weight[1] == 1:
            kind = "depthwise"
        return kind, 2.0 * _size(moved) * weight[1] * taps
    if node.op_type in PRODUCTS:
        attributes = _attributes(node)
        left = shapes[node.input[0]]
        inner = left[-2] if attributes.get("transA", 0) else left[-1]
        return "pointwise", 2.0 * _size(shapes[node.output[0]]) * inner
    if node.op_type in products.OPERATORS:
        return "pointwise", products.operations(_attributes(node))
    if node.domain == OWN and "Depthwise" in node.op_type:
        return _depthwise(node)
    return "memory", float(_size(shapes.get(node.output[0], ())))


def _depthwise(node: onnx.NodeProto) -> tuple[str, float]:
    """Of `autodiff.own`: a gradient is one conv, and one more where its result is made again; with a 1x1 conv in front
    that is made again, and has two products.
    """
    attributes = _attributes(node)
    (n, inside, H, W), (_, C, h, w) = attributes["image_shape"], attributes["output_shape"]
    wide, backward = node.op_type.startswith("Widened"), node.op_type.endswith("Gradient")
    again = backward and attributes["kind"][0] > 0
    flops = 2.0 * n * C * h * w * math.prod(attributes["kernel_shape"]) * (2 if again else 1)
    if not wide:
        return "depthwise", flops
    return "pointwise", flops + 2.0 * n * C * inside * H * W * (3 if backward else 1)


def _fused(model: onnx.ModelProto) -> frozenset[str]:
    """Outputs that the conv in front of them writes."""
    uses: dict[str, int] = {}
    for node in model.graph.node:
        for name in node.input:
            uses[name] = uses.get(name, 0) + 1
    by_conv: set[str] = set()
    found: set[str] = set()
    for node in model.graph.node:
        if node.op_type in CONVS:
            by_conv.add(node.output[0])
        elif node.op_type in FUSED_BEHIND_CONV and node.input[0] in by_conv and uses[node.input[0]] == 1:
            by_conv.add(node.output[0])
            found.add(node.output[0])
    return frozenset(found)


def _tensors(model: onnx.ModelProto, size: int) -> dict[str, tuple[tuple[int, ...], int]]:
    """Shape and bytes of an element of every tensor."""
    import onnx

    sized = onnx.ModelProto()
    sized.CopyFrom(model)
    del sized.graph.value_info[:]
    for value in (*sized.graph.input, *sized.graph.output):
        for place, side in enumerate(value.type.tensor_type.shape.dim):
            side.dim_value = side.dim_value or (size if place > 1 else 1)
    inferred = with_shapes(sized).graph
    found: dict[str, tuple[tuple[int, ...], int]] = {}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        shape = tuple(side.dim_value for side in value.type.tensor_type.shape.dim)
        found[value.name] = shape, _item_bytes(value.type.tensor_type.elem_type)
    for tensor in inferred.initializer:
        found[tensor.name] = tuple(tensor.dims), _item_bytes(tensor.data_type)
    return found


def _item_bytes(element: int) -> int:
    import onnx

    return int(onnx.helper.tensor_dtype_to_np_dtype(element).itemsize) if element else FLOAT_BYTES


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    import onnx

    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape)) if shape else 1
