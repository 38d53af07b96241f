"""A bundle's inference graph as ONNX Runtime optimises it on this machine, so that making a session is mere copying.

Most of making a session is optimising the graph, and part of that is to put every conv's weight into the layout that
this processor's kernels read. So the optimised graph is kept without weights, with how each of them lay, and a task's
fused weights are laid out here. Which layout it is, the optimiser itself shows: it is given weights whose values count
up, and what it makes of them is compared with all layouts it may have chosen.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ksm_edge.bundle.layers import Bundle
from ksm_edge.bundle.load import load_bundle
from ksm_edge.errors import UnsupportedError
from ksm_edge.fuse import fuse
from ksm_edge.runtimes import cache
from ksm_edge.runtimes.onnxruntime import Session

if TYPE_CHECKING:
    import onnx

Shape = tuple[int, ...]
BLOCKS = (4, 8, 16, 32)  # floats of a vector register, on any processor
EXACT = 1 << 24  # whole numbers up to here are exact in float32
TIMINGS = 5  # of making a session, each way, while preparing
NOWHERE = "weights"  # the file that the optimised graph names for them and that never is


@dataclass(frozen=True)
class Layout:
    """Filters in blocks of so many and in-channels in blocks of so many, filled up with zeros; 1: no blocks."""

    filters: int
    channels: int

    def shape(self, shape: Shape) -> Shape:
        """Of a weight (O, I, kh, kw) or bias (O,), as filled up."""
        blocks = (self.filters, self.channels, 1, 1)
        return tuple(-(-size // block) * block for size, block in zip(shape, blocks, strict=False))

    def lay(self, array: np.ndarray, out: np.ndarray) -> None:
        """A weight or bias into `out`, of that shape, in the order: blocks of filters, blocks of in-channels, kh, kw,
        in-channels of a block, filters of a block.
        """
        if array.ndim == 1:
            out[: array.size] = array
            out[array.size :] = 0
            return
        if out.shape != array.shape:
            filled = np.zeros(out.shape, np.float32)  # several times faster than np.pad
            filled[: array.shape[0], : array.shape[1]] = array
            array = filled
        O, I, kh, kw = array.shape
        rows, columns = O // self.filters, I // self.channels
        blocks = array.reshape(rows, self.filters, columns, self.channels, kh, kw).transpose(0, 2, 4, 5, 3, 1)
        np.copyto(out.reshape(blocks.shape), blocks)


LAYOUTS = (Layout(1, 1), *(Layout(block, 1) for block in BLOCKS), *(Layout(block, block) for block in BLOCKS))


@dataclass(frozen=True)
class PreparedGraph:
    """An optimised inference graph and what its initializers are made from."""

    model: bytes  # not its place: the cache may let go of it while an app still makes sessions
    initializers: Mapping[str, tuple[str, Layout]]  # by the graph's names: which of the bundle's, and how it lies
    is_faster: bool  # than having the graph optimised for each session, as measured here when it was prepared

    def session(self, weights: Mapping[str, np.ndarray], threads: int = 1) -> Session:
        """A session with these fused weights, as `onnxruntime.Session(bundle.graph_path, weights, threads)`."""
        parts = {name: (weights[source], layout) for name, (source, layout) in self.initializers.items()}
        shapes = {name: layout.shape(weight.shape) for name, (weight, layout) in parts.items()}
        # In one piece, which numpy puts into huge pages: new small pages would take longer than filling them.
        whole = np.empty(sum(map(math.prod, shapes.values())), np.float32)
        laid_out, first = {}, 0
        for name, (weight, layout) in parts.items():
            size = math.prod(shapes[name])
            laid_out[name] = whole[first : first + size].reshape(shapes[name])
            layout.lay(weight, laid_out[name])
            first += size
        return Session(self.model, laid_out, threads, optimise=False)


def prepared(bundle: Bundle) -> PreparedGraph | None:
    """The graph if it was prepared on this machine before."""
    return cache.found(_key(bundle), read_prepared)


def prepare(bundle: Bundle) -> PreparedGraph:
    """The graph, prepared now if need be, which takes seconds once; UnsupportedError where the optimiser goes beyond
    laying out weights.
    """
    return cache.found_or_made(
        _key(bundle), read_prepared, lambda folder: cache.make_in_child(__name__, bundle, folder)
    )


def read_prepared(folder: Path) -> PreparedGraph:
    """What `prepare_graph` wrote; one of `cache.NOT_WHOLE` where that is not what is there."""
    table = json.loads((folder / cache.DESCRIPTION).read_text())
    model = (folder / cache.GRAPH).read_bytes()
    if table["sha256"] != hashlib.sha256(model).hexdigest():
        raise ValueError(f"{folder}: the graph is not the one its description is of")
    found = {name: (str(source), Layout(*sizes)) for name, (source, *sizes) in table["initializers"].items()}
    return PreparedGraph(model, found, table["session_ms"] < table["optimised_session_ms"])


def prepare_graph(bundle: Bundle, folder: Path) -> PreparedGraph:
    """Optimise in this process, into `folder`; UnsupportedError as above."""
    import onnx

    from ksm_edge.runtimes.optimise import optimised

    counting = _counting(bundle)
    known: dict[str, tuple[str, Layout]] = {}
    for name, array in counting.items():
        for layout in LAYOUTS:
            layout.lay(array, out := np.empty(layout.shape(array.shape), np.float32))
            known.setdefault(_digest(out), (name, layout))
    found = {}
    with tempfile.TemporaryDirectory(dir=folder) as beside:
        model = optimised(onnx.load(bundle.graph_path, load_external_data=False), counting.items(), folder=Path(beside))
        for tensor in model.graph.initializer:
            values = onnx.numpy_helper.to_array(tensor, base_dir=beside)
            if (which := known.get(_digest(values))) is not None:
                found[tensor.name] = which
                _leave_out(tensor)
    if lost := sorted(counting.keys() - {source for source, _ in found.values()}):
        raise UnsupportedError(f"ONNX Runtime makes something else of the weights here: {', '.join(lost[:3])}")
    content = model.SerializeToString()
    (folder / cache.GRAPH).write_bytes(content)
    initializers = {name: [source, layout.filters, layout.channels] for name, (source, layout) in found.items()}
    weights, graph = fuse(bundle, None), PreparedGraph(content, found, is_faster=True)
    table = {
        "sha256": hashlib.sha256(content).hexdigest(),
        "initializers": initializers,
        "session_ms": _median_ms(lambda: graph.session(weights)),
        "optimised_session_ms": _median_ms(lambda: Session(bundle.graph_path, weights)),
    }
    (folder / cache.DESCRIPTION).write_text(json.dumps(table))
    return read_prepared(folder)


def _median_ms(make: Callable[[], Session]) -> float:
    times = []
    for _ in range(TIMINGS):
        began = time.perf_counter()
        make()
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)


def _counting(bundle: Bundle) -> dict[str, np.ndarray]:
    """A weight and a bias for each layer, of values that count up, each from a start of its own."""
    arrays: dict[str, np.ndarray] = {}
    for layer in bundle.layers:
        for name, shape in (
            (f"{layer.name}.weight", layer.weight_shape),
            (f"{layer.name}.bias", layer.weight_shape[:1]),
        ):
            size, start = int(np.prod(shape)), 1 + len(arrays)
            if start + size > EXACT:
                raise UnsupportedError(f"layer {layer.name} has more weights than float32 can number")
            arrays[name] = np.arange(start, start + size, dtype=np.float32).reshape(shape)
    return arrays


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(repr(array.shape).encode() + np.ascontiguousarray(array).data).hexdigest()


def _leave_out(tensor: onnx.TensorProto) -> None:
    """Have the tensor name a file in place of its values."""
    tensor.ClearField("raw_data")
    tensor.ClearField("float_data")
    tensor.data_location = tensor.EXTERNAL
    del tensor.external_data[:]
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", NOWHERE


def _key(bundle: Bundle) -> str:
    return cache.key_of(bundle, "inference")


def _main(bundle_path: str, folder: str) -> int:
    return cache.in_child(lambda: prepare_graph(load_bundle(bundle_path), Path(folder)))


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
