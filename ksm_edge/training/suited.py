"""Defaults that follow from the backbone and the task: what suits one does not suit another.

**Rates.** With frozen statistics nothing rescales what a step changes, so it is the change of the whole network that a
rate has to suit. Adam moves every number of a layer by about the rate: a gamma by rate / gamma of its size, and a score
a step nearer to the threshold where its kernel is cut. The layers' changes add up. So rates are given for a backbone of
52 layers whose gammas are about 0.21, MobileNetV2's numbers, and grow where layers are fewer and gammas larger.
A step of the head moves an answer by its rate times the sum of all features, which is 510 there. Where that is less the
rate is as much larger: a head that runs ahead of the layers in front of it, or lags behind, leaves them less to learn.

**Cut kernels** make a pack large where nearly every kernel is a single weight, and a mask has as many scores as its
layer has weights. So masks are thinned to what a pack has room for that takes a hundredth of the backbone's bytes: of
32 bits a weight that is 0.32, and batch-norm and head need some of it. Beyond ten classes a pack may grow with them.

**Amplified kernels** are as many again as cut ones, and each of both takes a bit more. Where a pack has room for them
they are worth it: on a small backbone, and for many classes. Where it has not, they push cut ones out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ksm_edge.bundle.layers import Bundle, LayerWeights
from ksm_edge.coding.keep import entropy
from ksm_edge.training.settings import Settings

LAYERS, GAMMA, FEATURE_SUM = 52, 0.21, 510.0
LEAST, MOST = 0.2, 10.0
CLASSES = 10  # from which on a pack may grow
MOST_BITS = 8  # of a scale, which leave none for what amplifies
AMPLIFYING_ROOM = 1.0  # bits a score, from which on masks amplify: those of a seventh of the kernels


@dataclass(frozen=True)
class RateScale:
    """Factors of the scores' rate, batch-norm's and the head's, to a tenth: rates are not known better."""

    score: float = 1.0
    norm: float = 1.0
    head: float = 1.0


def rate_scale(bundle: Bundle) -> RateScale:
    """Those of this backbone, 1 for MobileNetV2. Biases of one without batch-norm are as if gammas were 0.21."""
    depth = LAYERS / len(bundle.layers)
    names = [layer.name for layer in bundle.layers if layer.has_norm]
    gammas = _typical_gamma(bundle.weights, names) / GAMMA
    return RateScale(_tenths(depth), _tenths(depth * gammas), _tenths(FEATURE_SUM / max(bundle.feature_sum, 1e-9)))


def most_cut(bundle: Bundle, scores: int, classes: int, settings: Settings) -> int:
    """How many of so many scores may be cut in the end, by `mask_bits`; all of them where that is never too much."""
    amplify = amplifies(bundle, scores, classes, settings)
    scale_bits = settings.scale_bits + amplify if settings.soft else 0
    room = _room(bundle, classes, settings)
    low, high = 0, round(scores / (1 + 2**-scale_bits))  # up to there every one more takes more bits
    if mask_bits(high, scores, scale_bits) <= room:
        return scores
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if mask_bits(middle, scores, scale_bits) <= room else (low, middle)
    return low


def amplifies(bundle: Bundle, scores: int, classes: int, settings: Settings) -> bool:
    """Whether kernels may grow: as asked for, or else where `mask_bits` limits a pack, and leaves room."""
    if settings.amplify is not None:
        return settings.amplify
    possible = settings.soft and settings.scale_bits < MOST_BITS and scores > 0
    return possible and settings.thin is None and _room(bundle, classes, settings) >= AMPLIFYING_ROOM * scores


def _room(bundle: Bundle, classes: int, settings: Settings) -> float:
    """Bits that masks may take."""
    weights = sum(math.prod(layer.weight_shape) for layer in bundle.layers)
    return settings.mask_bits * weights * max(1.0, classes / CLASSES)


def mask_bits(cut: int, scores: int, scale_bits: int) -> float:
    """What masks take in a pack if so many scores are cut, anywhere: their entropy, and a scale each."""
    return float(entropy(cut, max(1, scores))) + cut * scale_bits


def _typical_gamma(weights: Mapping[str, LayerWeights], names: list[str]) -> float:
    """The median over layers of each layer's median."""
    if not names:
        return GAMMA
    return float(np.median([np.median(np.abs(weights[name].gamma)) for name in names]))


def _tenths(factor: float) -> float:
    return round(min(max(factor, LEAST), MOST), 1)
