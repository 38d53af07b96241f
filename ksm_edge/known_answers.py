"""What the loops of _native.c must make of a few numbers: nothing else would tell that a compiler made them wrong.

A pack would be fused into other weights than elsewhere, with a digest to match, and training would only be worse. It
takes half a millisecond, so each process that loads them asks anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType

import numpy as np

# More than any processor has in one register, and no multiple of it.
CELLS = 37
# Layers whose rows, columns, both or neither are told apart, and one of which nothing is cut, as `encode_keep` codes
# what `cuts` says.
SHAPE = (16, 20)
BUSY = [((), ()), ((2, 9), ()), ((), (5, 6, 13)), ((2, 9), (5, 6, 13))]
KEEP_BITS = bytes.fromhex(
    "0111021118030f1c040f171305000a5956528ea23666ccd98699b0d9894a5252949b2d936401376c8126ec636c36600ddb224dd892a92d3240"
    "39187230e46189c493f967f24153f53e9a7d0dd9d1d5632a66622ec0"
)


def wrong(loops: ModuleType) -> list[str]:
    """Names of those whose answers differ."""
    asked = {"decode_keep": _decodes, "fuse": _fuses, "adam": _descends}
    return [name for name, answers_right in asked.items() if not _holds(answers_right, loops)]


def _holds(answers_right: Callable[[ModuleType], bool], loops: ModuleType) -> bool:
    try:
        return answers_right(loops)
    except (TypeError, ValueError):  # with which they refuse arrays that do not fit
        return False


def cuts() -> list[np.ndarray]:
    """Places in each layer: many in busy rows and columns, few elsewhere."""
    scattered = (np.arange(SHAPE[0] * SHAPE[1]) * 7919 % 101).reshape(SHAPE)
    found = []
    for rows, columns in BUSY:
        limit = np.full(SHAPE, 5)
        limit[list(rows)] = limit[:, list(columns)] = 60
        found.append(np.flatnonzero(scattered < limit))
    return [*found, found[0][:0]]


def _decodes(loops: ModuleType) -> bool:
    expected = cuts()
    found = loops.decode_keep(KEEP_BITS, np.array([SHAPE] * len(expected), np.int64))
    if found is None:
        return False
    places, counts = found
    return counts == [cut.size for cut in expected] and np.array_equal(
        np.frombuffer(places, np.int32), np.concatenate(expected)
    )


def _fuses(loops: ModuleType) -> bool:
    """Bit for bit, with kernels of one weight and of nine."""
    return all(_fuses_kernels(loops, side) for side in (1, 3))


def _fuses_kernels(loops: ModuleType, side: int) -> bool:
    weight, factor = _numbers(3, CELLS, side, side), _numbers(3)
    cut = np.flatnonzero(_numbers(3 * CELLS) > 0.5).astype(np.int32)
    scale, out = _numbers(cut.size), np.empty_like(weight)
    loops.fuse(weight, factor, cut, scale, out)
    weight.reshape(-1, side * side)[cut] *= scale[:, None]
    return np.array_equal(out, weight * factor[:, None, None, None])


def _descends(loops: ModuleType) -> bool:
    """Bit for bit; with the gradients of scores to a hundred thousandth, from no momentum, which would hide them."""
    plain, of_scores = _step(loops, momentum=0.75), _step(loops, momentum=0.0, slope=6.0, shift=1.0)
    return all(np.array_equal(*pair) for pair in plain) and all(np.allclose(*pair, 1e-5, 0) for pair in of_scores)


def _step(
    loops: ModuleType, momentum: float, slope: float = 0.0, shift: float = 0.0
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Parameter, mean and square as they make them, each with what it should be."""
    p, g, m, v = _numbers(4, CELLS)
    v = np.abs(v)
    found = [p.copy(), m.copy(), v.copy()]
    decay, size, floor = 0.875, 2**-7, 2**-10  # as exact in float32
    loops.adam(found[0], g, *found[1:], momentum, decay, size, floor, slope, shift)
    if slope:
        kept = slope / 2 / np.cosh(slope * p.astype(np.float64) - shift) ** 2
        g = (g * kept).astype(np.float32)
    m = m * np.float32(momentum) + np.float32(1 - momentum) * g
    v = v * np.float32(decay) + g * g * np.float32(1 - decay)
    p = p - m / (np.sqrt(v) + np.float32(floor)) * np.float32(size)
    return zip(found, (p, m, v), strict=True)


def _numbers(*shape: int) -> np.ndarray:
    """Of both signs, float32."""
    count = int(np.prod(shape))
    return np.sin(np.arange(1, count + 1), dtype=np.float32).reshape(shape)
