"""Keep bits of all layers, coded to about their entropy.

Cut kernels are rare and cluster: some filters (rows) and some in-channels (columns) hold many more than others. So a
layer's rows and columns may each be told apart as calm or busy, which splits its kernels into up to four groups, and in
each group the distances from one cut kernel to the next are Golomb-coded under the group's own share of cut kernels.
Where many kernels are cut, packed bits are the smaller.

The bytes: for each layer a number that says how it is split (0: nothing is cut) and the count of cut kernels of each of
its groups; which rows and columns are busy, of all layers in one; the gaps of all groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ksm_edge.coding import golomb
from ksm_edge.coding.deflate import deflate, inflate
from ksm_edge.errors import DamagedFileError, UnsupportedVersionError

GROUPS, PACKED = "groups-golomb", "bits-deflate"
NOTHING_CUT, WHOLE, BY_ROW, BY_COLUMN, BY_BOTH = range(5)
MAX_VARINT_BITS = 35
SPLIT_COST = 16  # bits: another count, and what coding two groups apart loses

Shape = tuple[int, int]


@dataclass(frozen=True)
class Split:
    """Which rows and which columns of a layer are busy: bool (O,) and (X,); all False where they are not told apart."""

    rows: np.ndarray
    columns: np.ndarray

    def groups(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Row and column numbers of each group that has any cells: calm rows first, calm columns first."""
        for row_class in (False, True):
            for column_class in (False, True):
                rows, columns = np.flatnonzero(self.rows == row_class), np.flatnonzero(self.columns == column_class)
                if rows.size and columns.size:
                    yield rows, columns


def encode_keep(keeps: Sequence[np.ndarray]) -> tuple[str, bytes]:
    """Keep bits of all layers, each a bool array (O, ...) -> the id of the smaller codec, and its bytes."""
    tables = [keep.reshape(len(keep), -1) for keep in keeps]
    grouped, packed = _encode_groups(tables), _pack(tables)
    if 2 * len(grouped) < len(packed):  # far from what deflate could reach, and that takes most of the time
        return GROUPS, grouped
    candidates = {GROUPS: grouped, PACKED: deflate(packed)}
    codec = min(candidates, key=lambda name: len(candidates[name]))
    return codec, candidates[codec]


def decode_keep(codec: str, data: bytes, shapes: Sequence[Shape]) -> list[np.ndarray | None]:
    """The keep bits of layers of `shapes` (O, X), each (O, X) bool; None where every bit is set.

    Raises UnsupportedVersionError for a codec not known here, DamagedFileError where the bytes do not fit the shapes.
    """
    if codec == GROUPS:
        return _decode_groups(data, shapes)
    if codec == PACKED:
        return _unpack(inflate(data, -(-sum(O * X for O, X in shapes) // 8)), shapes)
    raise UnsupportedVersionError(f"keep bits are coded as {codec!r}; this release knows {GROUPS} and {PACKED}")


def _encode_groups(tables: Sequence[np.ndarray]) -> bytes:
    table_of_contents, busy = bytearray(), []
    gaps, divisors = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for keep in tables:
        if keep.all():
            table_of_contents += _varint(NOTHING_CUT)
            continue
        is_cut = ~keep
        split = _best_split(is_cut)
        table_of_contents += _varint(WHOLE + split.rows.any() + 2 * split.columns.any())
        busy += [flags for flags in (split.rows, split.columns) if flags.any()]
        for rows, columns in split.groups():
            places = np.flatnonzero(is_cut[np.ix_(rows, columns)])
            table_of_contents += _varint(places.size)
            if places.size:
                gaps.append(np.diff(places, prepend=-1) - 1)
                divisors.append(np.full(places.size, golomb.divisor(rows.size * columns.size, places.size)))
    flags = np.concatenate(busy) if busy else np.zeros(0, bool)
    places = np.flatnonzero(flags)
    table_of_contents += _varint(places.size)
    coded_flags = golomb.encode(np.diff(places, prepend=-1) - 1, _divisors(flags.size, places.size))
    return bytes(table_of_contents) + coded_flags + golomb.encode(np.concatenate(gaps), np.concatenate(divisors))


def _best_split(is_cut: np.ndarray) -> Split:
    O, X = is_cut.shape
    return Split(_busy(is_cut.sum(axis=1), X), _busy(is_cut.sum(axis=0), O))


def _busy(counts: np.ndarray, cells: int) -> np.ndarray:
    """Which of the rows, given each one's count of cut kernels among its cells, to tell apart: those over the threshold
    that makes the whole shortest.
    """
    ordered = np.sort(counts)
    below, number = np.cumsum(ordered)[:-1], np.arange(1, counts.size)
    total, cost = int(ordered.sum()), _entropy(ordered.sum(), counts.size * cells)
    split = _entropy(below, number * cells) + _entropy(total - below, (counts.size - number) * cells)
    split += _entropy(number, counts.size) + SPLIT_COST
    split[ordered[1:] == ordered[:-1]] = np.inf  # equal counts stay together
    if not split.size or split.min() >= cost:
        return np.zeros(counts.size, bool)
    return counts > ordered[split.argmin()]


def _entropy(events: np.ndarray | int, cells: np.ndarray | int) -> np.ndarray:
    """Bits that so many events among so many cells take: cells H(events / cells)."""
    p = np.asarray(events) / cells
    q = 1 - p
    terms = [x * np.log2(np.where(x > 0, x, 1)) for x in (p, q)]
    return -np.asarray(cells) * (terms[0] + terms[1])


def _decode_groups(data: bytes, shapes: Sequence[Shape]) -> list[np.ndarray | None]:
    reader = _Reader(data)
    kinds, counts = [], []
    for _ in shapes:
        kinds.append(reader.varint())
        if kinds[-1] > BY_BOTH:
            raise DamagedFileError(f"keep bits: a layer is split in way {kinds[-1]}, {BY_BOTH} is the last one known")
        counts.append([reader.varint() for _ in range({NOTHING_CUT: 0, WHOLE: 1, BY_BOTH: 4}.get(kinds[-1], 2))])
    splits = _read_splits(reader, kinds, shapes)
    groups = [(i, *group) for i, split in enumerate(splits) for group in split.groups() if kinds[i] != NOTHING_CUT]
    events = [count for layer in counts for count in layer]
    if len(groups) != len(events):
        raise DamagedFileError("keep bits: a layer is split, but all its rows or columns are of one kind")
    cells = [rows.size * columns.size for _, rows, columns in groups]
    if any(count > size for count, size in zip(events, cells, strict=True)):
        raise DamagedFileError("keep bits: more kernels are cut than there are")
    divisors = [_divisors(size, count) for size, count in zip(cells, events, strict=True)]
    gaps = reader.gaps(np.concatenate([np.zeros(0, np.int64), *divisors]))
    reader.end()
    keeps: list[np.ndarray | None] = [
        None if kind == NOTHING_CUT else np.ones(shape, bool) for kind, shape in zip(kinds, shapes, strict=True)
    ]
    for (layer, rows, columns), part, size in zip(groups, _parts(gaps, events), cells, strict=True):
        places = _places(part, size)
        keep = keeps[layer]
        assert keep is not None
        keep[rows[places // columns.size], columns[places % columns.size]] = False
    return [None if keep is None or keep.all() else keep for keep in keeps]


def _read_splits(reader: _Reader, kinds: Sequence[int], shapes: Sequence[Shape]) -> list[Split]:
    """Each layer's split, from the busy rows and columns of all of them."""
    by_row = [kind in (BY_ROW, BY_BOTH) for kind in kinds]
    by_column = [kind in (BY_COLUMN, BY_BOTH) for kind in kinds]
    lengths = [
        size * told
        for (O, X), *told_apart in zip(shapes, by_row, by_column, strict=True)
        for size, told in zip((O, X), told_apart, strict=True)
    ]
    count, total = reader.varint(), sum(lengths)
    if count > total:
        raise DamagedFileError(f"keep bits: {count} rows and columns are busy out of {total}")
    flags = np.zeros(total, bool)
    flags[_places(reader.gaps(_divisors(total, count)), total)] = True
    parts = iter(_parts(flags, lengths))
    splits = []
    for O, X in shapes:
        rows, columns = next(parts), next(parts)
        splits.append(Split(rows if rows.size else np.zeros(O, bool), columns if columns.size else np.zeros(X, bool)))
    return splits


def _divisors(cells: int, events: int) -> np.ndarray:
    return np.full(events, golomb.divisor(cells, events) if events else 1, np.int64)


def _parts(values: np.ndarray, lengths: Sequence[int]) -> list[np.ndarray]:
    return np.split(values, np.cumsum(lengths)[:-1]) if lengths else []


def _places(gaps: np.ndarray, cells: int) -> np.ndarray:
    """Where the events are, from the gaps in front of them."""
    places = np.cumsum(gaps + 1) - 1
    if places.size and places[-1] >= cells:
        raise DamagedFileError(f"keep bits: something at {places[-1]} among {cells}")
    return places


def _pack(tables: Sequence[np.ndarray]) -> bytes:
    return np.packbits(np.concatenate([keep.ravel() for keep in tables])).tobytes() if tables else b""


def _unpack(raw: bytes, shapes: Sequence[Shape]) -> list[np.ndarray | None]:
    bits = np.unpackbits(np.frombuffer(raw, np.uint8)).view(bool)
    sizes = [O * X for O, X in shapes]
    if bits[sum(sizes) :].any():
        raise DamagedFileError("keep bits: bits are set behind the last layer")
    keeps = _parts(bits[: sum(sizes)], sizes)
    return [None if keep.all() else keep.reshape(shape) for keep, shape in zip(keeps, shapes, strict=True)]


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

    def gaps(self, divisors: np.ndarray) -> np.ndarray:
        gaps, used = golomb.decode(self._rest, divisors)
        self._rest = self._rest[used:]
        return gaps

    def end(self) -> None:
        if self._rest:
            raise DamagedFileError(f"keep bits: {len(self._rest)} bytes are left over")
