"""Thinning: cut kernels that hardly change the weights go back to 1, and what is left learns to do without them.

Adam moves every score whose gradient keeps its sign, however small, so many of the cut kernels are weights next to
nothing. They cost as many bytes in a pack as the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from ksm_edge.bundle.tensorfile import let_go
from ksm_edge.mask import reduce
from ksm_edge.training.layer import TrainedLayer

AT = 2 / 3  # of all steps: the masks have formed, and batch-norm and head still have time to settle


def late_step(steps: int) -> int:
    """The step, counted from 1, behind which a training of `steps` is thinned and turns to what a pack can hold."""
    return math.ceil(AT * steps)


def thin(layers: Iterable[TrainedLayer], share: float) -> None:
    """Put the given share of all cut kernels, those of least salience, back to 1; none is cut any more from here on."""
    layers = [layer for layer in layers if "score" in layer.learning]
    saliences = [salience(layer) for layer in layers]
    threshold = _least(np.concatenate(saliences), share) if saliences else 0.0
    for layer, values in zip(layers, saliences, strict=True):
        layer.settle(values >= threshold)


def salience(layer: TrainedLayer) -> np.ndarray:
    """How much each cut kernel changes its filter, in the order of the scores: (1 - M)^2 |W_k|^2 over their mean."""
    mask = layer.mask()
    energy = reduce(np.square(layer.pristine.weight), layer.settings.granularity)
    energy = energy.reshape(len(energy), -1)
    change = np.square(1 - mask.cut_scale) * energy.reshape(-1)[mask.cut]
    let_go(layer.pristine.weight)
    mean = energy.mean(axis=1)[mask.cut // energy.shape[1]]
    return change / np.maximum(mean, np.finfo(np.float32).tiny)


def _least(values: np.ndarray, share: float) -> float:
    """The value that the given share of them lies below."""
    count = int(share * values.size)
    return float(np.partition(values, count)[count]) if 0 < count < values.size else 0.0
