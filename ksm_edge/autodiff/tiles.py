"""A 3x3 kernel in the domain of Winograd's F(4x4, 3x3), for `_winograd.h`; training need not import onnx for it."""

from __future__ import annotations

import math

import numpy as np

RESULTS, SIDE = 4, 6  # of a tile: results a side, and what they are made from
PLACES = SIDE * SIDE
# At the points 0, 1, -1, 2, -2 and infinity (Lavin and Gray 2016, arXiv 1509.09308, section 4.3).
KERNEL = np.array(
    [[1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6], [1 / 24, 1 / 12, 1 / 6],
     [1 / 24, -1 / 12, 1 / 6], [0, 0, 1]]
)  # fmt: skip


_PLACES_OF_TAPS = np.kron(KERNEL, KERNEL).astype(np.float32)  # (36, 9)


def transform_into(places: np.ndarray, weight: np.ndarray, mask: np.ndarray) -> None:
    """U = G W G' times the mask of each kernel (O, I), into (36, O, I), of W (O, I, 3, 3); all float32."""
    O, I = mask.shape
    np.matmul(_PLACES_OF_TAPS, weight.reshape(O * I, 9).T, out=places.reshape(PLACES, O * I))
    places *= mask


def tiles(h: int, w: int) -> int:
    """How many cover h x w results, with the one that stands behind each row."""
    return math.ceil(h / RESULTS) * (math.ceil(w / RESULTS) + 1)
