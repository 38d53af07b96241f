"""A graph as this machine's ONNX Runtime optimises it; a gradient graph with its nodes in the order they had.

ONNX Runtime frees a tensor after its last use, so the order of the nodes decides the peak of memory, and its own order
would make every recomputed tensor as early as it can.

Weights go in and come out as files, which ONNX Runtime maps: given as arrays, and written into the model, they are in
memory four times and more. A process that optimises ResNet-50 with all weights as constants takes 175 MiB so, and 490
MiB otherwise.
"""

from __future__ import annotations

import heapq
import mmap
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx

from ksm_edge.errors import KsmEdgeError
from ksm_edge.resident import give_back
from ksm_edge.resources import cache_folder
from ksm_edge.runtimes.cache import CONSTANTS
from ksm_edge.runtimes.onnxruntime import gradient_session_options

# It would merge what the backward pass computes again with what the forward pass computed, and keep that instead.
KEPT_OUT = ["CommonSubexpressionElimination"]
GIVEN = "given"  # the file of constants as they go in


def optimised(
    model: onnx.ModelProto, constants: Iterable[tuple[str, np.ndarray]], folder: Path, disabled: Sequence[str] = ()
) -> onnx.ModelProto:
    """The model as this machine's ONNX Runtime optimises it, without the `disabled` optimizers.

    `constants`: the values of its external initializers, each looked at once. The result has its own in
    `folder`/CONSTANTS, if they are larger than a kilobyte. KsmEdgeError where the disk has too little room for that.
    """
    _require_room(model, folder)
    give_back()  # what building took, before ONNX Runtime is loaded
    import onnxruntime as ort

    with tempfile.TemporaryDirectory(dir=folder) as given:
        _write_constants(model, constants, Path(given, GIVEN))
        Path(given, "given.onnx").write_bytes(model.SerializeToString())
        options = gradient_session_options(1)
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.optimized_model_filepath = str(folder / "optimised.onnx")
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", CONSTANTS)
        give_back()  # what loading it took
        ort.InferenceSession(
            str(Path(given, "given.onnx")),
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=list(disabled),
        )
        give_back()
        result = onnx.load(folder / "optimised.onnx", load_external_data=False)
        _take_in(result, given)
    (folder / "optimised.onnx").unlink()
    return result


def _require_room(model: onnx.ModelProto, folder: Path) -> None:
    """ONNX Runtime would say of a full disk only that it could not write."""
    constants = [4 * int(np.prod(tensor.dims)) for tensor in model.graph.initializer if tensor.external_data]
    # As they go in, each from a page on, and come out; a part more for what a file system keeps beside them.
    needed = int(1.05 * (2 * sum(constants) + len(constants) * mmap.PAGESIZE + 2 * model.ByteSize()))
    disk = shutil.disk_usage(folder)
    if disk.free < needed and disk.total:  # some file systems do not know
        raise KsmEdgeError(
            f"compiling a graph takes {-(-needed >> 20)} MiB of the disk under {cache_folder()}, of which "
            f"{disk.free >> 20} MiB are free: make room there, or give another folder as KSM_EDGE_CACHE"
        )


def _take_in(model: onnx.ModelProto, given: str) -> None:
    """Into the model what still lies in the file that went in: ONNX Runtime 1.20 leaves small constants there."""
    for tensor in model.graph.initializer:
        if any(entry.key == "location" and entry.value == GIVEN for entry in tensor.external_data):
            values = onnx.numpy_helper.to_array(tensor, base_dir=given)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))


def _write_constants(model: onnx.ModelProto, constants: Iterable[tuple[str, np.ndarray]], path: Path) -> None:
    """Into one file, one after the other, and into the model where each of them lies."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    with open(path, "wb") as file:
        for name, array in constants:
            offset = file.seek(-(-file.tell() // mmap.PAGESIZE) * mmap.PAGESIZE)
            file.write(np.ascontiguousarray(array).data)
            del tensors[name].external_data[:]
            for key, value in (("location", path.name), ("offset", offset), ("length", array.nbytes)):
                tensors[name].external_data.add(key=key, value=str(value))


def optimised_in_order(model: onnx.ModelProto, constants: Iterable[tuple[str, np.ndarray]], folder: Path) -> bytes:
    """The same of a gradient graph, with its nodes in the order they had."""
    result = optimised(model, constants, folder, KEPT_OUT)
    order = {name: index for index, node in enumerate(model.graph.node) for name in node.output}
    nodes = in_order(list(result.graph.node), order)
    del result.graph.node[:]
    result.graph.node.extend(nodes)
    return result.SerializeToString()


def in_order(nodes: list[onnx.NodeProto], order: Mapping[str, int]) -> list[onnx.NodeProto]:
    """Sort nodes by the place their output has in `order`, as far as their inputs allow.

    A node the optimiser made up (a change of layout, say) runs right before the first node that needs it.
    """
    producer = {name: i for i, node in enumerate(nodes) for name in node.output}
    users: list[list[int]] = [[] for _ in nodes]
    for i, node in enumerate(nodes):
        for name in {*node.input} & producer.keys():
            users[producer[name]].append(i)
    place = [min((order[n] for n in node.output if n in order), default=-1) for node in nodes]
    for i in reversed(range(len(nodes))):  # the given list is topological, so users come first in this direction
        if place[i] < 0:
            place[i] = min((place[j] for j in users[i]), default=len(order))
    missing = [len({producer[n] for n in {*node.input} & producer.keys()}) for node in nodes]
    ready = [(place[i], i) for i in range(len(nodes)) if not missing[i]]
    heapq.heapify(ready)
    done = []
    while ready:
        _, i = heapq.heappop(ready)
        done.append(nodes[i])
        for j in set(users[i]):
            missing[j] -= 1
            if not missing[j]:
                heapq.heappush(ready, (place[j], j))
    return done
