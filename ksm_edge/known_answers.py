"""What the loops of _native.c must make of a few numbers: a compiler that made them wrong would else go unnoticed.

Packs learned here would be fused, and digested, into other weights than elsewhere, and training would only be worse. It
takes a millisecond, so each process that loads them asks anew. What is asked is mostly good input: of refusals one
for each loop that is given a pack's bytes. One that crashes ends the process, which nobody overlooks.
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
    asked = {"adam": _descends, "apart": _finds, "decode_keep": _decodes, "feel": _feels, "fuse": _fuses}
    return [name for name, answers_right in asked.items() if not _holds(answers_right, loops)]


def _holds(answers_right: Callable[[ModuleType], bool], loops: ModuleType) -> bool:
    try:
        return answers_right(loops)
    except (AttributeError, SystemError, TypeError, ValueError):  # it is not there, or refuses
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
    """And refuses bytes of which the last is missing."""
    expected = cuts()
    shapes = np.array([SHAPE] * len(expected), np.int64)
    places, counts = loops.decode_keep(KEEP_BITS, shapes)
    is_right = np.array_equal(np.frombuffer(places, np.int32), np.concatenate(expected))
    return is_right and counts == [cut.size for cut in expected] and loops.decode_keep(KEEP_BITS[:-1], shapes) is None


def _finds(loops: ModuleType) -> bool:
    """Many, of which one is no number, and few: one of nine, so that they lie at all places of eight."""
    many, few = _numbers(3 * CELLS), np.zeros(3 * CELLS, np.float32)
    many[CELLS], few[::9] = np.nan, -1
    return all(_finds_apart(loops, score, -0.5, 0.75) for score in (many, few))


def _finds_apart(loops: ModuleType, score: np.ndarray, least: float, most: float) -> bool:
    found = np.frombuffer(loops.apart(score, least, most), np.int32)
    return np.array_equal(found, np.flatnonzero(~(score >= least) | (score > most)))


def _fuses(loops: ModuleType) -> bool:
    """Bit for bit, with kernels of one weight and of nine; places that descend are refused."""
    cut = np.flatnonzero(_numbers(3 * CELLS) > 0.5).astype(np.int32)
    return all(_fuses_kernels(loops, side, cut) for side in (1, 3)) and _refuses(loops, cut[::-1].copy())


def _refuses(loops: ModuleType, cut: np.ndarray) -> bool:
    try:
        _fuses_kernels(loops, 1, cut)
    except ValueError:
        return True
    return False


def _fuses_kernels(loops: ModuleType, side: int, cut: np.ndarray) -> bool:
    weight, factor = _numbers(3, CELLS, side, side), _numbers(3)
    scale, out = _numbers(cut.size), np.empty_like(weight)
    loops.fuse(weight, factor, cut, scale, out)
    weight.reshape(-1, side * side)[cut] *= scale[:, None]
    return np.array_equal(out, weight * factor[:, None, None, None])


def _feels(loops: ModuleType) -> bool:
    """All but sums bit for bit, with and without a weight."""
    cut = np.flatnonzero(_numbers(3 * CELLS) > 0.5).astype(np.int32)
    scale, factor = _numbers(cut.size), _numbers(3) * 3
    mask = np.ones((3, CELLS), np.float32)
    mask.reshape(-1)[cut] = scale
    for weight in (None, np.cos(_numbers(3, CELLS))):
        felt, sums = _numbers(3, CELLS), np.empty(3, np.float32)
        S = felt if weight is None else weight * felt
        expected = S * factor[:, None], (S * mask).sum(axis=1)
        loops.feel(felt, weight, factor, cut, scale, sums)
        if not np.array_equal(felt, expected[0]) or not np.allclose(sums, expected[1], 1e-5, 1e-5):
            return False
    return True


def _descends(loops: ModuleType) -> bool:
    """Bit for bit; with the gradients of scores, and beyond where they end, to a hundred thousandth, and from no
    momentum, which would hide them.
    """
    plain = _step(loops, momentum=0.75)
    of_scores = [pair for slope in (18.0, 60.0) for pair in _step(loops, momentum=0.0, slope=slope, shift=1.0)]
    return all(np.array_equal(*pair) for pair in plain) and all(np.allclose(*pair, 1e-5, 1e-8) for pair in of_scores)


def _step(
    loops: ModuleType, momentum: float, slope: float = 0.0, shift: float = 0.0
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Parameter, mean and square as they make them, each with what it should be."""
    p, g, m, v = _numbers(4, CELLS)
    v = np.abs(v)
    found = [p.copy(), m.copy(), v.copy()]
    decay, size, floor, stay = 0.875, 2**-7, 2**-10, float(p[CELLS // 2])  # as exact in float32
    loops.adam(found[0], g, *found[1:], momentum, decay, size, floor, stay, slope, shift)
    if slope:
        kept = slope / 2 / np.cosh(slope * p.astype(np.float64) - shift) ** 2
        g = (g * kept).astype(np.float32)
    m = m * np.float32(momentum) + np.float32(1 - momentum) * g
    v = v * np.float32(decay) + g * g * np.float32(1 - decay)
    moved = p - m / (np.sqrt(v) + np.float32(floor)) * np.float32(size)
    return zip(found, (np.where(p == stay, p, moved), m, v), strict=True)


def _numbers(*shape: int) -> np.ndarray:
    """Of both signs, float32."""
    count = int(np.prod(shape))
    return np.sin(np.arange(1, count + 1), dtype=np.float32).reshape(shape)
