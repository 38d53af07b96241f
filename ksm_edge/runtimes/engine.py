"""What computes gradients: ONNX Runtime on the processor, or torch where there is a GPU for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ksm_edge.bundle.layers import Bundle
from ksm_edge.errors import UsageError
from ksm_edge.resident import give_back
from ksm_edge.runtimes.compile import CompiledGraph
from ksm_edge.runtimes.gradient import GradientSession
from ksm_edge.runtimes.workers import Workers

# By what learning is asked for; both in torch are `torch_gradient`.
ENGINES = ("onnxruntime", "pytorch", "cuda")


@dataclass(frozen=True)
class Engine:
    """A runtime to learn with, and how the threads are shared out."""

    runtime: str = "onnxruntime"
    threads: int = 1
    workers: int = 1  # micro-batches that run at once, each on its share of the threads

    def __post_init__(self) -> None:
        if self.runtime not in ENGINES:
            raise UsageError(f"runtime {self.runtime!r} cannot learn: choose from {', '.join(ENGINES)}")

    @property
    def plans_memory(self) -> bool:
        """Whether what a graph needs is known before it runs. Nobody knows that of torch."""
        return self.runtime == "onnxruntime"

    def __str__(self) -> str:
        return {"cuda": "torch on the GPU", "pytorch": "torch on the processor"}.get(self.runtime, "ONNX Runtime")

    def check(self) -> None:
        """UnsupportedError where it cannot run here."""
        if not self.plans_memory:
            from ksm_edge.runtimes.torch_gradient import require

            require(self._device)

    @property
    def _device(self) -> str:
        return "cuda" if self.runtime == "cuda" else "cpu"

    def open(self, bundle: Bundle, graph: CompiledGraph, bound: Mapping[str, np.ndarray]) -> Workers:
        """Sessions of the graph, all bound to these arrays (see `GradientSession`)."""
        if self.plans_memory:
            import onnxruntime  # noqa: F401

            give_back()  # what was for importing, in front of what is for opening
            # ONNX Runtime counts the thread that calls it, and the sessions share those beside it.
            first = GradientSession(graph, bound, max(1, self.threads - self.workers + 1))
            sessions = [first, *(first.beside() for _ in range(self.workers - 1))]
            give_back()
            return Workers(sessions)
        from ksm_edge.runtimes.torch_gradient import TorchGradientSession, has_half

        # What judges computes as an app will.
        half = graph.spec.backward and has_half(self._device)
        return Workers(
            [TorchGradientSession(bundle, graph, bound, threads=self.threads, device=self._device, half=half)]
        )
