"""Float32 arrays in a byte an element: the top bits of a float are its logarithm.

Exponent and first mantissa bits, counted down from those of the largest element of a row, in steps of an eighth of an
octave. Rounding is up or down by a threshold that changes with every step, so that it averages out: rounding to the
nearest would keep a running mean where it is, once a step moves it by less than half a code. (Block-wise 8-bit states
of an optimizer are Dettmers et al., 2022; the code is not theirs.)
"""

from __future__ import annotations

import math

import numpy as np

DROPPED = 20  # bits of the mantissa: 3 of 23 are left
SIGNED, POSITIVE = 127, 255  # codes beside that of 0: 16 octaves, a bit being the sign's, and 32
MAGNITUDE = np.int32(2**31 - 1)  # all bits of a float32 but its sign
GOLDEN = (math.sqrt(5) - 1) / 2


def pack_signed(values: np.ndarray, out: np.ndarray, count: int) -> np.ndarray:
    """Float32 (rows, n) into uint8 `out`; returns what `unpack_signed` needs to know of each row's largest: (rows,).

    `count`: of the step, which chooses the threshold. What is 16 octaves below the largest becomes 0.
    """
    bits = values.view(np.int32)
    codes, top = _codes(bits & MAGNITUDE, SIGNED, count)
    codes |= (bits >> 24) & np.int32(0x80)
    np.copyto(out, codes, casting="unsafe")
    return top


def unpack_signed(codes: np.ndarray, top: np.ndarray) -> np.ndarray:
    """What `pack_signed` kept."""
    whole = codes.astype(np.int32)
    bits = _bits(whole & np.int32(SIGNED), top, SIGNED)
    bits |= whole << 24 & ~MAGNITUDE
    return bits.view(np.float32)


def pack_positive(values: np.ndarray, out: np.ndarray, count: int) -> np.ndarray:
    """As `pack_signed`, of what is not negative, over 32 octaves; what is smaller but not 0 becomes the smallest."""
    bits = values.view(np.int32)
    codes, top = _codes(bits, POSITIVE, count)
    np.maximum(codes, np.minimum(bits, 1), out=codes)
    np.copyto(out, codes, casting="unsafe")
    return top


def unpack_positive(codes: np.ndarray, top: np.ndarray) -> np.ndarray:
    """What `pack_positive` kept."""
    return _bits(codes.astype(np.int32), top, POSITIVE).view(np.float32)


def _codes(bits: np.ndarray, most: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Magnitudes as codes up to `most`, and what the largest of each row is without its last bits."""
    # From which share of a code one rounds up: over the steps a sequence that fills [0, 1) evenly.
    codes = bits + np.int32((count * GOLDEN % 1) * (1 << DROPPED))
    codes >>= DROPPED
    top = codes.max(axis=1)
    codes += (np.int32(most) - top)[:, None]
    return np.maximum(codes, 0, out=codes), top


def _bits(codes: np.ndarray, top: np.ndarray, most: int) -> np.ndarray:
    bits = codes + (top.astype(np.int32) - np.int32(most))[:, None]
    np.maximum(bits, 0, out=bits)  # below the smallest float there is only 0
    bits <<= DROPPED
    bits *= np.minimum(codes, 1)
    return bits
