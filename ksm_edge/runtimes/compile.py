"""A bundle's gradient graph, built and optimised once on this machine and kept in a cache."""

from __future__ import annotations

import json
import sys
from collections.abc import Container, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ksm_edge.autodiff.spec import GradientSpec
from ksm_edge.bundle.digest import file_sha256
from ksm_edge.bundle.layers import Bundle
from ksm_edge.bundle.load import load_bundle
from ksm_edge.bundle.tensorfile import let_go
from ksm_edge.fuse import fuse_layer
from ksm_edge.resident import use_compact_heap
from ksm_edge.runtimes import cache

Shape = tuple[int, ...]


@dataclass(frozen=True)
class CompiledGraph:
    """A gradient graph as ONNX Runtime will run it, and what has to be bound to it."""

    path: Path  # of the optimised model
    spec: GradientSpec
    inputs: dict[str, Shape]
    outputs: dict[str, Shape]
    forms: dict[str, str]  # the form each layer's product comes in, see `autodiff.conv`
    pixels: dict[str, int]  # h w of each layer's output
    activation_bytes: int  # tensors alive at the worst moment of a run, by the model's own order
    room_bytes: int  # that operators of this project work in, beside these
    halved: bool  # some of them are kept in half precision

    @property
    def accumulators(self) -> list[str]:
        """Names of the outputs that are added to."""
        return [name.removeprefix("acc:") for name in self.inputs if name.startswith("acc:")]


def compiled(bundle: Bundle, spec: GradientSpec) -> CompiledGraph:
    """The gradient graph from the cache, made there first if need be. UnsupportedError names what has no rule."""
    given = json.dumps(spec_table(spec))
    return cache.found_or_made(
        cache.key_of(bundle, given),
        lambda folder: read_compiled(folder, spec),
        lambda folder: cache.make_in_child(__name__, bundle, folder, given),
    )


def is_compiled(bundle: Bundle, spec: GradientSpec) -> bool:
    """Whether the graph is in the cache."""
    return cache.found(cache.key_of(bundle, json.dumps(spec_table(spec))), lambda f: read_compiled(f, spec)) is not None


def read_compiled(folder: Path, spec: GradientSpec) -> CompiledGraph:
    """What `compile_graph` wrote; ValueError, KeyError, TypeError or OSError where that is not what is there."""
    table = json.loads((folder / cache.DESCRIPTION).read_text())
    digest = table.pop("sha256")
    shapes = {name: {k: tuple(v) for k, v in table[name].items()} for name in ("inputs", "outputs")}
    graph = CompiledGraph(folder / cache.GRAPH, spec, **{**table, **shapes})
    cache.hold(folder, graph)  # a training opens its graphs again and again
    if digest != _digest(folder):
        raise ValueError(f"{folder}: the graph is not the one its description is of")
    return graph


def compile_graph(bundle: Bundle, spec: GradientSpec, folder: Path) -> CompiledGraph:
    """Build and optimise in this process, into `folder`."""
    import onnx

    from ksm_edge.autodiff.gradient_graph import build
    from ksm_edge.autodiff.halved import is_halved
    from ksm_edge.autodiff.liveness import peak_bytes
    from ksm_edge.autodiff.own import room_bytes
    from ksm_edge.runtimes.optimise import optimised_in_order

    graph = build(onnx.load(bundle.graph_path, load_external_data=False), bundle.layers, spec)
    content = optimised_in_order(graph.model, _constants(bundle, graph.externals, spec), folder)
    (folder / cache.GRAPH).write_bytes(content)
    table = {name: getattr(graph, name) for name in ("inputs", "outputs", "forms", "pixels")}
    table |= {"activation_bytes": peak_bytes(graph.model), "room_bytes": room_bytes(graph.model)}
    table["halved"] = is_halved(graph.model)
    table["sha256"] = _digest(folder)
    (folder / cache.DESCRIPTION).write_text(json.dumps(table))
    return read_compiled(folder, spec)


def _digest(folder: Path) -> str:
    """Of the graph and its constants."""
    files = folder / cache.GRAPH, folder / cache.CONSTANTS
    return " ".join(file_sha256(path) for path in files if path.exists())


def _constants(bundle: Bundle, names: Container[str], spec: GradientSpec) -> Iterator[tuple[str, np.ndarray]]:
    """Those of `names`: pristine depthwise weights (and flipped), fused weights of layers that do not learn."""
    for layer in bundle.layers:
        of_layer = [f"{layer.name}.{kind}" for kind in ("flipped", "weight", "bias")]
        if not any(name in names for name in of_layer):
            continue
        weights = bundle.weights[layer.name]
        as_run = weights.weight, weights.bias
        if layer.name not in spec.trained:
            as_run = fuse_layer(layer, weights, None)
        arrays = weights.weight[:, :, ::-1, ::-1], *as_run
        yield from ((name, array) for name, array in zip(of_layer, arrays, strict=True) if name in names)
        let_go(weights.weight)


def spec_table(spec: GradientSpec) -> dict[str, object]:
    """As JSON takes it."""
    return asdict(replace(spec, trained=frozenset())) | {"trained": sorted(spec.trained)}


def spec_of(table: Mapping[str, Any]) -> GradientSpec:
    """The one that `spec_table` made it of."""
    return GradientSpec(**{**table, "trained": frozenset(table["trained"])})


def _main(bundle_path: str, folder: str) -> int:
    spec = spec_of(json.loads(sys.stdin.read()))
    use_compact_heap()
    return cache.in_child(lambda: compile_graph(load_bundle(bundle_path), spec, Path(folder)))


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
