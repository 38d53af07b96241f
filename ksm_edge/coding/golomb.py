"""Golomb codes of whole arrays at once, for distances between rare events.

Where each cell of a sequence holds an event with the same small probability, the number of empty cells before the next
event is geometric, and Golomb codes of such gaps are optimal among prefix codes (Gallager and van Voorhis 1975); they
come within 1 % of the entropy here. A gap g under the divisor m is g // m in unary, then g % m in truncated binary.

The three parts of all gaps lie behind each other rather than gap by gap, so that numpy codes and decodes them in a few
passes: `unary | short remainders | last bits`.
"""

from __future__ import annotations

import numpy as np

from ksm_edge.errors import DamagedFileError


def divisor(cells: int, events: int) -> int:
    """The best m for so many events in so many cells, in whole numbers: 0.693 cells / events + 0.15, rounded down."""
    return max(1, (693 * cells + 150 * events) // (1000 * events))


def encode(gaps: np.ndarray, divisors: np.ndarray) -> bytes:
    """Gaps (n,), each under its own divisor (n,), both int64 -> bytes, the last one filled up with zeros."""
    quotients, remainders = np.divmod(gaps, divisors)
    unary = np.ones(int(quotients.sum()) + gaps.size, np.uint8)
    unary[np.cumsum(quotients + 1) - 1] = 0
    widths, cutoffs = _truncated(divisors)
    is_long = remainders >= cutoffs
    shifted = remainders + cutoffs
    short = np.where(is_long, shifted >> 1, remainders)
    last = (shifted & 1)[is_long & (divisors > 1)].astype(np.uint8)
    return np.packbits(np.concatenate([unary, _put(short, widths), last])).tobytes()


def decode(data: bytes | memoryview, divisors: np.ndarray) -> tuple[np.ndarray, int]:
    """Gaps (n,) int64 for the divisors (n,), and how many bytes they took; DamagedFileError where `data` is too short
    or is not filled up with zeros.
    """
    octets = np.frombuffer(data, np.uint8)
    bits = np.unpackbits(octets)
    count = divisors.size
    ends = np.flatnonzero(bits == 0)[:count]
    if ends.size < count:
        raise DamagedFileError(f"Golomb codes: {count} gaps declared, {ends.size} found")
    start = int(ends[-1]) + 1 if count else 0
    quotients = np.diff(ends, prepend=-1) - 1
    widths, cutoffs = _truncated(divisors)
    remainders, start = _take(octets, start, widths)
    is_long = (remainders >= cutoffs) & (divisors > 1)
    end = start + int(np.count_nonzero(is_long))
    if end > bits.size:
        raise DamagedFileError("Golomb codes: the last remainders are missing")
    remainders[is_long] = 2 * remainders[is_long] + bits[start:end] - cutoffs[is_long]
    used = -(-end // 8)
    if bits[end : 8 * used].any():
        raise DamagedFileError("Golomb codes: bits are set behind the last gap")
    return quotients * divisors + remainders, used


def _truncated(divisors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Truncated binary of 0 .. m - 1: b = ceil(log2 m), cutoff 2^b - m; what lies below takes b - 1 bits, the rest b.

    m = 5: b = 3, cutoff 3; 0, 1, 2 are 00, 01, 10 and 3, 4 are 110, 111. m = 1 takes no bits.
    """
    _, exponents = np.frexp(divisors - 1)  # of 0: 0; of 4 .. 7: 3
    b = exponents.astype(np.int64)
    return np.maximum(b - 1, 0), (1 << b) - divisors


def _put(values: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Each value in as many bits as its width says, the highest first: one bit per uint8."""
    ends = np.cumsum(widths)
    bits = np.zeros(int(ends[-1]) if ends.size else 0, np.uint8)
    for place in range(int(widths.max(initial=0))):
        has = widths > place
        bits[ends[has] - 1 - place] = values[has] >> place & 1
    return bits


def _take(octets: np.ndarray, start: int, widths: np.ndarray) -> tuple[np.ndarray, int]:
    """Undo `_put` from bit `start` on; also where it ended. Widths are at most 25, so four bytes hold every value."""
    ends = start + np.cumsum(widths)
    end = int(ends[-1]) if ends.size else start
    if end > 8 * octets.size:
        raise DamagedFileError("Golomb codes: remainders are missing")
    begins = ends - widths
    first, padded = begins >> 3, np.concatenate([octets, np.zeros(4, np.uint8)]).astype(np.int64)
    window = padded[first] << 24 | padded[first + 1] << 16 | padded[first + 2] << 8 | padded[first + 3]
    return window >> (32 - (begins & 7) - widths) & (1 << widths) - 1, end
