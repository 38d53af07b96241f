"""Golomb codes of whole arrays at once, for distances between rare events.

Where each cell of a sequence holds an event with the same small probability, the number of empty cells before the next
event is geometric, and Golomb codes of such gaps are optimal among prefix codes (Gallager and van Voorhis 1975); they
come within 1 % of the entropy here. A gap g under the divisor m is g // m in unary, then g % m in truncated binary.

The three parts of all gaps lie behind each other rather than gap by gap, so that numpy codes and decodes them in a few
passes: `unary | short remainders | last bits`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ksm_edge.errors import DamagedFileError

# Gaps or bits decoded at a time: a gap may be one bit of a file, and takes ten numbers on the way. For arrays of more
# than 128 KiB the system also hands out new pages each time, which takes longer than to fill them.
BLOCK = 1 << 13
LONGEST = 1 << 26  # gap, a bound that keeps int32 whole: a layer has 2^25 cells at most


def divisor(cells: np.ndarray, events: np.ndarray) -> np.ndarray:
    """The best m for so many events in so many cells, in whole numbers: 0.693 cells / events + 0.15, rounded down.

    Both (g,) int64, and every group with an event.
    """
    return np.maximum(1, (693 * cells + 150 * events) // (1000 * events))


def encode(gaps: np.ndarray, divisors: np.ndarray, counts: np.ndarray) -> bytes:
    """Gaps (n,) of groups, one behind the other, to bytes, the last one filled up with zeros.

    `divisors` and `counts`, (g,): of each group, int64; gaps of any integer type.
    """
    # A bit is a byte until all are there: some ten of them for each gap, where all numbers on the way would take 100.
    unary, shorts, lasts = (list[np.ndarray]() for _ in range(3))
    all_widths, all_cutoffs = _truncated(divisors)
    for block, group in _blocks(counts):
        quotients, remainders = np.divmod(gaps[block], divisors[group])
        ends = np.cumsum(quotients + 1)
        ones = np.ones(int(ends[-1]), np.uint8)
        ones[ends - 1] = 0
        cutoffs = all_cutoffs[group]
        is_long = remainders >= cutoffs
        shifted = remainders + cutoffs
        unary.append(ones)
        shorts.append(_put(np.where(is_long, shifted >> 1, remainders), all_widths[group]))
        lasts.append((shifted & 1)[is_long].astype(np.uint8))
    return np.packbits(np.concatenate([np.zeros(0, np.uint8), *unary, *shorts, *lasts])).tobytes()


def decode(data: bytes | memoryview, divisors: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, int]:
    """The gaps of all groups, (n,) int32, one group behind the other, and how many bytes they took.

    `divisors` and `counts`, (g,) int64: those of each group. DamagedFileError where `data` is too short or is not
    filled up with zeros, or a gap is longer than `LONGEST`.
    """
    octets = np.frombuffer(data, np.uint8)
    gaps, start = _take_unary(octets, int(counts.sum()))
    widths, cutoffs = _truncated(divisors)
    end = start + int(widths @ counts)  # of the short remainders; the last bits are behind it
    for block, group in _blocks(counts):
        remainders, start = _take(octets, start, widths[group])
        is_long = np.flatnonzero(remainders >= cutoffs[group])
        last = _bits(octets, end, is_long.size)
        end += is_long.size
        remainders[is_long] += remainders[is_long] + last - cutoffs[group[is_long]]
        remainders += gaps[block] * divisors[group]
        if remainders.max() > LONGEST:
            raise DamagedFileError(f"Golomb codes: a gap of {remainders.max()}; at most {LONGEST} is possible")
        gaps[block] = remainders
    used = -(-end // 8)
    if _bits(octets, end, 8 * used - end).any():
        raise DamagedFileError("Golomb codes: bits are set behind the last gap")
    return gaps, used


def _blocks(counts: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Gaps of groups, `counts` of them each, some at a time: which, and the group of each of these."""
    ends = np.cumsum(counts)
    for first in range(0, int(ends[-1]) if ends.size else 0, BLOCK):
        stop = min(first + BLOCK, int(ends[-1]))
        low, high = np.searchsorted(ends, (first, stop - 1), "right")
        groups = np.arange(low, high + 1)
        inside = np.minimum(ends[groups], stop) - np.maximum(ends[groups] - counts[groups], first)
        yield slice(first, stop), np.repeat(groups, inside)


def _take_unary(octets: np.ndarray, count: int) -> tuple[np.ndarray, int]:
    """The quotients, (count,) int32, and where they end."""
    quotients, found, last = np.empty(count, np.int32), 0, -1
    for first in range(0, octets.size, BLOCK // 8):
        if found == count:
            break
        ends = np.flatnonzero(np.unpackbits(octets[first : first + BLOCK // 8]) == 0)[: count - found]
        if ends.size:
            ends += 8 * first
            quotients[found : found + ends.size] = np.diff(ends, prepend=last) - 1
            last = int(ends[-1])
            found += ends.size
    if found < count:
        raise DamagedFileError(f"Golomb codes: {count} gaps declared, {found} found")
    return quotients, last + 1


def _bits(octets: np.ndarray, start: int, count: int) -> np.ndarray:
    """So many bits from bit `start` on, as uint8."""
    if start + count > 8 * octets.size:
        raise DamagedFileError("Golomb codes: the last remainders are missing")
    around = np.unpackbits(octets[start >> 3 : -(-(start + count) // 8)])
    return around[start & 7 : (start & 7) + count]


def _truncated(divisors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Truncated binary of 0 .. m - 1: b = ceil(log2 m), cutoff 2^b - m; what lies below takes b - 1 bits, the rest b.

    m = 5: b = 3, cutoff 3; 0, 1, 2 are 00, 01, 10 and 3, 4 are 110, 111. m = 1 takes no bits, its cutoff is 1.
    """
    _, exponents = np.frexp(divisors - 1)  # of 0: 0; of 4 .. 7: 3
    b = exponents.astype(np.int64)
    return np.maximum(b - 1, 0), (1 << b) - divisors + (divisors == 1)


def _put(values: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Each value in as many bits as its width says, the highest first: one bit per uint8."""
    ends = np.cumsum(widths)
    bits = np.zeros(int(ends[-1]) if ends.size else 0, np.uint8)
    for place in range(int(widths.max(initial=0))):
        has = widths > place
        bits[ends[has] - 1 - place] = values[has] >> place & 1
    return bits


def _take(octets: np.ndarray, start: int, widths: np.ndarray) -> tuple[np.ndarray, int]:
    """Undo `_put` from bit `start` on, int64; also where it ended. No width is above 25."""
    ends = np.cumsum(widths)
    ends += start
    end = int(ends[-1]) if ends.size else start
    if end > 8 * octets.size:
        raise DamagedFileError("Golomb codes: remainders are missing")
    ends -= widths  # where each begins
    first = start >> 3
    padded = np.concatenate([octets[first : (end >> 3) + 4], np.zeros(4, np.uint8)])
    words = np.ndarray((end >> 3) - first + 1, ">u4", padded, strides=(1,)).astype(np.int64)  # from each byte on
    values = words[(ends >> 3) - first]
    values >>= 32 - (ends & 7) - widths
    values &= (1 << widths) - 1
    return values, end
