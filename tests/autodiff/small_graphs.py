"""Backbones of a few nodes, their gradient graphs in float64 and float32, and the same gradients by finite differences.

Each stands for image -> layers and operators -> Flatten -> features, so that every pixel has a head weight, and so a
gradient, of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ksm_edge.autodiff.gradient_graph import GradientGraph, build
from ksm_edge.autodiff.spec import GradientSpec
from ksm_edge.autodiff.tiles import KERNEL, PLACES
from ksm_edge.bundle.layers import Layer
from ksm_edge.runtimes.onnxruntime import gradient_session_options
from ksm_edge.runtimes.reference import evaluate

CLASSES = 3


@dataclass(frozen=True)
class Conv:
    """A conv by its layer; the image has 3 channels."""

    layer: Layer
    x: str
    attributes: Mapping[str, object] = field(default_factory=dict)


def conv(name: str, x: str, O: int, I: int, kernel: tuple[int, int] = (1, 1), groups: int = 1, *, norm: bool = False,
         **attributes: object) -> Conv:  # fmt: skip
    return Conv(Layer(name, (O, I, *kernel), groups, 1e-3 if norm else 0.0, norm), x, attributes)


@dataclass(frozen=True)
class Op:
    """An operator: inputs and outputs by name, separated by blanks."""

    op: str
    inputs: str
    output: str
    attributes: Mapping[str, object] = field(default_factory=dict)


def op(kind: str, inputs: str, output: str, **attributes: object) -> Op:
    return Op(kind, inputs, output, attributes)


@dataclass
class Net:
    """A backbone, random parameters and one micro-batch for it."""

    nodes: Sequence[Conv | Op]
    size: int = 7
    images: int = 2
    constants: Mapping[str, np.ndarray] = field(default_factory=dict)
    frozen: Sequence[str] = ()  # layers that do not learn
    statistics: str = "frozen"
    per_weight: bool = False
    own: bool = False  # in float32, with the operators of `autodiff.own`
    widened: bool = True  # with these
    tile_bytes: int = 2**22  # with these
    threads: int = 1
    seed: int = 0
    _graphs: dict[type, GradientGraph] = field(default_factory=dict)
    _outputs: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.layers = tuple(node.layer for node in self.nodes if isinstance(node, Conv))
        rng = np.random.default_rng(self.seed)
        self.weights = {}
        for layer in self.layers:
            O, I, kh, kw = layer.weight_shape
            self.weights[f"{layer.name}.weight"] = rng.standard_normal((O, I, kh, kw)) * np.sqrt(2 / (I * kh * kw))
            self.weights[f"{layer.name}.bias"] = rng.standard_normal(O) * 0.3
        names = frozenset(layer.name for layer in self.layers) - set(self.frozen)
        self.spec = GradientSpec(self.images, self.size, CLASSES, names, self.statistics, self.per_weight)
        self.image = rng.standard_normal((self.images, 3, self.size, self.size))
        self.target = rng.dirichlet(np.ones(CLASSES), self.images) / self.images
        self.scale = {layer.name: rng.uniform(0.5, 1.5, layer.weight_shape[0]) for layer in self.layers}
        self.norm = {
            f"{layer.name}.{which}": rng.uniform(0.5, 1.5, layer.weight_shape[0])
            for layer in self.layers
            for which in ("gamma", "beta")
        }

    @property
    def model(self) -> onnx.ModelProto:
        protos = [_conv_proto(n) if isinstance(n, Conv) else _op_proto(n) for n in self.nodes]
        protos.append(helper.make_node("Flatten", [protos[-1].output[0]], ["features"], name="end", axis=1))
        inline = [numpy_helper.from_array(np.asarray(value), name) for name, value in self.constants.items()]
        external = [_external(name, array.shape) for name, array in self.weights.items()]
        image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, "H", "W"])
        features = helper.make_tensor_value_info("features", TensorProto.FLOAT, ["N", "F"])
        graph = helper.make_graph(protos, "small", [image], [features], inline + external)
        return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])

    def gradient_graph(self, dtype: type = np.float64) -> GradientGraph:
        if dtype not in self._graphs:
            forms = {"own": self.own and dtype == np.float32, "widened": self.widened, "tile_bytes": self.tile_bytes}
            spec = replace(self.spec, **forms)
            self._graphs[dtype] = build(self.model, self.layers, spec, dtype)
        return self._graphs[dtype]

    def feeds(self, graph: GradientGraph) -> dict[str, np.ndarray]:
        """All inputs in float64, the accumulators at 0."""
        rng = np.random.default_rng(self.seed + 1)
        given = {"image": self.image, "target": self.target, **self.weights, **self.norm}
        given |= {f"{name}.scale": scale for name, scale in self.scale.items()}
        for name, shape in graph.inputs.items():
            layer, _, kind = name.rpartition(".")
            if graph.forms.get(layer) == "winograd" and kind == "weight":
                given[name] = transformed(self.weights[f"{layer}.weight"])
            elif kind == "pristine":
                given[name] = self.weights[f"{layer}.weight"]
            elif kind in ("matrix", "turned"):
                given[name] = _second(given[f"{layer}.weight"], kind)
            elif name.startswith("head:"):
                given[name] = rng.standard_normal(shape) / np.sqrt(shape[-1])
            elif name.startswith("acc:"):
                given[name] = np.zeros(shape)
        return {name: given[name] for name in graph.inputs}

    def externals(self, graph: GradientGraph) -> dict[str, np.ndarray]:
        flipped = {
            f"{name.removesuffix('.weight')}.flipped": w[:, :, ::-1, ::-1]
            for name, w in self.weights.items()
            if w.ndim == 4
        }
        return {name: np.ascontiguousarray((self.weights | flipped)[name]) for name in graph.externals}

    def run_reference(self, feeds: Mapping[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
        """The float64 graph in the reference runtime."""
        if feeds is None and self._outputs:
            return self._outputs
        graph = self.gradient_graph()
        outputs = evaluate(graph.model, self.feeds(graph) if feeds is None else feeds, self.externals(graph))
        if feeds is None:
            self._outputs.update(outputs)
        return outputs

    def run_onnxruntime(self) -> dict[str, np.ndarray]:
        """The float32 graph in ONNX Runtime, as it is and all optimisations on."""
        import onnxruntime

        graph = self.gradient_graph(np.float32)
        externals = {name: array.astype(np.float32) for name, array in self.externals(graph).items()}
        options = gradient_session_options(self.threads)
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in externals.values()]
        options.add_external_initializers(list(externals), values)
        session = onnxruntime.InferenceSession(
            graph.model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        feeds = {name: array.astype(np.float32) for name, array in self.feeds(graph).items()}
        return dict(zip(graph.outputs, session.run(list(graph.outputs), feeds), strict=True))


def gradients(net: Net, outputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The accumulators as gradients of the graph's inputs, by input name and in its shape."""
    found = {"head:weight": outputs["head:dweight"], "head:bias": outputs["head:dbias"]}
    forms = net.gradient_graph().forms
    for layer in net.layers:
        name, (O, I, kh, kw) = layer.name, layer.weight_shape
        if name not in net.spec.trained:
            continue
        found[f"{name}.bias"] = outputs[f"{name}.dbias"]
        if f"{name}.dgamma" in outputs:
            found |= {f"{name}.gamma": outputs[f"{name}.dgamma"], f"{name}.beta": outputs[f"{name}.dbeta"]}
        if forms[name] == "channel":
            found[f"{name}.scale"] = outputs[f"{name}.product"]
        elif forms[name] == "pointwise":
            found[f"{name}.weight"] = outputs[f"{name}.product"].reshape(O, I, 1, 1)
        elif forms[name] == "patches":
            columns = outputs[f"{name}.product"].reshape(O, kh * kw, I)
            found[f"{name}.weight"] = columns.transpose(0, 2, 1).reshape(O, I, kh, kw)
        else:
            taps = np.stack([outputs[f"{name}.product.{k}"] for k in range(kh * kw)])
            found[f"{name}.weight"] = taps.transpose(1, 2, 0).reshape(O, I, kh, kw)
    return found


def finite_difference(net: Net, name: str, direction: np.ndarray, step: float = 1e-6) -> float:
    """d loss along `direction` of the input `name`, by central differences in float64."""
    graph = net.gradient_graph()
    feeds, externals = net.feeds(graph), net.externals(graph)
    loss = []
    for sign in (1, -1):
        moved = feeds[name] + sign * step * direction
        changed = {name: moved}
        layer, _, parameter = name.rpartition(".")
        for kind in ("matrix", "turned"):
            if parameter == "weight" and f"{layer}.{kind}" in feeds:
                changed[f"{layer}.{kind}"] = _second(moved, kind)
        loss.append(float(evaluate(graph.model, {**feeds, **changed}, externals)["loss"]))
    return (loss[0] - loss[1]) / (2 * step)


def transformed(weight: np.ndarray) -> np.ndarray:
    """U = G W G', (36, O, I), of W (O, I, 3, 3)."""
    return np.einsum("ap,oipq,bq->aboi", KERNEL, weight, KERNEL).reshape(PLACES, *weight.shape[:2])


def _second(weight: np.ndarray, kind: str) -> np.ndarray:
    """A weight as the backward pass reads it."""
    return weight[:, :, 0, 0] if kind == "matrix" else weight[:, :, ::-1, ::-1].swapaxes(0, 1)


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference over the largest expected magnitude."""
    return float(np.abs(found - expected).max() / max(float(np.abs(expected).max()), 1e-30))


def _conv_proto(node: Conv) -> onnx.NodeProto:
    name = node.layer.name
    inputs = [node.x, f"{name}.weight", f"{name}.bias"]
    kernel = list(node.layer.weight_shape[2:])
    return helper.make_node(
        "Conv", inputs, [name], name=name, group=node.layer.groups, kernel_shape=kernel, **node.attributes
    )


def _op_proto(node: Op) -> onnx.NodeProto:
    return helper.make_node(node.op, node.inputs.split(), [node.output], name=f"/{node.output}", **node.attributes)


def _external(name: str, shape: tuple[int, ...]) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="given")
    return tensor
