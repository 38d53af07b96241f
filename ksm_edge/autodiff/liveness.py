"""How much memory the tensors of a gradient graph take at the worst moment, when each is freed after its last use."""

from __future__ import annotations

import numpy as np
import onnx

from ksm_edge.autodiff.own import IN_PLACE, declare_shapes

# Their output is the same memory as their input.
VIEWS = frozenset({"Reshape", "Unsqueeze", "Flatten"})
# ONNX Runtime runs these as part of the conv in front of them.
FUSED_BEHIND_CONV = frozenset({"Relu", "Clip", "HardSigmoid", "Sigmoid"})


def peak_bytes(model: onnx.ModelProto) -> int:
    """Largest sum of tensors alive at once, in the order of the nodes; inputs, outputs and constants not counted."""
    nodes = list(model.graph.node)
    shapes = tensor_shapes(model)
    sizes = {name: item * int(np.prod(shape)) for name, (shape, item) in shapes.items()}
    owner = _owners(nodes)
    given = {x.name for x in (*model.graph.input, *model.graph.initializer, *model.graph.output)}
    # What nobody reads ONNX Runtime holds until the end.
    last = {owner.get(name, name): i for i, node in enumerate(nodes) for name in node.input}
    freed: list[list[str]] = [[] for _ in nodes]
    for name, i in last.items():
        freed[i].append(name)
    alive = peak = 0
    held: dict[str, int] = {}
    for i, node in enumerate(nodes):
        for name in node.output:
            if owner.get(name, name) == name and name not in given:
                held[name] = sizes.get(name, 0)
                alive += held[name]
        peak = max(peak, alive + _workspace_bytes(node, shapes))
        for name in freed[i]:
            alive -= held.pop(name, 0)
    return peak


def _owners(nodes: list[onnx.NodeProto]) -> dict[str, str]:
    """Tensors that are other names of the same memory: views, a conv's output in front of its activation, and what is
    written over what it was made from.
    """
    readers: dict[str, list[int]] = {}
    for i, node in enumerate(nodes):
        for name in node.input:
            readers.setdefault(name, []).append(i)
    producer = {name: node.op_type for node in nodes for name in node.output}
    owner: dict[str, str] = {}
    names: dict[str, list[str]] = {}  # of the same memory

    def share(x: str, y: str) -> None:
        owner[y] = owner.get(x, x)
        names.setdefault(owner[y], [owner[y]]).append(y)

    for i, node in enumerate(nodes):
        x = node.input[0] if node.input else ""
        fused = node.op_type in FUSED_BEHIND_CONV and producer.get(x) == "Conv" and len(readers[x]) == 1
        if node.op_type in VIEWS or fused:
            share(x, node.output[0])
        elif node.op_type in IN_PLACE:
            x, y = node.input[IN_PLACE[node.op_type][0]], node.output[IN_PLACE[node.op_type][1]]
            alike = names.get(owner.get(x, x), [x])
            if all(name in producer and max(readers.get(name, [i])) <= i for name in alike):
                share(x, y)
    return owner


def _workspace_bytes(node: onnx.NodeProto, shapes: dict[str, tuple[tuple[int, ...], int]]) -> int:
    """What an operator takes for itself while it runs: ONNX Runtime's ConvTranspose the columns of one image."""
    if node.op_type != "ConvTranspose":
        return 0
    (_, _, h, w), item = shapes[node.input[0]]
    _, O, kh, kw = shapes[node.input[1]][0]
    return O * kh * kw * h * w * item


def tensor_bytes(model: onnx.ModelProto) -> dict[str, int]:
    """Of every tensor, by name; ValueError where a shape cannot be inferred."""
    return {name: item * int(np.prod(shape)) for name, (shape, item) in tensor_shapes(model).items()}


def tensor_shapes(model: onnx.ModelProto) -> dict[str, tuple[tuple[int, ...], int]]:
    """Shape and bytes of an element of every tensor; ValueError where one that a node makes cannot be inferred."""
    inferred = with_shapes(model).graph
    found = {}
    for info in (*inferred.input, *inferred.value_info, *inferred.output):
        tensor = info.type.tensor_type
        if tensor.elem_type and tensor.HasField("shape"):
            item = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).itemsize
            found[info.name] = tuple(side.dim_value for side in tensor.shape.dim), item
    for constant in inferred.initializer:
        found[constant.name] = tuple(constant.dims), onnx.helper.tensor_dtype_to_np_dtype(constant.data_type).itemsize
    if unknown := [name for node in model.graph.node for name in node.output if name and name not in found]:
        raise ValueError(f"no shape is known of {', '.join(unknown[:3])}")
    return found


def with_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the shape of every tensor; operators that onnx does not know come out as ones that it does."""
    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    declare_shapes(plain)
    matrices = {value.name for value in model.graph.input if len(value.type.tensor_type.shape.dim) == 2}
    matrices |= {tensor.name for tensor in model.graph.initializer if len(tensor.dims) == 2}
    del plain.graph.node[:]
    plain.graph.node.extend(part for node in model.graph.node for part in _of_standard_operators(node, matrices))
    return onnx.shape_inference.infer_shapes(plain)


def _of_standard_operators(node: onnx.NodeProto, matrices: set[str]) -> list[onnx.NodeProto]:
    if node.op_type != "FusedMatMul":
        return [node]
    turned = {a.name for a in node.attribute if a.name in ("transA", "transB") and a.i}
    left, right = node.input
    if turned == {"transA"} and left in matrices:  # the other factor may have more dimensions
        matrix = onnx.helper.make_node("Transpose", [left], [f"{node.output[0]}.turned"])
        return [matrix, onnx.helper.make_node("MatMul", [matrix.output[0], right], node.output)]
    letters = ("ki" if "transA" in turned else "ik"), ("jk" if "transB" in turned else "kj")
    return [onnx.helper.make_node("Einsum", node.input, node.output, equation="...{},...{}->...ij".format(*letters))]
