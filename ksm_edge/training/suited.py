"""Defaults that follow from the backbone: what suits one does not suit another.

**Rates.** With frozen statistics nothing rescales what a step changes, so it is the change of the whole network that a
rate has to suit. Adam moves every number of a layer by about the rate: a gamma by rate / gamma of its size, and a score
a step nearer to the threshold where its kernel is cut. The layers' changes add up. So rates are given for a backbone of
52 layers whose gammas are about 0.21, MobileNetV2's numbers, and grow where layers are fewer and gammas larger.

**Thinning** halves packs where nearly every kernel is a single weight and a mask has as many scores as the layer has
weights. Where kernels are of k x k weights there are few of them, and each counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ksm_edge.bundle.layers import Bundle, LayerWeights

LAYERS, GAMMA = 52, 0.21
LEAST, MOST = 0.2, 10.0
# Share of the cut kernels that is put back half-way, from so many kernels a weight on.
THIN, SINGLE_WEIGHTS = 0.5, 0.5


@dataclass(frozen=True)
class RateScale:
    """Factors of the scores' rate and of batch-norm's, to a tenth: rates are not known better."""

    score: float = 1.0
    norm: float = 1.0


def rate_scale(bundle: Bundle) -> RateScale:
    """Those of this backbone, (1, 1) for MobileNetV2. Biases of one without batch-norm are as if gammas were 0.21."""
    depth = LAYERS / len(bundle.layers)
    names = [layer.name for layer in bundle.layers if layer.has_norm]
    return RateScale(_tenths(depth), _tenths(depth * _typical_gamma(bundle.weights, names) / GAMMA))


def usual_thin(bundle: Bundle) -> float:
    """The `thin` of `Settings` where nobody asked for another."""
    shapes = np.array([layer.weight_shape for layer in bundle.layers])
    kernels = (shapes[:, 0] * shapes[:, 1]).sum()
    return THIN if kernels >= SINGLE_WEIGHTS * shapes.prod(axis=1).sum() else 0.0


def _typical_gamma(weights: Mapping[str, LayerWeights], names: list[str]) -> float:
    """The median over layers of each layer's median."""
    if not names:
        return GAMMA
    return float(np.median([np.median(np.abs(weights[name].gamma)) for name in names]))


def _tenths(factor: float) -> float:
    return round(min(max(factor, LEAST), MOST), 1)
