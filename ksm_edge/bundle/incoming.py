"""An ONNX graph as it comes in, read into plain records: constants folded, Identity and Dropout gone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from ksm_edge.errors import UsageError

Shape = tuple[int, ...]

# What does nothing in inference: their first output is their first input.
_ALIASES = frozenset({"Identity", "Dropout"})

# What may be computed ahead when its inputs are known: no operator that draws random numbers or holds a graph.
_FOLDABLE = frozenset(
    {"Constant", "ConstantOfShape", "Shape", "Gather", "Concat", "Slice", "Squeeze", "Unsqueeze", "Reshape"}
    | {"Transpose", "Cast", "Range", "Expand", "Add", "Sub", "Mul", "Div", "Neg", "Sqrt", "Reciprocal", "Pow"}
    | {"ReduceMean", "ReduceSum", "ReduceProd"}
)


@dataclass(frozen=True)
class Node:
    """One node: `inputs` may hold "" for an optional input left out, as in ONNX."""

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]

    @property
    def label(self) -> str:
        """How messages name the node."""
        return f"node {self.name or self.outputs[0]!r} ({self.op})"

    def input(self, index: int) -> str:
        """The input's name, or "" where it is left out."""
        return self.inputs[index] if index < len(self.inputs) else ""


@dataclass(frozen=True)
class Incoming:
    """A graph with one image input; `static` names everything that does not depend on the image."""

    nodes: tuple[Node, ...]  # topological order
    constants: Mapping[str, np.ndarray]
    declared: Mapping[str, Shape]  # parameters a weightless graph asks for, name to shape
    image: str
    outputs: tuple[str, ...]
    static: frozenset[str]
    renamed: Mapping[str, str]  # outputs of nodes that were left out, and what stands in their place


def read_graph(model: onnx.ModelProto, tensors: Mapping[str, np.ndarray]) -> Incoming:
    """Read `model`; its parameters are initializers of its own or graph inputs found in `tensors` by name.

    Raises UsageError where there is not exactly one input that is no parameter.
    """
    graph = model.graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    free = {value.name: value for value in graph.input if value.name not in constants}
    images = [name for name, value in free.items() if _is_image(value)]
    if len(images) != 1:
        raise UsageError(
            f"the graph has {len(images)} inputs of the shape (N, 3, H, W) ({', '.join(images) or 'of '}"
            f"{'' if images else ', '.join(free) or 'none'}); a backbone has exactly one, the image"
        )
    declared = {name: _shape(value) for name, value in free.items() if name != images[0]}
    constants |= {name: np.asarray(tensors[name]) for name in declared if name in tensors}
    nodes, renamed = _without_aliases(_read_node(node) for node in graph.node)
    nodes, constants = _fold(nodes, constants, _opset(model))
    return Incoming(
        tuple(nodes),
        constants,
        declared,
        images[0],
        tuple(value.name for value in graph.output),
        _static(nodes, {*constants, *declared}),
        renamed,
    )


def _is_image(value: onnx.ValueInfoProto) -> bool:
    """A weightless graph asks for conv weights (O, 3, kh, kw) as well: those bear a state dict's names."""
    dims = value.type.tensor_type.shape.dim
    if len(dims) != 4 or dims[1].dim_value not in (0, 3):
        return False
    return not value.name.endswith(".weight")


def _shape(value: onnx.ValueInfoProto) -> Shape:
    return tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)


def _read_node(node: onnx.NodeProto) -> Node:
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    attributes = {name: value.decode() if isinstance(value, bytes) else value for name, value in attributes.items()}
    op = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
    return Node(node.name, op, tuple(node.input), tuple(node.output), attributes)


def _without_aliases(nodes: Iterable[Node]) -> tuple[list[Node], dict[str, str]]:
    """Leave out nodes that hand their input on, and name that input wherever their output was named."""
    renamed: dict[str, str] = {}
    kept = []
    for node in nodes:
        node = replace(node, inputs=tuple(renamed.get(name, name) for name in node.inputs))
        if node.op in _ALIASES:
            renamed[node.outputs[0]] = renamed[node.name or node.outputs[0]] = node.inputs[0]
        else:
            kept.append(node)
    return kept, renamed


def _opset(model: onnx.ModelProto) -> int:
    return next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 17)


def _fold(nodes: list[Node], constants: dict[str, np.ndarray], opset: int) -> tuple[list[Node], dict[str, np.ndarray]]:
    """Compute every node whose inputs are all known: Constant nodes, and chains that make shapes or weights."""
    constants = dict(constants)
    kept = []
    for node in nodes:
        inputs = [name for name in node.inputs if name]
        if node.op in _FOLDABLE and all(name in constants for name in inputs):
            constants.update(_compute(node, {name: constants[name] for name in inputs}, opset))
        else:
            kept.append(node)
    return kept, constants


def _compute(node: Node, inputs: Mapping[str, np.ndarray], opset: int) -> dict[str, np.ndarray]:
    """The outputs of one node, by onnx's reference evaluator."""
    if node.op == "Constant" and "value" in node.attributes:
        return {node.outputs[0]: numpy_helper.to_array(node.attributes["value"])}
    from onnx.reference import ReferenceEvaluator  # slow to import, and few graphs need it

    proto = onnx.helper.make_node(node.op, node.inputs, node.outputs, **node.attributes)
    graph = onnx.helper.make_graph(
        [proto],
        "constant",
        [
            onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in inputs.items()
        ],
        [onnx.ValueInfoProto(name=name) for name in node.outputs],
    )
    evaluator = ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)]))
    return dict(zip(node.outputs, evaluator.run(None, dict(inputs)), strict=True))


def _static(nodes: Iterable[Node], known: set[str]) -> frozenset[str]:
    """What depends on constants and parameters alone, such as the transpose of a Linear's weight."""
    static = set(known)
    for node in nodes:
        if all(name in static for name in node.inputs if name):
            static.update(node.outputs)
    return frozenset(static)
