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


def transformed(weight: np.ndarray) -> np.ndarray:
    """U = G W G', (36, O, I) float32, of W (O, I, 3, 3); a kernel's mask multiplies U as it does W."""
    O, I = weight.shape[:2]
    places = np.kron(KERNEL, KERNEL) @ weight.reshape(O * I, 9).T
    return places.reshape(PLACES, O, I).astype(np.float32)


def tiles(h: int, w: int) -> int:
    """How many cover h x w results, with the one that stands behind each row."""
    return math.ceil(h / RESULTS) * (math.ceil(w / RESULTS) + 1)
