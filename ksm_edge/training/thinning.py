"""Thinning: cut kernels that the loss hardly feels go back to 1, and what is left learns to do without them.

Adam moves every score whose gradient keeps its sign, however small, so many of the cut kernels are weights next to
nothing. They cost as many bytes in a pack as the others. What a kernel is worth is told by the squares of its gradient,
which Adam has anyway: their mean stands for the Hessian's diagonal (LeCun, Denker, Solla 1990, "Optimal Brain Damage";
Theis et al. 2018, arXiv 1801.05787, with the Fisher information as here).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from ksm_edge.mask import keep_gradient
from ksm_edge.training.layer import TrainedLayer


def late_step(steps: int, at: float) -> int:
    """The step, counted from 1, behind which a training of `steps` is thinned and turns to what a pack can hold."""
    return math.ceil(at * steps)


def thin(layers: Iterable[TrainedLayer], count: int) -> None:
    """Put so many of all cut kernels, those of least salience, back to 1; none is cut any more from here on."""
    layers = [layer for layer in layers if "score" in layer.learning]
    saliences = [salience(layer) for layer in layers]
    stays = _all_but_least(np.concatenate(saliences), count)
    ends = np.cumsum([values.size for values in saliences])
    for layer, its in zip(layers, np.split(stays, ends[:-1]), strict=True):
        layer.settle(its)


def salience(layer: TrainedLayer) -> np.ndarray:
    """What it would cost to put each cut kernel back, in the order of the scores: (1 - M)^2 (dL/dM)^2."""
    mask = layer.mask()
    chain = keep_gradient(layer.score.reshape(-1)[mask.cut])
    # Far from the threshold scores feel next to nothing of the mask's gradient.
    squares = layer.learning["score"].squares()[mask.cut] / np.maximum(np.square(chain), np.finfo(np.float32).tiny)
    return np.square(1 - mask.cut_scale) * squares


def _all_but_least(values: np.ndarray, count: int) -> np.ndarray:
    """Whether each is none of so many of least value: exactly so many, where values are equal as well."""
    result = np.ones(values.size, bool)
    result[np.argsort(values, kind="stable")[:count]] = False
    return result
