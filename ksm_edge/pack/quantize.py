"""Fewer bits for what a pack holds, such that what has been quantized once is not changed by doing it again."""

from __future__ import annotations

import numpy as np

from ksm_edge.mask import SCALE_LIMIT

SMALLEST_STEP = np.float32(1e-30)  # below it, 24 bits of mantissa are no longer there to be relied on


def quantize_scale(scale: np.ndarray, bits: int) -> np.ndarray:
    """Scales in [0, 0.5] -> uint8 codes in [0, 2^bits - 1], 0 standing for 0 and the greatest for 0.5.

    One in [1.5, 2] has the code of 2 - scale, and the next bit set; `bits` must be less than 8 then.
    """
    amplified = scale > 1
    scale = np.where(amplified, 2 - scale, scale)
    codes = np.rint(scale * np.float32(_levels(bits) / SCALE_LIMIT)).astype(np.uint8)
    return codes | np.left_shift(amplified, bits, dtype=np.uint8)


def dequantize_scale(codes: np.ndarray, bits: int) -> np.ndarray:
    """The float32 scales that the codes stand for."""
    scale = (codes & np.uint8(_levels(bits))).astype(np.float32) * np.float32(SCALE_LIMIT / _levels(bits))
    return np.where(codes > _levels(bits), 2 - scale, scale)


def quantize_difference(difference: np.ndarray, bits: int) -> tuple[np.ndarray, np.float32]:
    """Values of any shape -> int8 codes in [-q, q], q = 2^(bits - 1) - 1, and the float32 step they count in.

    The step keeps 16 bits of its mantissa, rounded up. So q * step is exact in float32, and quantizing the dequantized
    values finds the same step and the same codes again. All values 0 (or next to it) give step 0.

    >>> codes, step = quantize_difference(np.array([0.5, -0.25, 0.0], np.float32), 4)
    >>> codes.tolist()
    [7, -3, 0]
    """
    greatest = np.float32(np.abs(difference).max(initial=0))
    limit = 2 ** (bits - 1) - 1
    step = _round_up(greatest / np.float32(limit))
    if step < SMALLEST_STEP:
        return np.zeros(difference.shape, np.int8), np.float32(0)
    return np.clip(np.rint(difference / step), -limit, limit).astype(np.int8), step


def unsigned(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes in [-q, q] as uint8 in [0, 2 q], q = 2^(bits - 1) - 1."""
    return (codes.astype(np.int16) + (2 ** (bits - 1) - 1)).astype(np.uint8)


def signed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Undo `unsigned`, int16; the one code over 2 q comes out as q + 1, which stands for nothing."""
    return codes.astype(np.int16) - np.int16(2 ** (bits - 1) - 1)


def dequantize_difference(codes: np.ndarray, step: np.ndarray | np.float32) -> np.ndarray:
    """The float32 values that the codes stand for; steps of several rows as (rows, 1)."""
    return codes.astype(np.float32) * step


def _levels(bits: int) -> int:
    return 2**bits - 1


def _round_up(value: np.float32) -> np.float32:
    """The least float32 >= value >= 0 whose last 8 bits are 0."""
    word = int(np.float32(value).view(np.uint32))
    return np.uint32((word + 0xFF) & ~0xFF).view(np.float32)
