"""A compiled graph in ONNX Runtime: run in our own order, with parameters and accumulators bound in place."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np

from ksm_edge.runtimes.compile import CompiledGraph
from ksm_edge.runtimes.onnxruntime import gradient_session_options


class GradientSession:
    """One gradient graph, or its forward part alone, with everything bound to the caller's own arrays."""

    def __init__(self, graph: CompiledGraph, bound: Mapping[str, np.ndarray], threads: int = 1) -> None:
        """`bound`: a float32 array for every input but image and target: parameters by input name, accumulators by
        output name. They are read and written in place: change a parameter array and the next run sees it.
        """
        import onnxruntime as ort

        options = gradient_session_options(threads)
        # Lowest node index first, which is the order of the file; the file is optimised already.
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.enable_mem_reuse = False
        self._graph = graph
        self._session = ort.InferenceSession(str(graph.path), options, providers=["CPUExecutionProvider"])
        self._plain, self._shrinking = ort.RunOptions(), ort.RunOptions()
        self._shrinking.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self._bind(bound)

    def _bind(self, bound: Mapping[str, np.ndarray]) -> None:
        import onnxruntime as ort

        graph, spec = self._graph, self._graph.spec
        self.image = np.zeros(graph.inputs["image"], np.float32)
        self.target = np.zeros((spec.micro_batch, spec.classes), np.float32)
        arrays = {**bound, "image": self.image, "target": self.target}
        arrays |= {name: np.zeros(shape, np.float32) for name, shape in graph.outputs.items() if name not in arrays}
        # An OrtValue made from a numpy array on the CPU shares its memory; the arrays must outlive the binding.
        self._arrays = arrays
        values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
        self._binding = self._session.io_binding()
        for name in graph.inputs:
            self._binding.bind_ortvalue_input(name, values[name.removeprefix("acc:")])
        for name in graph.outputs:
            self._binding.bind_ortvalue_output(name, values[name])
        self.has_run = False

    def beside(self) -> GradientSession:
        """Another on the same parameters, with an image, a target and outputs of its own: both may run at once."""
        other = copy.copy(self)
        other._bind({name: self._arrays[name] for name in self._graph.inputs if not name.startswith("acc:")})
        return other

    @property
    def accumulators(self) -> dict[str, np.ndarray]:
        """The arrays that runs add to, by name."""
        return {name: self._arrays[name] for name in self._graph.accumulators}

    def output(self, name: str) -> np.ndarray:
        """The array that holds the output `name` after a run, to be read before the next."""
        return self._arrays[name]

    def run(self, *, release: bool = False) -> None:
        """One micro-batch, from `image` and `target`, into the outputs: accumulators are added to.

        `release` gives the activations' memory back behind this run, for who does something else next.
        """
        # What the arena grew to before it knew the memory pattern is given back once: 20 to 60 MiB off the peak.
        shrink = release or not self.has_run
        self._session.run_with_iobinding(self._binding, self._shrinking if shrink else self._plain)
        self.has_run = True
