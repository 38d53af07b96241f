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

BLOCK = 1 << 16  # gaps or bits decoded at a time: a gap may be one bit of a file, and takes ten numbers on the way


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
    bits, padded = np.unpackbits(octets), np.concatenate([octets, np.zeros(4, np.uint8)])
    gaps, start = _take_unary(bits, divisors.size)
    blocks = [slice(first, first + BLOCK) for first in range(0, divisors.size, BLOCK)]
    end = start + sum(int(_truncated(divisors[block])[0].sum()) for block in blocks)
    for block in blocks:
        m = divisors[block]
        widths, cutoffs = _truncated(m)
        remainders, start = _take(padded, start, widths)
        is_long = (remainders >= cutoffs) & (m > 1)
        last = bits[end : end + int(np.count_nonzero(is_long))]
        end += np.count_nonzero(is_long)
        if end > bits.size:
            raise DamagedFileError("Golomb codes: the last remainders are missing")
        remainders[is_long] = 2 * remainders[is_long] + last - cutoffs[is_long]
        gaps[block] = gaps[block] * m + remainders
    used = -(-end // 8)
    if bits[end : 8 * used].any():
        raise DamagedFileError("Golomb codes: bits are set behind the last gap")
    return gaps, used


def _take_unary(bits: np.ndarray, count: int) -> tuple[np.ndarray, int]:
    """The quotients, (count,) int64, and where they end."""
    quotients, found, last = np.empty(count, np.int64), 0, -1
    for first in range(0, bits.size, BLOCK):
        if found == count:
            break
        ends = first + np.flatnonzero(bits[first : first + BLOCK] == 0)[: count - found]
        quotients[found : found + ends.size] = np.diff(ends, prepend=last) - 1
        found += ends.size
        last = int(ends[-1]) if ends.size else last
    if found < count:
        raise DamagedFileError(f"Golomb codes: {count} gaps declared, {found} found")
    return quotients, last + 1


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


def _take(padded: np.ndarray, start: int, widths: np.ndarray) -> tuple[np.ndarray, int]:
    """Undo `_put` from bit `start` on; also where it ended. `padded`: the bytes and four more, of which each value is
    read, as widths are at most 25.
    """
    ends = start + np.cumsum(widths)
    end = int(ends[-1]) if ends.size else start
    if end > 8 * (padded.size - 4):
        raise DamagedFileError("Golomb codes: remainders are missing")
    begins = ends - widths
    window = np.zeros(widths.size, np.int64)
    for place in range(4):
        window = window << 8 | padded[(begins >> 3) + place]
    return window >> (32 - (begins & 7) - widths) & (1 << widths) - 1, end
