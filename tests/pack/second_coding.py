"""Keep bits and codes, read as docs/pack-format.md says (its bullets in brackets), and with nothing of ours.

Slow and plain on purpose: bits are strings of "0" and "1".
"""

from __future__ import annotations

import zlib

import numpy as np


class RefusedError(Exception):
    """The file breaks a MUST."""


def read_packed(data: bytes, tables: list[tuple[int, int]]) -> list[np.ndarray]:
    """(18)"""
    sizes = [O * X for O, X in tables]
    total = sum(sizes)
    bits = np.unpackbits(np.frombuffer(inflate(data, -(-total // 8)), np.uint8)).astype(bool)
    require(not bits[total:].any(), "bits behind the last one (18)")
    return [part.reshape(table) for part, table in zip(split(bits[:total], sizes), tables, strict=True)]


def read_groups(data: bytes, tables: list[tuple[int, int]]) -> list[np.ndarray]:
    """(19 to 23)"""
    position = 0
    kinds, counts = [], []
    for _ in tables:
        kind, position = read_number(data, position)
        require(kind <= 4, f"kind {kind} (20)")
        layer_counts = []
        for _ in range((0, 1, 2, 2, 4)[kind]):
            count, position = read_number(data, position)
            layer_counts.append(count)
        kinds.append(kind)
        counts.append(layer_counts)
    busy, position = read_number(data, position)
    sizes = [
        size
        for (O, X), kind in zip(tables, kinds, strict=True)
        for size in (O if kind in (2, 4) else 0, X if kind in (3, 4) else 0)
    ]
    (places,), position = read_gaps(data, position, [(sum(sizes), busy)])
    flags = np.zeros(sum(sizes), bool)
    flags[places] = True
    parts = split(flags, sizes)
    groups, cells = [], []
    for i, ((O, X), kind, layer_counts) in enumerate(zip(tables, kinds, counts, strict=True)):
        row_kinds, column_kinds = [np.arange(O)], [np.arange(X)]
        if kind in (2, 4):
            row_kinds = [np.flatnonzero(~parts[2 * i]), np.flatnonzero(parts[2 * i])]
        if kind in (3, 4):
            column_kinds = [np.flatnonzero(~parts[2 * i + 1]), np.flatnonzero(parts[2 * i + 1])]
        require(all(map(len, row_kinds)) and all(map(len, column_kinds)), "all calm or all busy (21)")
        layer_groups = [(i, rows, columns) for rows in row_kinds for columns in column_kinds] if kind else []
        groups += layer_groups
        cells += [(len(g[1]) * len(g[2]), count) for g, count in zip(layer_groups, layer_counts, strict=True)]
    found, position = read_gaps(data, position, cells)
    require(position == len(data), "bytes left over (23)")
    keeps = [np.ones(table, bool) for table in tables]
    for (i, rows, columns), places in zip(groups, found, strict=True):
        for place in places:
            keeps[i][rows[place // len(columns)], columns[place % len(columns)]] = False
    return keeps


def read_number(data: bytes, position: int) -> tuple[int, int]:
    """(20)"""
    number = 0
    for k in range(5):
        require(position + k < len(data), "a number ends too early (20)")
        number |= (data[position + k] & 127) << 7 * k
        if data[position + k] < 128:
            return number, position + k + 1
    raise RefusedError("a number is too long (20)")


def read_gaps(data: bytes, position: int, groups: list[tuple[int, int]]) -> tuple[list[list[int]], int]:
    """Where the events of each group (cells, events) are, and the byte behind them (22)."""
    events = sum(e for _, e in groups)
    require(all(e <= cells for cells, e in groups) and events <= 8 * (len(data) - position), "counts (23, 41)")
    divisors = [m for cells, e in groups for m in [divisor(cells, e)] * e]
    bits = "".join(f"{byte:08b}" for byte in data[position:])
    at = 0
    quotients = []
    for _ in divisors:
        end = bits.find("0", at)
        require(end >= 0, "unary bits are missing (22)")
        quotients.append(end - at)
        at = end + 1
    remainders = []
    for m in divisors:
        b = (m - 1).bit_length()
        width = max(b - 1, 0)
        require(at + width <= len(bits), "short bits are missing (22)")
        remainders.append(int(bits[at : at + width] or "0", 2))
        at += width
    for i, m in enumerate(divisors):
        k = 2 ** (m - 1).bit_length() - m
        if m > 1 and remainders[i] >= k:
            require(at < len(bits), "last bits are missing (22)")
            remainders[i] = 2 * remainders[i] + int(bits[at]) - k
            at += 1
    used = -(-at // 8)
    require("1" not in bits[at : 8 * used], "bits behind the last gap (22)")
    gaps = iter([q * m + r for q, m, r in zip(quotients, divisors, remainders, strict=True)])
    found = []
    for cells, e in groups:
        places, place = [], -1
        for _ in range(e):
            place += next(gaps) + 1
            places.append(place)
        require(place < cells, "an event behind the last cell (23)")
        found.append(places)
    return found, position + used


def divisor(cells: int, e: int) -> int:
    return max(1, (693 * cells + 150 * e) // (1000 * e)) if e else 1


def read_codes(data: bytes, b: int, count: int) -> np.ndarray:
    """(25, 26)"""
    each = 8 // b
    packed = np.frombuffer(inflate(data, -(-count // each)), np.uint8)
    codes = np.stack([packed >> (b * i) & (2**b - 1) for i in range(each)], axis=1).ravel()
    require(not codes[count:].any() and not (packed.astype(int) >> (b * each)).any(), "bits for no code (26)")
    return codes[:count]


def inflate(data: bytes, length: int) -> bytes:
    """(26)"""
    stream = zlib.decompressobj(-15)
    try:
        raw = stream.decompress(data, length + 1)
    except zlib.error as error:
        raise RefusedError(f"{error} (26)") from error
    require(len(raw) == length and stream.eof and not stream.unused_data, "length of a deflate stream (26)")
    return raw


def split(values: np.ndarray, sizes: list[int]) -> list[np.ndarray]:
    ends = np.cumsum(sizes, dtype=int)
    return [values[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise RefusedError(otherwise)
