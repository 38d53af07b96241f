"""Adam (Kingma and Ba 2015) over one array, in blocks that stay in cache, and the rates' schedule."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from ksm_edge import native
from ksm_edge.mask import SLOPE, THRESHOLD, keep_gradient
from ksm_edge.training.eightbit import pack_positive, pack_signed, unpack_positive, unpack_signed

MOMENTUM, SQUARE_DECAY, EPSILON = 0.9, 0.999, 1e-8
ROWS = 16  # of a block, each with moments of its own range where they are kept in 8 bits
BLOCK = 16_384  # elements: seven float32 blocks fit the 512 KiB of a small core's L2


class Adam:
    """A parameter, changed in place, with its two moments."""

    def __init__(self, parameter: np.ndarray, *, scores: bool = False) -> None:
        """`scores`: that is what the parameter is, and gradients are those of the soft mask."""
        self.parameter, self.scores = parameter, scores
        self.mean, self.square = self._zeros(), self._zeros()

    def _zeros(self) -> np.ndarray:
        return np.zeros_like(self.parameter)

    def state(self, name: str) -> dict[str, np.ndarray]:
        """Everything that changes, under names that begin with the given one; the arrays themselves, not copies."""
        return {name: self.parameter, f"{name}:mean": self.mean, f"{name}:square": self.square}

    def step(self, gradient: np.ndarray, rate: float, count: int) -> None:
        """One update; `count` is 1 for the first."""
        # rate m' / (sqrt(v') + epsilon), m' and v' without their start at zero, as size m / (sqrt(v) + floor).
        unbias = math.sqrt(1 - SQUARE_DECAY**count)
        size, floor = rate * unbias / (1 - MOMENTUM**count), EPSILON * unbias
        for number, (p, g) in enumerate(blocks(self.parameter, gradient)):
            m, v = self._moments(number)
            if native.loops is not None and p.dtype == g.dtype == np.float32:
                slope, shift = (SLOPE, SLOPE * THRESHOLD) if self.scores else (0.0, 0.0)
                native.loops.adam(p, g, m, v, MOMENTUM, SQUARE_DECAY, size, floor, slope, shift)
            else:
                _step(p, g * keep_gradient(p) if self.scores else g, m, v, np.float32(size), np.float32(floor))
            self._keep(number, m, v, count)

    def squares(self) -> np.ndarray:
        """The running mean of the gradient's square, flat, and smaller at first: it began at 0."""
        count = -(-self.parameter.size // BLOCK)
        return np.concatenate([self._moments(number)[1] for number in range(count)] or [np.zeros(0, np.float32)])

    def _moments(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Of one block, to be changed in place."""
        m, v = (block(moment, number) for moment in (self.mean, self.square))
        return m, v

    def _keep(self, number: int, m: np.ndarray, v: np.ndarray, count: int) -> None:
        """Put back what `_moments` gave, if that was a copy."""


def _step(
    p: np.ndarray, g: np.ndarray, m: np.ndarray, v: np.ndarray, size: np.floating[Any], floor: np.floating[Any]
) -> None:
    """p -= size m / (sqrt(v) + floor), with m and v moved by g in front of it."""
    m *= np.float32(MOMENTUM)
    m += (scratch := np.float32(1 - MOMENTUM) * g)
    np.multiply(g, g, out=scratch)
    scratch *= np.float32(1 - SQUARE_DECAY)
    v *= np.float32(SQUARE_DECAY)
    v += scratch
    np.sqrt(v, out=scratch)
    scratch += floor
    np.divide(m, scratch, out=scratch)
    scratch *= size
    p -= scratch


class CompactAdam(Adam):
    """Adam with moments of a byte each, a quarter of the memory.

    What they are rounded to averages out: after 300 steps of noisy gradients parameters have moved as far as with true
    moments, nine in ten to within 8 % (tests/training/test_adam.py). Where one gradient is ten thousand times those
    beside it in its row, these move less.
    """

    def __init__(self, parameter: np.ndarray, *, scores: bool = False) -> None:
        super().__init__(parameter, scores=scores)
        self.tops = np.zeros((-(-parameter.size // BLOCK), 2, ROWS), np.float32)  # of each row's two, see `eightbit`

    def _zeros(self) -> np.ndarray:
        return np.zeros(self.parameter.shape, np.uint8)

    def state(self, name: str) -> dict[str, np.ndarray]:
        return super().state(name) | {f"{name}:tops": self.tops}

    def _moments(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        mean, square = map(_rows, super()._moments(number))
        means, squares = self.tops[number, :, : len(mean)]
        return unpack_signed(mean, means).reshape(-1), unpack_positive(square, squares).reshape(-1)

    def _keep(self, number: int, m: np.ndarray, v: np.ndarray, count: int) -> None:
        mean, square = map(_rows, super()._moments(number))
        tops = self.tops[number, :, : len(mean)]
        tops[0], tops[1] = pack_signed(_rows(m), mean, count), pack_positive(_rows(v), square, count)


def _rows(part: np.ndarray) -> np.ndarray:
    """A flat block as rows that have a largest element each: (rows, n), one row where it does not divide."""
    return part.reshape(ROWS if part.size % ROWS == 0 else 1, -1)


def block(array: np.ndarray, number: int) -> np.ndarray:
    """A view of some elements of an array, laid flat."""
    return array.reshape(-1)[number * BLOCK : (number + 1) * BLOCK]


def blocks(*arrays: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """Views of arrays of one size, some elements at a time."""
    for number in range(-(-arrays[0].size // BLOCK)):
        yield tuple(block(array, number) for array in arrays)


def rate_factor(step: int, steps: int, warmup: float) -> float:
    """What all rates are multiplied by at `step` of `steps` (from 0): a linear rise, then a cosine down to 0."""
    rising = math.ceil(warmup * steps)
    if step < rising:
        return (step + 1) / (rising + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))
