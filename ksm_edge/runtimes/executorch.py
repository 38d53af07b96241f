"""ExecuTorch: what a phone runs, here through its Python package, which needs torch."""

from __future__ import annotations

import importlib.util
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ksm_edge.bundle.mobile import HEAD_WEIGHT, mobile_program
from ksm_edge.errors import UnsupportedError


def available() -> str | None:
    for name in ("torch", "executorch"):
        if importlib.util.find_spec(name) is None:
            return f"the package {name} is not installed: pip install 'ksm-edge[export]'"
    return None


class Session:
    """A bundle's program with one task's weights: images of the bundle's own size, one at a time."""

    def __init__(self, graph: Path | bytes, weights: Mapping[str, np.ndarray], threads: int = 1) -> None:
        """`graph`: `backbone.onnx` of a bundle that was exported with --executorch, beside which its program lies.

        `threads` cannot be chosen here: ExecuTorch has one pool for the whole process, of all its cores.
        """
        if isinstance(graph, bytes):
            raise UnsupportedError("ExecuTorch runs a bundle's program, not a graph in memory: give its path")
        program = mobile_program(graph.parent)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the package is experimental
            from executorch.extension.pybindings.portable_lib import _load_for_executorch_from_buffer
        self._features = program.tensors[HEAD_WEIGHT].shape[1]
        # The module reads from these for as long as it lives.
        self._program, self._data = program.program.read_bytes(), program.data_with(weights)
        self._module = _load_for_executorch_from_buffer(self._program, self._data)
        self._lock = threading.Lock()  # a module has one set of buffers for what it computes

    def run(self, images: np.ndarray) -> np.ndarray:
        """Images (N, 3, S, S) float32 -> features (N, F) float32."""
        import torch

        rows = [np.zeros((0, self._features), np.float32)]
        for image in images:
            with self._lock:
                found, _ = self._module.forward([torch.from_numpy(np.array(image[None], np.float32, order="C"))])
                rows.append(found.numpy().copy())
        return np.concatenate(rows)
