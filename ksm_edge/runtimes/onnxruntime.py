"""ONNX Runtime, the device's default: fused weights are given at session creation, the model file stays as it is."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ksm_edge import native
from ksm_edge.errors import UnsupportedError


def available() -> str | None:
    if importlib.util.find_spec("onnxruntime") is None:
        return "the package onnxruntime is not installed: pip install onnxruntime"
    return None


def session_options(threads: int) -> Any:
    """`onnxruntime.SessionOptions` for a small board that does other things too: `threads` and no spinning."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3  # errors only: warnings would land between a command's own lines
    # Threads that spin between two runs burn the battery for a few microseconds.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def gradient_session_options(threads: int) -> Any:
    """The same for graphs that may have this project's own operators."""
    options = session_options(threads)
    if native.operators is not None:
        options.register_custom_ops_library(native.operators)
    return options


class Session:
    """A backbone graph in ONNX Runtime with one task's weights, on the CPU."""

    def __init__(
        self,
        graph: Path | bytes,
        weights: Mapping[str, np.ndarray],
        threads: int = 1,
        *,
        optimise: bool = True,
        profile: Path | None = None,
    ) -> None:
        """`graph`: an ONNX file or its bytes; `weights`: every external initializer by name, float32.

        `optimise` False: the graph runs as it is, having been optimised before. `profile`: how the file begins in which
        the runtime writes down the time of every operator, until `end_profile`.
        """
        import onnxruntime

        options = session_options(threads)
        if not optimise:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, str(profile)
        # Copied when the session is made, so that neither these nor `weights` need outlive this call.
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(w)) for w in weights.values()]
        options.add_external_initializers(list(weights), values)
        source = graph if isinstance(graph, bytes) else str(graph)
        try:
            self._session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's own exceptions share no other base
            where = "the given bytes" if isinstance(graph, bytes) else graph
            raise UnsupportedError(
                f"ONNX Runtime {onnxruntime.__version__} does not load {where} with {len(weights)} weights: {error}"
            ) from error

    def run(self, images: np.ndarray) -> np.ndarray:
        """Images (N, 3, H, W) float32 -> features (N, F) float32."""
        (features,) = self._session.run(["features"], {"image": images})
        return features

    def end_profile(self) -> Path:
        """The file of a session that was made with `profile`: JSON, Chrome's trace events."""
        return Path(self._session.end_profiling())
