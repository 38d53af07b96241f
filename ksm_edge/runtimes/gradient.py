"""The gradient graph in ONNX Runtime: optimised on this machine, run in our own order, accumulating in place.

ONNX Runtime frees a tensor after its last use, so the order of the nodes decides the peak of memory, and its own order
would make every recomputed tensor as early as it can. So the graph is optimised once, its nodes are put back into the
order in which they were emitted, and it is loaded again with the optimiser off.
"""

from __future__ import annotations

import heapq
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx

from ksm_edge.autodiff.gradient_graph import GradientGraph
from ksm_edge.runtimes.onnxruntime import session_options

# It would merge what the backward pass computes again with what the forward pass computed, and keep that instead.
KEPT_OUT = ["CommonSubexpressionElimination"]


class GradientSession:
    """One gradient graph with its parameters and accumulators bound to the caller's own arrays."""

    def __init__(
        self,
        graph: GradientGraph,
        externals: Mapping[str, np.ndarray],
        bound: Mapping[str, np.ndarray],
        threads: int = 1,
    ) -> None:
        """`externals`: the graph's constants; `bound`: an array for every input but image and target, float32.

        `bound` holds parameters by input name and accumulators by output name. They are read and written in place at
        every run: change a parameter array and the next run sees it.
        """
        import onnxruntime as ort

        options = session_options(threads)
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED  # lowest node index first: the order of the file
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.enable_mem_reuse = False
        model = optimised(graph.model, externals)
        self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        spec = graph.spec
        self.image = np.zeros((spec.micro_batch, 3, spec.size, spec.size), np.float32)
        self.target = np.zeros((spec.micro_batch, spec.classes), np.float32)
        arrays = {**bound, "image": self.image, "target": self.target}
        arrays |= {name: np.zeros(shape, np.float32) for name, shape in graph.outputs.items() if name not in arrays}
        # An OrtValue made from a numpy array on the CPU shares its memory; the arrays must outlive the binding.
        self._arrays = arrays
        self._values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
        self._binding = self._session.io_binding()
        for name in graph.inputs:
            self._binding.bind_ortvalue_input(name, self._values[name.removeprefix("acc.")])
        for name in graph.outputs:
            self._binding.bind_ortvalue_output(name, self._values[name])
        self._plain, self._shrinking = ort.RunOptions(), ort.RunOptions()
        self._shrinking.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self._runs = 0

    def output(self, name: str) -> np.ndarray:
        """The array that holds the output `name` after a run, to be read before the next."""
        return self._arrays[name]

    def run(self) -> float:
        """One micro-batch, from `image` and `target`: adds to the accumulators and returns its share of the loss."""
        # What the arena grew to before it knew the memory pattern is given back once: 20 to 60 MiB off the peak.
        self._session.run_with_iobinding(self._binding, self._shrinking if self._runs == 0 else self._plain)
        self._runs += 1
        return float(self._arrays["loss"])


def optimised(model: onnx.ModelProto, externals: Mapping[str, np.ndarray]) -> bytes:
    """The model as this machine's ONNX Runtime optimises it, nodes in the given model's order, constants inside."""
    import onnxruntime as ort

    options = session_options(1)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    values = [ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array)) for array in externals.values()]
    if values:
        options.add_external_initializers(list(externals), values)
    with tempfile.TemporaryDirectory(prefix="ksm-edge-") as folder:
        path = Path(folder, "optimised.onnx")
        options.optimized_model_filepath = str(path)
        ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"], disabled_optimizers=KEPT_OUT
        )
        result = onnx.load(path)
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
