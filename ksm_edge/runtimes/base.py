"""What every runtime offers: a module with `available` and `Session`, held to one and the same test."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np


class Session(Protocol):
    """One backbone graph with one set of fused weights, ready to run."""

    def run(self, images: np.ndarray) -> np.ndarray:
        """Images (N, 3, H, W) float32, preprocessed -> features (N, F) float32. Safe to call from several threads."""
        ...


class Runtime(Protocol):
    """A module of this package."""

    def available(self) -> str | None:
        """None where it can run here, or the sentence to show why not and what to do. Imports nothing heavy."""
        ...

    def Session(self, graph: Path | bytes, weights: Mapping[str, np.ndarray], threads: int = 1) -> Session:  # noqa: N802 - a class is what fills this place
        """Open `graph` with a copy of its external initializers by name; UnsupportedError where the runtime refuses."""
        ...
