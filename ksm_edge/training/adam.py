"""Adam (Kingma and Ba 2015) over one array, in blocks that stay in cache, and the rates' schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

MOMENTUM, SQUARE_DECAY, EPSILON = 0.9, 0.999, 1e-8
BLOCK = 16_384  # elements: seven float32 blocks fit the 512 KiB of a small core's L2


class Adam:
    """A parameter, changed in place, with its two moments."""

    def __init__(self, parameter: np.ndarray) -> None:
        self.parameter = parameter
        self.mean = np.zeros_like(parameter)
        self.square = np.zeros_like(parameter)

    def step(
        self,
        gradient: np.ndarray,
        rate: float,
        count: int,
        chain: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        """One update; `count` is 1 for the first. `chain` gives d y / d parameter where `gradient` is that of y."""
        # rate m' / (sqrt(v') + epsilon), m' and v' without their start at zero, as size m / (sqrt(v) + floor).
        unbias = math.sqrt(1 - SQUARE_DECAY**count)
        size = np.float32(rate * unbias / (1 - MOMENTUM**count))
        floor = np.float32(EPSILON * unbias)
        arrays = (self.parameter, gradient, self.mean, self.square)
        for p, g, m, v in blocks(*(a.reshape(-1) for a in arrays)):
            if chain is not None:
                g = g * chain(p)
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


def blocks(*arrays: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """Views of flat arrays of one length, some elements at a time."""
    for start in range(0, arrays[0].size, BLOCK):
        yield tuple(array[start : start + BLOCK] for array in arrays)


def rate_factor(step: int, steps: int, warmup: float) -> float:
    """What all rates are multiplied by at `step` of `steps` (from 0): a linear rise, then a cosine down to 0."""
    rising = math.ceil(warmup * steps)
    if step < rising:
        return (step + 1) / (rising + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))
