"""A gradient graph with the numbers that it is run on; who runs it need not import onnx, and what takes its memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Example:
    """Numbers are float32; those of one network are the same ones for every graph of it."""

    model: bytes
    inputs: dict[str, np.ndarray]
    externals: dict[str, np.ndarray]  # initializers
    outputs: tuple[str, ...]
