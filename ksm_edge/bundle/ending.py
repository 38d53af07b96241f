"""Where the backbone ends: the input of the first Linear layer, or the node that was named."""

from __future__ import annotations

from dataclasses import dataclass

from ksm_edge.bundle.incoming import Incoming, Node
from ksm_edge.errors import UnsupportedError, UsageError


@dataclass(frozen=True)
class End:
    """The tensor that holds the features, and how many values per image the Linear behind it takes, if known."""

    tensor: str
    length: int | None


def find_end(graph: Incoming, features: str | None) -> End:
    """The tensor named by `features` (a node or tensor), else what the first Linear (Gemm, MatMul) takes.

    Raises UnsupportedError where the net has no Linear, or one in front of a Conv; UsageError for an unknown name.
    """
    if features is not None:
        return End(_named_tensor(graph, features), None)
    linear = next((node for node in graph.nodes if _is_linear(graph, node)), None)
    if linear is None:
        raise UnsupportedError(
            "the net has no Linear layer (Gemm, MatMul) at whose input the features could end; "
            f"name the node they end at with --features NODE, for example {_suggestion(graph)}"
        )
    conv = _first_conv_behind(graph, linear)
    if conv is not None:
        raise UnsupportedError(
            f"{linear.label} is a Linear layer in front of {conv.label}; inside a backbone only Conv can be masked: "
            "write it as a 1x1 Conv, or end before it with --features NODE"
        )
    return End(linear.inputs[0], _input_length(graph, linear))


def live_nodes(graph: Incoming, end: str) -> list[Node]:
    """The nodes the tensor `end` depends on, in order; chains that only compute a shape do not count."""
    needed = {end}
    live = []
    for node in reversed(graph.nodes):
        if needed.isdisjoint(node.outputs):
            continue
        live.append(node)
        data = node.inputs[:1] if node.op == "Reshape" else node.inputs
        needed.update(name for name in data if name not in graph.static)
    return live[::-1]


def _named_tensor(graph: Incoming, name: str) -> str:
    tensors = {output: output for node in graph.nodes for output in node.outputs}
    tensors |= {node.name: node.outputs[0] for node in graph.nodes if node.name}
    tensors |= dict(graph.renamed)
    if name not in tensors:
        last = ", ".join(node.name or node.outputs[0] for node in graph.nodes[-8:])
        raise UsageError(f"--features {name}: the graph has no node or tensor of that name; its last nodes are {last}")
    if (tensor := tensors[name]) in graph.static or tensor == graph.image:
        what = "the image itself" if tensor == graph.image else f"the constant {tensor}, whatever the image"
        raise UsageError(f"--features {name}: that is {what}; features are what a backbone makes of an image")
    return tensor


def _is_linear(graph: Incoming, node: Node) -> bool:
    return node.op in ("Gemm", "MatMul") and node.input(0) not in graph.static and node.input(1) in graph.static


def _first_conv_behind(graph: Incoming, linear: Node) -> Node | None:
    reached = set(linear.outputs)
    for node in graph.nodes:
        if not reached.isdisjoint(node.inputs):
            if node.op == "Conv":
                return node
            reached.update(node.outputs)
    return None


def _input_length(graph: Incoming, linear: Node) -> int | None:
    name = linear.input(1)
    shape = graph.constants[name].shape if name in graph.constants else graph.declared.get(name)
    if shape is None or len(shape) != 2:
        return None
    return shape[1] if linear.attributes.get("transB") else shape[0]


def _suggestion(graph: Incoming) -> str:
    convs = [node for node in graph.nodes if node.op == "Conv"]
    before = f"{convs[-1].inputs[0]} (the input of the last Conv) or " if convs else ""
    return f"{before}{graph.outputs[0]} (the graph's own output)"
