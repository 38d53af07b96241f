"""A 3x3 kernel in the domain of Winograd's F(4x4, 3x3), for `_winograd.h`; training need not import onnx for it."""

from __future__ import annotations

import math

import numpy as np

RESULTS, SIDE = 4, 6  # of a tile: results a side, and what they are made from
PLACES = SIDE * SIDE
BLOCK = 2048  # kernels that are transformed at once: all that lies between is half a megabyte
# At the points 0, 1, -1, 2, -2 and infinity (Lavin and Gray 2016, arXiv 1509.09308, section 4.3).
KERNEL = np.array(
    [[1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6], [1 / 24, 1 / 12, 1 / 6],
     [1 / 24, -1 / 12, 1 / 6], [0, 0, 1]]
)  # fmt: skip


def transform_into(places: np.ndarray, weight: np.ndarray, mask: np.ndarray) -> None:
    """U = G (M W) G' into (36, O, I), of W (O, I, 3, 3) and each kernel's mask M (O, I); all float32.

    By sums that are written down, as a product of matrices has other bits with another number of threads.
    """
    O, I = mask.shape
    rows = max(1, BLOCK // I)
    for part in (slice(first, first + rows) for first in range(0, O, rows)):
        _transform_rows_into(places[:, part], weight[part], mask[part])


def _transform_rows_into(places: np.ndarray, weight: np.ndarray, mask: np.ndarray) -> None:
    O, I = mask.shape
    taps = np.ascontiguousarray(weight.reshape(O * I, 9).T).reshape(3, 3, O, I)
    taps *= mask
    half = np.empty((SIDE, 3, O, I), np.float32)
    _into(half, *taps)
    _into(places.reshape(SIDE, SIDE, O, I).swapaxes(0, 1), *half.swapaxes(0, 1))


def _into(out: np.ndarray, first: np.ndarray, middle: np.ndarray, last: np.ndarray) -> None:
    """The six rows of KERNEL times a column of three, each an array."""
    ends = (first + last) * np.float32(1 / 6)
    slopes = first * np.float32(1 / 24) + last * np.float32(1 / 6)
    sixth, twelfth = middle * np.float32(1 / 6), middle * np.float32(1 / 12)
    np.multiply(first, np.float32(1 / 4), out=out[0])
    np.negative(ends + sixth, out=out[1])
    np.subtract(sixth, ends, out=out[2])
    np.add(slopes, twelfth, out=out[3])
    np.subtract(slopes, twelfth, out=out[4])
    out[5] = last


def tiles(h: int, w: int) -> int:
    """How many cover h x w results, with the one that stands behind each row."""
    return math.ceil(h / RESULTS) * (math.ceil(w / RESULTS) + 1)
