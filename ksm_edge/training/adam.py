"""Adam (Kingma and Ba 2015) over one array, and the rates' schedule."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from ksm_edge import native
from ksm_edge.mask import SLOPE, THRESHOLD, keep_gradient
from ksm_edge.training.blocks import block, blocks, count_of_blocks
from ksm_edge.training.eightbit import pack_positive, pack_signed, unpack_positive, unpack_signed

MOMENTUM, SQUARE_DECAY, EPSILON = 0.9, 0.999, 1e-8
ROWS = 16  # of a block, each with moments of its own range where they are kept in 8 bits


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

    def step(self, gradient: np.ndarray, rate: float, count: int, *, stay: float = math.nan) -> None:
        """One update by a gradient in one piece; `count` is 1 for the first. What is exactly `stay` stays so."""
        self._descend(self.parameter, gradient, self.mean, self.square, _move_at(rate, count, stay))

    def squares(self) -> np.ndarray:
        """The running mean of the gradient's square, flat, and smaller at first: it began at 0. It may be a view."""
        return self.square.reshape(-1)

    def _descend(
        self, parameter: np.ndarray, gradient: np.ndarray, mean: np.ndarray, square: np.ndarray, move: _Move
    ) -> None:
        """All or a part of it; in one pass over memory where that is possible."""
        if native.loops is not None and parameter.dtype == gradient.dtype == np.float32:
            slope, shift = (SLOPE, SLOPE * THRESHOLD) if self.scores else (0.0, 0.0)
            native.loops.adam(parameter, gradient, mean, square, MOMENTUM, SQUARE_DECAY, *move, slope, shift)
            return
        for p, g, m, v in blocks(parameter, gradient, mean, square):
            stays = p == p.dtype.type(move.stay)
            _descend_block(p, g * keep_gradient(p) if self.scores else g, m, v, move)
            p[stays] = move.stay


class _Move(NamedTuple):
    """How parameters move: by size m / (sqrt(v) + floor), and not at all where they are `stay`."""

    size: float
    floor: float
    stay: float


def _move_at(rate: float, count: int, stay: float) -> _Move:
    """By rate m' / (sqrt(v') + epsilon), m' and v' being m and v without their start at zero."""
    unbias = math.sqrt(1 - SQUARE_DECAY**count)
    return _Move(rate * unbias / (1 - MOMENTUM**count), EPSILON * unbias, stay)


def _descend_block(p: np.ndarray, g: np.ndarray, m: np.ndarray, v: np.ndarray, move: _Move) -> None:
    """All of it, with m and v moved by g in front."""
    m *= np.float32(MOMENTUM)
    m += (scratch := np.float32(1 - MOMENTUM) * g)
    np.multiply(g, g, out=scratch)
    scratch *= np.float32(1 - SQUARE_DECAY)
    v *= np.float32(SQUARE_DECAY)
    v += scratch
    np.sqrt(v, out=scratch)
    scratch += np.float32(move.floor)
    np.divide(m, scratch, out=scratch)
    scratch *= np.float32(move.size)
    p -= scratch


class CompactAdam(Adam):
    """Adam with moments of a byte each, a quarter of the memory.

    What they are rounded to averages out: after 300 steps of noisy gradients parameters have moved as far as with true
    moments, nine in ten to within 8 % (tests/training/test_adam.py). Where one gradient is ten thousand times those
    beside it in its row, these move less.
    """

    def __init__(self, parameter: np.ndarray, *, scores: bool = False) -> None:
        super().__init__(parameter, scores=scores)
        self.tops = np.zeros((count_of_blocks(parameter), 2, ROWS), np.float32)  # of each row's two, see `eightbit`

    def _zeros(self) -> np.ndarray:
        return np.zeros(self.parameter.shape, np.uint8)

    def state(self, name: str) -> dict[str, np.ndarray]:
        return super().state(name) | {f"{name}:tops": self.tops}

    def step(self, gradient: np.ndarray, rate: float, count: int, *, stay: float = math.nan) -> None:
        move = _move_at(rate, count, stay)
        for number, (p, g) in enumerate(blocks(self.parameter, gradient)):
            m, v = self._moments(number)
            self._descend(p, g, m, v, move)
            self._keep(number, m, v, count)

    def squares(self) -> np.ndarray:
        moments = [self._moments(number)[1] for number in range(count_of_blocks(self.parameter))]
        return np.concatenate([np.zeros(0, np.float32), *moments])

    def _moments(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Of one block, to be changed and put back by `_keep`."""
        mean, square, (means, squares) = self._kept(number)
        return unpack_signed(mean, means).reshape(-1), unpack_positive(square, squares).reshape(-1)

    def _keep(self, number: int, m: np.ndarray, v: np.ndarray, count: int) -> None:
        mean, square, tops = self._kept(number)
        tops[0], tops[1] = pack_signed(_rows(m), mean, count), pack_positive(_rows(v), square, count)

    def _kept(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of one block, each in rows: both moments' bytes, and the largest of each row's two, (2, rows)."""
        mean, square = (_rows(block(moment, number)) for moment in (self.mean, self.square))
        return mean, square, self.tops[number, :, : len(mean)]


def _rows(part: np.ndarray) -> np.ndarray:
    """A flat block as rows that have a largest element each: (rows, n), one row where it does not divide."""
    return part.reshape(ROWS if part.size % ROWS == 0 else 1, -1)


def rate_factor(step: int, steps: int, warmup: float) -> float:
    """What all rates are multiplied by at `step` of `steps` (from 0): a linear rise, then a cosine down to 0."""
    rising = math.ceil(warmup * steps)
    if step < rising:
        return (step + 1) / (rising + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))
