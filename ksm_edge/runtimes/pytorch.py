"""torch as a runtime: for machines that have it, and for whoever wants to learn with autograd on a bundle's graph."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ksm_edge.errors import UnsupportedError

if TYPE_CHECKING:
    import onnx
    import torch

    from ksm_edge.autodiff.graph import Node

Attributes = Mapping[str, Any]  # of one node, decoded
Tensors = Sequence[Any]  # its inputs


def available() -> str | None:
    if importlib.util.find_spec("torch") is None:
        return "the package torch is not installed: pip install 'ksm-edge[export]'"
    return None


class Session:
    """A backbone graph in torch with one task's weights, on the CPU."""

    def __init__(self, graph: Path | bytes, weights: Mapping[str, np.ndarray], threads: int = 1) -> None:
        """`graph`: an ONNX file or its bytes; `weights`: every external initializer by name, float32.

        `threads` is torch's own number, one for the whole process.
        """
        import torch

        torch.set_num_threads(threads)
        self._graph = read_graph(graph)
        shapes = self._graph.weights
        for name in sorted(shapes.keys() | weights.keys()):
            found = weights[name].shape if name in weights else None
            if shapes.get(name) != found:
                raise UnsupportedError(f"{name}: the graph has dimensions {shapes.get(name)}, the weights have {found}")
        self._weights = {name: torch.tensor(weight) for name, weight in weights.items()}

    def run(self, images: np.ndarray) -> np.ndarray:
        """Images (N, 3, H, W) float32 -> features (N, F) float32."""
        import torch

        with torch.inference_mode():
            found = features(self._graph, torch.tensor(images), with_weights(self._weights))
        return np.asarray(found.numpy())


@dataclass(frozen=True)
class Graph:
    """A backbone's graph, decoded once: torch runs it node by node."""

    image: str
    output: str
    nodes: tuple[Node, ...]
    constants: Mapping[str, Any]  # a float, an array of whole numbers, or a tensor
    weights: Mapping[str, tuple[int, ...]]  # shapes of those that are given when it is run


def read_graph(graph: Path | bytes) -> Graph:
    """A bundle's `backbone.onnx` or its bytes; UnsupportedError for its operators."""
    import onnx

    return decoded(onnx.load_model_from_string(graph if isinstance(graph, bytes) else graph.read_bytes()).graph)


def decoded(graph: onnx.GraphProto) -> Graph:
    """The same from a graph in memory."""
    import onnx

    from ksm_edge.autodiff.graph import Node

    nodes = tuple(map(Node.read, graph.node))
    if strange := sorted({node.op for node in nodes} - {"Conv", *OPERATORS}):
        raise UnsupportedError(f"torch has no form here of the operators {', '.join(strange)}")
    inline = [t for t in graph.initializer if not t.external_data]
    return Graph(
        graph.input[0].name,
        graph.output[0].name,
        nodes,
        {t.name: _constant(onnx.numpy_helper.to_array(t)) for t in inline},
        {t.name: tuple(t.dims) for t in graph.initializer if t.external_data},
    )


def on_device(graph: Graph, device: str) -> Graph:
    """The same with its constants there."""
    import torch

    tensors = {name: value for name, value in graph.constants.items() if isinstance(value, torch.Tensor)}
    return replace(graph, constants={**graph.constants, **{name: t.to(device) for name, t in tensors.items()}})


def _constant(array: np.ndarray) -> Any:
    """As torch's functions take it: what is no tensor there stays fixed when a network is traced."""
    import torch

    if array.dtype.kind in "iu":
        return array
    return float(array) if array.ndim == 0 else torch.tensor(array)


def features(
    graph: Graph, image: torch.Tensor, conv: Callable[[str, torch.Tensor, Attributes], torch.Tensor]
) -> torch.Tensor:
    """Features (N, F) of images (N, 3, H, W); `conv` does the convs, given a node's name, its input and attributes."""
    import torch

    values = {**graph.constants, graph.image: image}
    for node in graph.nodes:
        if node.op == "Conv":
            values[node.output] = conv(node.name, values[node.inputs[0]], node.attributes)
        else:
            values[node.output] = OPERATORS[node.op](torch, [values[name] for name in node.inputs], node.attributes)
    return values[graph.output]


def with_weights(weights: Mapping[str, torch.Tensor]) -> Callable[[str, torch.Tensor, Attributes], torch.Tensor]:
    """The plain conv for `features`: with the tensors `NAME.weight` and `NAME.bias`."""

    def conv(name: str, x: torch.Tensor, attributes: Attributes) -> torch.Tensor:
        return conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], attributes)

    return conv


def conv2d(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, attributes: Attributes) -> torch.Tensor:
    """One conv with a node's attributes: ONNX also knows pads that differ on two sides."""
    from torch.nn import functional

    left, right, top, bottom = _padding(attributes)
    if (top, left) != (bottom, right):
        x, top, left = functional.pad(x, (left, right, top, bottom)), 0, 0
    strides, dilations = attributes.get("strides", 1), attributes.get("dilations", 1)
    return functional.conv2d(x, weight, bias, strides, (top, left), dilations, attributes.get("group", 1))


def _padding(attributes: Attributes) -> tuple[int, int, int, int]:
    """As torch's `pad` wants it."""
    top, left, bottom, right = attributes.get("pads", [0] * 4)
    return left, right, top, bottom


def _max_pool(torch: Any, x: Tensors, a: Attributes) -> torch.Tensor:
    functional, ceil = torch.nn.functional, bool(a.get("ceil_mode", 0))
    left, right, top, bottom = _padding(a)
    kernel, image = a["kernel_shape"], x[0]
    # torch pads alike on both sides, by half a kernel at most; and with ceil_mode it leaves windows out.
    fits = (
        (top, left) == (bottom, right) and 2 * top <= kernel[0] and 2 * left <= kernel[1] and not (ceil and top + left)
    )
    if not fits:
        image, top, left = functional.pad(image, (left, right, top, bottom), value=-torch.inf), 0, 0
    return functional.max_pool2d(image, kernel, a.get("strides", 1), (top, left), a.get("dilations", 1), ceil)


def _average_pool(torch: Any, x: Tensors, a: Attributes) -> torch.Tensor:
    left, right, top, bottom = _padding(a)
    if (top, left) != (bottom, right):
        raise UnsupportedError(f"AveragePool with the pads {a['pads']}: torch knows symmetric ones")
    ceil, padding_counts = bool(a.get("ceil_mode", 0)), bool(a.get("count_include_pad", 0))
    kernel, strides = a["kernel_shape"], a.get("strides", 1)
    return torch.nn.functional.avg_pool2d(x[0], kernel, strides, (top, left), ceil, padding_counts)


def _slice(torch: Any, x: Tensors, a: Attributes) -> torch.Tensor:
    result = x[0]
    for start, end, axis, step in zip(*(v.tolist() for v in x[1:]), strict=True):
        result = result[(slice(None),) * axis + (slice(start, min(end, result.shape[axis]), step),)]
    return result


def _pad(torch: Any, x: Tensors, a: Attributes) -> torch.Tensor:
    pads = x[1].tolist()
    half = len(pads) // 2
    pairs = [p for axis in reversed(range(half)) for p in (pads[axis], pads[axis + half])]
    return torch.nn.functional.pad(x[0], pairs)


# All that canonical backbones are made of; the first argument is the module torch, which is not imported above.
OPERATORS: dict[str, Callable[[Any, Tensors, Attributes], Any]] = {
    "Add": lambda torch, x, a: x[0] + x[1],
    "AveragePool": _average_pool,
    "Clip": lambda torch, x, a: torch.clamp(x[0], x[1], x[2]),
    "Concat": lambda torch, x, a: torch.cat(list(x), a["axis"]),
    "Flatten": lambda torch, x, a: x[0].flatten(1),
    "GlobalAveragePool": lambda torch, x, a: x[0].mean((2, 3), keepdim=True),
    "HardSigmoid": lambda torch, x, a: torch.clamp(x[0] * a.get("alpha", 0.2) + a.get("beta", 0.5), 0, 1),
    "HardSwish": lambda torch, x, a: torch.nn.functional.hardswish(x[0]),
    "MaxPool": _max_pool,
    "Mul": lambda torch, x, a: x[0] * x[1],
    "Pad": _pad,
    "Relu": lambda torch, x, a: torch.relu(x[0]),
    "Sigmoid": lambda torch, x, a: torch.sigmoid(x[0]),
    "Slice": _slice,
}
