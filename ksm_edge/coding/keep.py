"""Keep bits of all layers, told by the places of what is cut, coded to about their entropy.

Cut kernels are rare and cluster: some filters (rows) and some in-channels (columns) hold many more than others. So a
layer's rows and columns may each be told apart as calm or busy, which splits its kernels into up to four groups, and in
each group the distances from one cut kernel to the next are Golomb-coded under the group's own share of cut kernels.
Where many kernels are cut, packed bits are the smaller.

The bytes: for each layer a number that says how it is split (0: nothing is cut) and the count of cut kernels of each of
its groups; which rows and columns are busy, of all layers in one; the gaps of all groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np

from ksm_edge import native
from ksm_edge.coding import golomb
from ksm_edge.coding.deflate import deflate, inflate
from ksm_edge.errors import DamagedFileError, UnsupportedVersionError

GROUPS, PACKED = "groups-golomb", "bits-deflate"
NOTHING_CUT, WHOLE, BY_ROW, BY_COLUMN, BY_BOTH = range(5)
MAX_VARINT_BITS = 35
MANY = 4  # one cut score in so many: groups gain little over packed bits, and take some 25 bytes of memory for each
SPLIT_COST = 16  # bits: another count, and what coding two groups apart loses

Shape = tuple[int, int]


@dataclass(frozen=True)
class Split:
    """Which rows and which columns of a layer (O, X) are busy: bool (O,) and (X,); None where they are not told apart.

    Its groups are numbered calm rows first, and within these calm columns first.
    """

    shape: Shape
    rows: np.ndarray | None
    columns: np.ndarray | None

    @property
    def classes(self) -> tuple[int, int]:
        """Of rows and of columns: 1 or 2."""
        return 1 + (self.rows is not None), 1 + (self.columns is not None)

    def apart(self, cut: np.ndarray) -> list[np.ndarray]:
        """Places in the layer -> for each group the places in it, ascending."""
        rows, columns = np.divmod(cut, self.shape[1])
        (row_class, row), (column_class, column) = (
            (flags[places].astype(np.int8), _ranks(flags)[places]) if flags is not None else (0, places)
            for flags, places in ((self.rows, rows), (self.columns, columns))
        )
        group = np.broadcast_to(row_class * self.classes[1] + column_class, cut.shape)
        widths = _sizes(self.columns, self.shape[1]) * self.classes[0]
        return [row[group == g] * width + column[group == g] for g, width in enumerate(widths)]

    @cached_property
    def groups(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Row and column numbers of each group."""
        by_row, by_column = _numbers(self.rows, self.shape[0]), _numbers(self.columns, self.shape[1])
        return [(rows, columns) for rows in by_row for columns in by_column]

    @property
    def cells(self) -> list[int]:
        """The number of scores in each group."""
        by_row, by_column = _sizes(self.rows, self.shape[0]), _sizes(self.columns, self.shape[1])
        return [rows * columns for rows in by_row for columns in by_column]


def table_shape(shape: tuple[int, ...]) -> Shape:
    """(O, X): scores of any granularity as a table of one row for each filter."""
    return shape[0], math.prod(shape[1:])


def encode_keep(cuts: Sequence[np.ndarray], shapes: Sequence[Shape]) -> tuple[str, bytes]:
    """The smaller codec's id, and its bytes, of what is cut: of each table (O, X) the flat places, ascending."""
    scores = sum(O * X for O, X in shapes)
    if MANY * sum(cut.size for cut in cuts) > scores:
        return PACKED, deflate(_pack(cuts, shapes))
    grouped = _encode_groups(cuts, shapes)
    if 16 * len(grouped) < scores:  # far from what deflate could reach, and that takes most of the time
        return GROUPS, grouped
    candidates = {GROUPS: grouped, PACKED: deflate(_pack(cuts, shapes))}
    codec = min(candidates, key=lambda name: len(candidates[name]))
    return codec, candidates[codec]


def decode_keep(codec: str, data: bytes, shapes: Sequence[Shape]) -> list[np.ndarray]:
    """Undo `encode_keep`: int32 places for each of the tables.

    Raises UnsupportedVersionError for a codec not known here, DamagedFileError where the bytes do not fit the shapes.
    """
    if codec == GROUPS:
        found = _decode_groups_natively(data, shapes)
        return _decode_groups(data, shapes) if found is None else found
    if codec == PACKED:
        return _unpack(inflate(data, -(-sum(O * X for O, X in shapes) // 8)), shapes)
    raise UnsupportedVersionError(f"keep bits are coded as {codec!r}; this release knows {GROUPS} and {PACKED}")


def _encode_groups(cuts: Sequence[np.ndarray], shapes: Sequence[Shape]) -> bytes:
    table_of_contents, busy = bytearray(), []
    groups: list[tuple[int, np.ndarray]] = []
    for cut, shape in zip(cuts, shapes, strict=True):
        if not cut.size:
            table_of_contents += _varint(NOTHING_CUT)
            continue
        split = _best_split(cut, shape)
        table_of_contents += _varint(WHOLE + (split.rows is not None) + 2 * (split.columns is not None))
        busy += [flags for flags in (split.rows, split.columns) if flags is not None]
        for places, cells in zip(split.apart(cut), split.cells, strict=True):
            table_of_contents += _varint(places.size)
            groups.append((cells, places))
    flags = np.concatenate(busy) if busy else np.zeros(0, bool)
    places = np.flatnonzero(flags)
    table_of_contents += _varint(places.size)
    return bytes(table_of_contents) + _golomb([(flags.size, places)]) + _golomb(groups)


def _best_split(cut: np.ndarray, shape: Shape) -> Split:
    rows, columns = np.divmod(cut, shape[1])
    by_row, by_column = np.bincount(rows, minlength=shape[0]), np.bincount(columns, minlength=shape[1])
    return Split(shape, _busy(by_row, shape[1]), _busy(by_column, shape[0]))


def _busy(counts: np.ndarray, cells: int) -> np.ndarray | None:
    """Which of the rows, given each one's count of cut kernels among its cells, to tell apart: those over the threshold
    that makes the whole shortest. None where all in one are as short.
    """
    ordered = np.sort(counts)
    below, number = np.cumsum(ordered)[:-1], np.arange(1, counts.size)
    total, cost = int(ordered.sum()), entropy(ordered.sum(), counts.size * cells)
    split = entropy(below, number * cells) + entropy(total - below, (counts.size - number) * cells)
    split += entropy(number, counts.size) + SPLIT_COST
    split[ordered[1:] == ordered[:-1]] = np.inf  # equal counts stay together
    return counts > ordered[split.argmin()] if split.size and split.min() < cost else None


def entropy(events: np.ndarray | int, cells: np.ndarray | int) -> np.ndarray:
    """Bits that so many events among so many cells take: cells H(events / cells)."""
    p = np.asarray(events) / cells
    terms = [x * np.log2(np.where(x > 0, x, 1)) for x in (p, 1 - p)]
    return -np.asarray(cells) * (terms[0] + terms[1])


def _decode_groups_natively(data: bytes, shapes: Sequence[Shape]) -> list[np.ndarray] | None:
    """`_decode_groups` in C; None without that, or for bytes of which `_decode_groups` says what is wrong."""
    if native.loops is None:
        return None
    found = native.loops.decode_keep(data, np.array(shapes, np.int64).reshape(-1, 2))
    return None if found is None else _parts(np.frombuffer(found[0], np.int32), found[1])


def _decode_groups(data: bytes, shapes: Sequence[Shape]) -> list[np.ndarray]:
    reader = _Reader(data)
    kinds, events = [], []
    for _ in shapes:
        kinds.append(reader.varint())
        if kinds[-1] > BY_BOTH:
            raise DamagedFileError(f"keep bits: a layer is split in way {kinds[-1]}, {BY_BOTH} is the last one known")
        events.append([reader.varint() for _ in range({NOTHING_CUT: 0, WHOLE: 1, BY_BOTH: 4}.get(kinds[-1], 2))])
    splits = _read_splits(reader, kinds, shapes)
    cells = [split.cells if counts else [] for split, counts in zip(splits, events, strict=True)]
    groups = [pair for layer in zip(cells, events, strict=True) for pair in zip(*layer, strict=True)]
    if not all(size for size, _ in groups):
        raise DamagedFileError("keep bits: a layer is split, but all its rows or columns are of one kind")
    if any(count > size for size, count in groups):
        raise DamagedFileError("keep bits: more kernels are cut than there are")
    places = reader.places(groups)
    reader.end()
    return _together(splits, events, places)


def _together(splits: Sequence[Split], events: Sequence[Sequence[int]], places: np.ndarray) -> list[np.ndarray]:
    """Undo `Split.apart` for all layers: int32 places in each group -> in each layer, in the same memory."""
    layers = _parts(places, [sum(counts) for counts in events])
    for split, counts, layer in zip(splits, events, layers, strict=True):
        if len(counts) > 1:  # those of one group are what they are to be
            for (rows, columns), group in zip(split.groups, _parts(layer, counts), strict=True):
                _move_into_layer(group, rows, columns, split.shape[1])
            layer.sort()
    return layers


def _move_into_layer(places: np.ndarray, rows: np.ndarray, columns: np.ndarray, width: int) -> None:
    """Places in a group, made places in a layer so wide; few at a time, for what they take on the way."""
    for first in range(0, places.size, golomb.BLOCK):
        part = places[first : first + golomb.BLOCK]
        row = part // np.int32(columns.size)
        part -= row * np.int32(columns.size)
        part[:] = rows[row] * width + columns[part]


def _read_splits(reader: _Reader, kinds: Sequence[int], shapes: Sequence[Shape]) -> list[Split]:
    """Each layer's split, from the busy rows and columns of all of them."""
    told_apart = [(kind in (BY_ROW, BY_BOTH), kind in (BY_COLUMN, BY_BOTH)) for kind in kinds]
    lengths = [
        size
        for shape, told in zip(shapes, told_apart, strict=True)
        for size, is_told in zip(shape, told, strict=True)
        if is_told
    ]
    count, total = reader.varint(), sum(lengths)
    if count > total:
        raise DamagedFileError(f"keep bits: {count} rows and columns are busy out of {total}")
    flags = np.zeros(total, bool)
    flags[reader.places([(total, count)])] = True
    parts = iter(_parts(flags, lengths))
    return [
        Split(shape, *(next(parts) if is_told else None for is_told in told))
        for shape, told in zip(shapes, told_apart, strict=True)
    ]


def _numbers(flags: np.ndarray | None, size: int) -> list[np.ndarray]:
    """The row (or column) numbers of each class."""
    return [np.arange(size)] if flags is None else [np.flatnonzero(~flags), np.flatnonzero(flags)]


def _sizes(flags: np.ndarray | None, size: int) -> list[int]:
    """How many rows (or columns) each class has."""
    busy = 0 if flags is None else int(np.count_nonzero(flags))
    return [size] if flags is None else [size - busy, busy]


def _ranks(flags: np.ndarray) -> np.ndarray:
    """The place of each row (or column) among those of its class."""
    return np.where(flags, np.cumsum(flags), np.cumsum(~flags)) - 1


def _golomb(groups: Sequence[tuple[int, np.ndarray]]) -> bytes:
    """The places of events in groups of so many cells."""
    gaps = [np.diff(places.astype(np.int32), prepend=np.int32(-1)) - np.int32(1) for _, places in groups]
    cells, counts = _columns([(cells, places.size) for cells, places in groups])
    return golomb.encode(_joined(gaps), golomb.divisor(cells, counts), counts)


def _columns(groups: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Cells and events of those groups that have any event, each (g,) int64."""
    cells, events = np.array(groups, np.int64).reshape(-1, 2).T
    return cells[events > 0], events[events > 0]


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int32), *parts])


def _parts(values: np.ndarray, lengths: Sequence[int]) -> list[np.ndarray]:
    ends = list(accumulate(lengths, initial=0))
    return [values[first:end] for first, end in pairwise(ends)]


def _pack(cuts: Sequence[np.ndarray], shapes: Sequence[Shape]) -> bytes:
    keeps = [np.ones(O * X, bool) for O, X in shapes]
    for keep, cut in zip(keeps, cuts, strict=True):
        keep[cut] = False
    return np.packbits(np.concatenate([np.zeros(0, bool), *keeps])).tobytes()


def _unpack(raw: bytes, shapes: Sequence[Shape]) -> list[np.ndarray]:
    bits = np.unpackbits(np.frombuffer(raw, np.uint8)).view(bool)
    sizes = [O * X for O, X in shapes]
    if bits[sum(sizes) :].any():
        raise DamagedFileError("keep bits: bits are set behind the last layer")
    return [np.flatnonzero(~keep).astype(np.int32) for keep in _parts(bits[: sum(sizes)], sizes)]


def _varint(number: int) -> bytes:
    """Seven bits a byte, low ones first, the high bit set on all but the last: 300 is 0xAC 0x02."""
    coded, number = bytearray(), int(number)
    while number > 0x7F:
        coded.append(number & 0x7F | 0x80)
        number >>= 7
    coded.append(number)
    return bytes(coded)


class _Reader:
    """The coded bytes, read from front to back."""

    def __init__(self, data: bytes) -> None:
        self._rest = memoryview(data)

    def varint(self) -> int:
        number = shift = 0
        for position, byte in enumerate(self._rest[: MAX_VARINT_BITS // 7]):
            number |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                self._rest = self._rest[position + 1 :]
                return number
        raise DamagedFileError("keep bits: a count cannot be read")

    def places(self, groups: Sequence[tuple[int, int]]) -> np.ndarray:
        """Where the events of each group are, one group behind the other, given its cells and how many it has."""
        cells, counts = _columns(groups)
        total, bits = int(counts.sum()), 8 * len(self._rest)
        if total > bits:  # each takes a bit at least: no room is made for what cannot be there
            raise DamagedFileError(f"keep bits: {total} gaps declared, {bits} bits are left")
        places, used = golomb.decode(self._rest, golomb.divisor(cells, counts), counts)
        self._rest = self._rest[used:]
        if total + int(places.sum(dtype=np.int64)) > cells.sum():  # from here on int32 holds all sums
            raise DamagedFileError(f"keep bits: gaps reach beyond the {cells.sum()} scores that there are")
        places += 1
        for size, group in zip(cells.tolist(), _parts(places, counts.tolist()), strict=True):
            np.cumsum(group, out=group)
            group -= 1
            if group[-1] >= size:
                raise DamagedFileError(f"keep bits: something at {group[-1]} among {size}")
        return places

    def end(self) -> None:
        if self._rest:
            raise DamagedFileError(f"keep bits: {len(self._rest)} bytes are left over")
