"""The maths of kernel-wise soft masks (KSM), in numpy: the oracle everything else is tested against.

Source: Yang, He, Zhang, Fan, "KSM: Fast Multiple Task Adaption via Kernel-wise Soft Mask Learning", CVPR 2021
(arXiv 2009.05668), and the constants of the authors' released code.

Letters: weight (O, I, kh, kw), I counting in-channels per group, so a depthwise conv has I = 1. The shape of a
score, and of all that is made from it, follows the granularity:

    kernel   (O, I)           one score per weight[o, i]: the paper's
    group:N  (O, ceil(I/N))   one per N neighbouring in-channels
    channel  (O, 1)           one per filter
    element  (O, I, kh, kw)   one per weight, as in Piggyback
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ksm_edge import native
from ksm_edge.errors import UsageError

THRESHOLD = 5e-3
INITIAL_SCORE = 1e-2
AMPLIFIED = 2 * INITIAL_SCORE - THRESHOLD  # above it, where masks amplify: as far from the initial score
SCALE_LIMIT = 0.5
GROUP_DIGITS = 9  # of the N in group:N; in-channels beyond a layer's own change nothing
SMALLEST_RANGE = 1e-30  # of scores; below it float32 cannot hold 0.5 / range, and the range counts as none
# The authors' beta 1200 over their temperature 100: softmax over (log p, log(1 - p)) / T is sigmoid(x / T).
SHARPNESS = 12.0
SLOPE = SHARPNESS / 2

Shape = tuple[int, ...]


@dataclass(frozen=True)
class SoftMask:
    """What a layer's scores say, told by what is cut, mostly a few hundredths of it, and the range it was made from.

    Where masks amplify, amplified kernels stand among the cut ones: they too are not kept as they are.
    """

    cut: np.ndarray  # (n,) int32: flat places of the cut scores, ascending
    cut_scale: np.ndarray  # (n,) float32: their scales, in [0, 0.5], or in [1.5, 2] if amplified
    shape: Shape  # of the scores
    low: float
    high: float

    @property
    def keep(self) -> np.ndarray:
        """b, bool, score-shaped."""
        keep = np.ones(self.shape, bool)
        keep.reshape(-1)[self.cut] = False
        return keep

    @property
    def scale(self) -> np.ndarray:
        """a, score-shaped: 0 where kept."""
        scale = np.zeros(self.shape, self.cut_scale.dtype)
        scale.reshape(-1)[self.cut] = self.cut_scale
        return scale

    @property
    def values(self) -> np.ndarray:
        """The soft mask M = keep + scale, score-shaped: 1 where kept, elsewhere in [0, 0.5] or [1.5, 2]."""
        values = np.ones(self.shape, self.cut_scale.dtype)
        values.reshape(-1)[self.cut] = self.cut_scale
        return values


def score_shape(weight_shape: Shape, granularity: str) -> Shape:
    """The shape of the scores of a layer whose weight is (O, I, kh, kw).

    >>> score_shape((8, 6, 3, 3), "group:4")
    (8, 2)
    """
    O, I, kh, kw = weight_shape
    if granularity == "kernel":
        return (O, I)
    if granularity == "channel":
        return (O, 1)
    if granularity == "element":
        return (O, I, kh, kw)
    return (O, -(-I // group_size(granularity)))


def group_size(granularity: str) -> int:
    """N of `group:N`; raises UsageError for what is no granularity at all."""
    kind, _, size = granularity.partition(":")
    is_number = size.isascii() and size.isdecimal() and len(size) <= GROUP_DIGITS
    if kind != "group" or not is_number or int(size) < 1:
        raise UsageError(
            f"granularity {granularity[:40]!r}: expected kernel, group:N with N >= 1 (of at most {GROUP_DIGITS} "
            "digits), channel or element"
        )
    return int(size)


def soft_mask(score: np.ndarray, *, soft: bool = True, amplify: bool = False) -> SoftMask:
    """Turn a layer's scores into keep bits and scales; `soft=False` is the binary form, all scales 0.

    The range is taken over the WHOLE layer of score * (1 - keep), so the zeros of kept kernels take part.
    `amplify`, this project's own, of soft masks: a score d above the initial one gives 2 - M, M that of d below it.
    """
    number, amplify = score.dtype.type, amplify and soft
    places = _apart(score, AMPLIFIED if amplify else np.inf)
    cut = score.reshape(-1)[places]
    amplified = cut > number(INITIAL_SCORE)
    if amplify:
        # Those above the initial score as far below it; the others are the lesser of the two.
        np.minimum(cut, number(2 * INITIAL_SCORE) - cut, out=cut)
    scale = np.zeros_like(cut)
    low, high = (float(cut.min()), float(cut.max())) if cut.size else (0.0, 0.0)
    if cut.size < score.size:
        low, high = min(low, 0.0), max(high, 0.0)
    if soft and high - low > SMALLEST_RANGE:
        np.subtract(cut, number(low), out=scale)
        scale *= number(SCALE_LIMIT / (high - low))
        np.clip(scale, 0, SCALE_LIMIT, out=scale)  # rounding may pass the ends by an ulp
    if amplify:
        np.subtract(2, scale, out=scale, where=amplified)
    return SoftMask(places, scale, score.shape, low, high)


def _apart(score: np.ndarray, most: float) -> np.ndarray:
    """Flat places, int32 and ascending, of scores below the threshold or above `most`, or that are no numbers."""
    if native.loops is not None and score.dtype == np.float32 and score.flags.c_contiguous and score.flags.aligned:
        return np.frombuffer(native.loops.apart(score, THRESHOLD, most), np.int32)
    number = score.dtype.type
    return np.flatnonzero(~(score >= number(THRESHOLD)) | (score > number(most))).astype(np.int32)


def score_from_scale(mask: SoftMask) -> np.ndarray:
    """Scores that would give this mask: cut ones back from their scale, kept ones at the initial score."""
    amplified = mask.cut_scale > 1
    scale = np.where(amplified, 2 - mask.cut_scale, mask.cut_scale)
    cut = mask.low + (mask.high - mask.low) / SCALE_LIMIT * scale
    score = np.full(mask.shape, INITIAL_SCORE, np.float32)
    score.reshape(-1)[mask.cut] = np.where(amplified, 2 * INITIAL_SCORE - cut, cut)
    return score


def expand(mask: np.ndarray, weight_shape: Shape, granularity: str) -> np.ndarray:
    """A score-shaped array as one that broadcasts against the weight (O, I, kh, kw)."""
    if granularity == "element":
        return mask
    if granularity.startswith("group"):
        # group:3 over I = 8, score (O, 3): the columns stand for 3, 3 and the last 2 in-channels.
        I = weight_shape[1]
        mask = np.repeat(mask, min(group_size(granularity), I), axis=1)[:, :I]
    return mask[:, :, None, None]


def reduce(product: np.ndarray, granularity: str) -> np.ndarray:
    """Sum W * dL/dW', (O, I, kh, kw), over the weights that share a score: score-shaped. Transpose of `expand`."""
    if granularity == "element":
        return product
    return reduce_kernels(product.sum(axis=(2, 3)), granularity)


def reduce_kernels(product: np.ndarray, granularity: str) -> np.ndarray:
    """The same for products already summed over each kernel, (O, I)."""
    if granularity == "kernel":
        return product
    if granularity == "channel":
        return product.sum(axis=1, keepdims=True)
    return np.add.reduceat(product, np.arange(0, product.shape[1], group_size(granularity)), axis=1)


def keep_gradient(score: np.ndarray) -> np.ndarray:
    """d keep / d score, score-shaped, soft where keep is hard: 12 g (1 - g), g = sigmoid(12 (score - threshold))."""
    # 4 g (1 - g) = 1 - tanh^2(x / 2) for g = sigmoid(x): fewer passes than the exponential, and nothing can overflow.
    number = score.dtype.type
    t = np.tanh(number(SLOPE) * score - number(SLOPE * THRESHOLD))
    return number(SLOPE / 2) * (1 - t * t)


def score_gradient(score: np.ndarray, product: np.ndarray, granularity: str = "kernel") -> np.ndarray:
    """Gradient of the loss for the scores, given `product` = W * dL/dW', (O, I, kh, kw). The scale carries none."""
    return keep_gradient(score) * reduce(product, granularity)
