"""Freeze a backbone: cut a classifier's graph at its pooled features and take every weight out of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from ksm_edge.bundle.canonical import Draft, Value, canonicalise, flatten, pool
from ksm_edge.bundle.convs import Convs, ConvSite
from ksm_edge.bundle.ending import End, find_end, live_nodes
from ksm_edge.bundle.incoming import Incoming, Node, read_graph
from ksm_edge.bundle.layers import Layer, LayerWeights
from ksm_edge.errors import UsageError

OPSET = 17
IR_VERSION = 8


@dataclass(frozen=True)
class Frozen:
    """A backbone ready to be written: `model` is image (N, 3, H, W) -> features (N, F), its conv weights outside."""

    model: onnx.ModelProto
    layers: tuple[Layer, ...]  # graph order
    weights: Mapping[str, LayerWeights]  # by layer name
    features: int  # F


def freeze(graph: onnx.ModelProto, tensors: Mapping[str, np.ndarray], features: str | None = None) -> Frozen:
    """Freeze a classifier or extractor in eval mode.

    graph: any opset; parameters are initializers, or graph inputs found in `tensors` by name.
    features: the node or tensor to end at; by default the input of the first Linear layer.
    Raises UnsupportedError naming the node for what a frozen graph cannot hold, UsageError for tensors that are
    missing, have another shape or hold values that are not finite.
    """
    source = read_graph(graph, tensors)
    end = find_end(source, features)
    nodes = live_nodes(source, end.tensor)
    draft = Draft(source, _uses(nodes, end), end.length)
    draft.values[source.image] = Value("image", "map", 3)
    convs = Convs(draft)
    for node in nodes:
        if node.op == "Conv":
            convs.add_conv(node)
        elif node.op == "BatchNormalization":
            convs.add_norm(node)
        else:
            canonicalise(draft, node)
    last = _finish(draft, end)
    sites = list(convs.sites.values())
    if not sites:
        raise UsageError(f"no Conv lies between the image and {end.tensor!r}: there is nothing to mask")
    weights = _weights(source, sites)
    return Frozen(_model(draft, last), tuple(_layer(site) for site in sites), weights, last.channels)


def _uses(nodes: Iterable[Node], end: End) -> Counter[str]:
    return Counter([end.tensor, *(name for node in nodes for name in set(node.inputs))])


def _finish(draft: Draft, end: End) -> Value:
    """Pool and flatten what is not yet (N, C)."""
    last = draft.whole(end.tensor)
    if last.kind == "map":
        last = pool(draft, last)
    return last if last.kind == "vector" else flatten(draft, last)


def _layer(site: ConvSite) -> Layer:
    eps = site.norm.eps if site.norm else 0.0
    return Layer(site.name, site.weight_shape, site.groups, eps, site.norm is not None)


def _weights(source: Incoming, sites: Iterable[ConvSite]) -> dict[str, LayerWeights]:
    sites = list(sites)
    wanted = {}
    for site in sites:
        wanted[site.weight] = tuple(site.weight_shape)
        norm = (site.norm.gamma, site.norm.beta, site.norm.mean, site.norm.var) if site.norm else ()
        wanted |= {name: (site.weight_shape[0],) for name in (site.bias, *norm) if name}
    tensors = _take(source, wanted)
    return {site.name: _layer_weights(site, tensors) for site in sites}


def _take(source: Incoming, wanted: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The tensors named in `wanted`, float32; raises UsageError naming the first few that will not do."""
    missing = [name for name in wanted if name not in source.constants]
    if missing:
        raise UsageError(f"the weights lack {len(missing)} of the {len(wanted)} tensors needed: {_few(missing)}")
    tensors = {name: np.ascontiguousarray(source.constants[name], np.float32) for name in wanted}
    given = {name: tensor.shape for name, tensor in tensors.items()}
    wrong = [f"{name} {given[name]} instead of {shape}" for name, shape in wanted.items() if given[name] != shape]
    if wrong:
        raise UsageError(f"{len(wrong)} tensors have the wrong shape: {_few(wrong)}; another network's weights?")
    broken = [name for name, tensor in tensors.items() if not np.isfinite(tensor).all()]
    if broken:
        raise UsageError(f"{len(broken)} tensors hold values that are not finite: {_few(broken)}")
    return tensors


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _layer_weights(site: ConvSite, tensors: Mapping[str, np.ndarray]) -> LayerWeights:
    zero, one = np.zeros(site.weight_shape[0], np.float32), np.ones(site.weight_shape[0], np.float32)
    bias = tensors[site.bias] if site.bias else zero
    if site.norm is None:
        return LayerWeights(tensors[site.weight], zero, one, bias, zero, one)
    norm = site.norm
    return LayerWeights(
        tensors[site.weight], bias, tensors[norm.gamma], tensors[norm.beta], tensors[norm.mean], tensors[norm.var]
    )


def _model(draft: Draft, last: Value) -> onnx.ModelProto:
    for node in draft.nodes:
        node.output[:] = ["features" if name == last.name else name for name in node.output]
    image = onnx.helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, ["N", 3, "H", "W"])
    features = onnx.helper.make_tensor_value_info("features", onnx.TensorProto.FLOAT, ["N", last.channels])
    graph = onnx.helper.make_graph(draft.nodes, "backbone", [image], [features], draft.initializers)
    return onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="ksm_edge"
    )
