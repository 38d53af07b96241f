"""A bundle's gradient graph, built and optimised once on this machine and kept in a cache.

Building takes the onnx package and ONNX Runtime's optimiser some 50 MiB that training does not need, so it happens in a
process of its own. What ONNX Runtime writes fits the processor it was written on, so the key names both; it never
becomes part of a bundle.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np

from ksm_edge.autodiff.spec import GradientSpec
from ksm_edge.bundle.digest import file_sha256
from ksm_edge.bundle.layers import Bundle
from ksm_edge.bundle.load import load_bundle
from ksm_edge.errors import KsmEdgeError, UnsupportedError
from ksm_edge.fuse import fuse_layer
from ksm_edge.resources import cache_folder

Shape = tuple[int, ...]
DAY = 86_400  # seconds
KEPT = 24  # graphs in the cache, of a megabyte and more: an SD card is not to fill up with those of old releases


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


def compiled(bundle: Bundle, spec: GradientSpec) -> CompiledGraph:
    """The gradient graph from the cache, made there first if need be. UnsupportedError names what has no rule."""
    target = cache_folder() / "graphs" / _key(bundle, spec)
    try:
        found = read_compiled(target, spec)
        with suppress(OSError):  # a cache that may only be read
            os.utime(target)  # used last
        return found
    except (OSError, ValueError, KeyError, TypeError):  # not there, or a power cut came between
        shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".new-") as folder:
        new = Path(folder, "graph")
        new.mkdir()
        _compile_in_child(bundle, spec, new)
        with suppress(OSError):  # another process was quicker
            os.rename(new, target)
    _evict(target)
    return read_compiled(target, spec)


def _evict(newest: Path) -> None:
    """Leave `newest` and those beside it that were used last. A training that runs has read its own long ago."""
    times = {}
    for path in newest.parent.iterdir():
        with suppress(OSError):  # another process evicts as well
            times[path] = path.stat().st_mtime
    # Not by the clock alone: a board without one may start years before its last run.
    graphs = [path for path in sorted(times, key=times.__getitem__) if not path.name.startswith(".") and path != newest]
    power_cuts = [path for path in times if path.name.startswith(".new-") and times[path] < times[newest] - DAY]
    for path in [*graphs[: len(graphs) + 1 - KEPT], *power_cuts]:
        shutil.rmtree(path, ignore_errors=True)


def read_compiled(folder: Path, spec: GradientSpec) -> CompiledGraph:
    """What `compile_graph` wrote; ValueError, KeyError, TypeError or OSError where that is not what is there."""
    table = json.loads((folder / "graph.json").read_text())
    if table.pop("sha256") != file_sha256(folder / "graph.onnx"):
        raise ValueError(f"{folder}: the graph is not the one its description is of")
    shapes = {name: {k: tuple(v) for k, v in table[name].items()} for name in ("inputs", "outputs")}
    return CompiledGraph(folder / "graph.onnx", spec, **{**table, **shapes})


def compile_graph(bundle: Bundle, spec: GradientSpec, folder: Path) -> CompiledGraph:
    """Build and optimise in this process, into `folder`."""
    import onnx

    from ksm_edge.autodiff.gradient_graph import build
    from ksm_edge.autodiff.liveness import peak_bytes
    from ksm_edge.runtimes.optimise import optimised

    graph = build(onnx.load(bundle.graph_path, load_external_data=False), bundle.layers, spec)
    (folder / "graph.onnx").write_bytes(optimised(graph.model, _externals(bundle, graph.externals, spec)))
    table = {name: getattr(graph, name) for name in ("inputs", "outputs", "forms", "pixels")}
    table["activation_bytes"] = peak_bytes(graph.model)
    table["sha256"] = file_sha256(folder / "graph.onnx")
    (folder / "graph.json").write_text(json.dumps(table))
    return read_compiled(folder, spec)


def _externals(bundle: Bundle, names: Mapping[str, Shape], spec: GradientSpec) -> dict[str, np.ndarray]:
    """The graph's constants: pristine depthwise weights (and flipped), fused weights of layers that do not learn."""
    arrays: dict[str, np.ndarray] = {}
    for layer in bundle.layers:
        weights = bundle.weights[layer.name]
        arrays[f"{layer.name}.flipped"] = weights.weight[:, :, ::-1, ::-1]
        arrays[f"{layer.name}.weight"] = weights.weight
        if layer.name not in spec.trained:
            arrays[f"{layer.name}.weight"], arrays[f"{layer.name}.bias"] = fuse_layer(layer, weights, None)
    return {name: np.ascontiguousarray(arrays[name]) for name in names}


def _key(bundle: Bundle, spec: GradientSpec) -> str:
    """One key per backbone, spec, processor, runtime and state of our own code."""
    # The digest is over weights alone: the same ones may end at other features, or stand in another graph.
    backbone = [bundle.digest, hashlib.sha256(bundle.graph_path.read_bytes()).hexdigest(), repr(bundle.layers)]
    machine = [version("onnxruntime"), platform.machine(), _processor()]
    parts = [*backbone, json.dumps(_spec_table(spec)), *machine]
    package = Path(__file__).parents[1]
    sources = [*sorted((package / "autodiff").glob("*.py")), *sorted(Path(__file__).parent.glob("*.py"))]
    return hashlib.sha256("\0".join([*parts, *(s.read_text() for s in sources)]).encode()).hexdigest()[:32]


def _processor() -> str:
    """The processor's features: an SD card may be moved to another board."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _spec_table(spec: GradientSpec) -> dict[str, object]:
    return asdict(replace(spec, trained=frozenset())) | {"trained": sorted(spec.trained)}


def _compile_in_child(bundle: Bundle, spec: GradientSpec, folder: Path) -> None:
    command = [sys.executable, "-m", "ksm_edge.runtimes.compile", str(bundle.path), str(folder)]
    # The child must find this very package, also where it is not installed.
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    child = subprocess.run(
        command, input=json.dumps(_spec_table(spec)), env=environment, text=True, capture_output=True, check=False
    )
    if child.returncode == UnsupportedError.exit_code:
        raise UnsupportedError(child.stderr.strip())
    if child.returncode:
        raise KsmEdgeError(f"the gradient graph of {bundle.path} could not be built:\n{child.stderr.strip()}")


def _main(bundle_path: str, folder: str) -> int:
    table = json.loads(sys.stdin.read())
    spec = GradientSpec(**{**table, "trained": frozenset(table["trained"])})
    try:
        compile_graph(load_bundle(bundle_path), spec, Path(folder))
    except KsmEdgeError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
