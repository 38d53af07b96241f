"""Entropy coding of keep bits and of small codes, with zlib alone; decoding never takes more memory than declared.

Where few kernels are cut, the distance from one cut kernel to the next follows a geometric law, and Huffman codes of
such distances come within some per cent of the entropy. Where many are cut, packed bits are the smaller.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from ksm_edge.errors import DamagedFileError, UnsupportedVersionError

GAPS, PACKED = "gaps-deflate", "bits-deflate"
BYTES = "deflate"
ESCAPE = 255  # as a gap byte: 255 more kept kernels, and the gap goes on


def encode_keep(keeps: Sequence[np.ndarray]) -> tuple[str, bytes]:
    """Keep bits of all layers, each a bool array of any shape -> the id of the smaller codec, and its bytes."""
    flat = [keep.ravel() for keep in keeps]
    candidates = {GAPS: deflate(_gaps(flat)), PACKED: deflate(_pack(flat))}
    codec = min(candidates, key=lambda name: len(candidates[name]))
    return codec, candidates[codec]


def decode_keep(codec: str, data: bytes, sizes: Sequence[int]) -> list[np.ndarray | None]:
    """The keep bits of layers of `sizes` scores, each (size,) bool; None where every bit is set.

    Raises UnsupportedVersionError for a codec not known here, DamagedFileError where the bytes do not fit the sizes.
    """
    if codec == GAPS:
        return _from_gaps(inflate(data, at_most=sum(sizes) + 5 * len(sizes)), sizes)
    if codec == PACKED:
        return _unpack(inflate(data, exactly=-(-sum(sizes) // 8)), sizes)
    raise UnsupportedVersionError(f"keep bits are coded as {codec!r}; this release knows {GAPS} and {PACKED}")


def deflate(data: bytes) -> bytes:
    """The smallest of some deflate streams: with matches, and Huffman codes alone in blocks of several lengths."""
    settings = [(zlib.Z_DEFAULT_STRATEGY, 9), *((zlib.Z_HUFFMAN_ONLY, memory) for memory in (9, 7, 5))]
    return min((_deflate(data, strategy, memory) for strategy, memory in settings), key=len)


def inflate(data: bytes, *, exactly: int | None = None, at_most: int = 0) -> bytes:
    """Undo `deflate`; DamagedFileError for a length other than `exactly` or over `at_most`, or for bytes left over."""
    limit = at_most if exactly is None else exactly
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        # One byte more than allowed is enough to know: what follows is never written to memory.
        raw = stream.decompress(data, limit + 1)
    except zlib.error as error:
        raise DamagedFileError(f"a deflate stream of {len(data)} bytes cannot be decoded: {error}") from error
    if len(raw) > limit or (exactly is not None and len(raw) != exactly):
        need = f"at most {limit}" if exactly is None else f"{exactly}"
        raise DamagedFileError(f"a deflate stream holds {_over(len(raw), limit)} bytes where {need} are needed")
    if not stream.eof or stream.unused_data:
        fault = "has bytes left over" if stream.eof else "ends too early"
        raise DamagedFileError(f"a deflate stream of {len(data)} bytes {fault}")
    return raw


def _over(length: int, limit: int) -> str:
    return f"more than {limit}" if length > limit else str(length)


def _deflate(data: bytes, strategy: int, memory: int) -> bytes:
    stream = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, memory, strategy)
    return stream.compress(data) + stream.flush()


def _gaps(keeps: Sequence[np.ndarray]) -> bytes:
    """Number of cut kernels of each layer (varints), then all their gaps.

    keep 1 1 0 1 0 0: the cut ones lie at 2, 4, 5, so the gaps are 2, 1, 0. A gap of 600 is 255 255 90.
    """
    counts, gaps = bytearray(), []
    for keep in keeps:
        cut = np.flatnonzero(~keep)
        counts += _varint(cut.size)
        gaps.append(np.diff(cut, prepend=-1) - 1)
    gap = np.concatenate(gaps) if gaps else np.zeros(0, np.int64)
    escapes, rest = np.divmod(gap, ESCAPE)
    coded = np.full(int(escapes.sum()) + gap.size, ESCAPE, np.uint8)
    coded[np.cumsum(escapes + 1) - 1] = rest
    return bytes(counts) + coded.tobytes()


def _from_gaps(raw: bytes, sizes: Sequence[int]) -> list[np.ndarray | None]:
    counts, start = _read_varints(raw, len(sizes))
    coded = np.frombuffer(raw, np.uint8, offset=start)
    ends = np.flatnonzero(coded != ESCAPE)  # the byte that closes each gap
    if ends.size != sum(counts) or (coded.size and coded[-1] == ESCAPE):
        raise DamagedFileError(f"keep bits: {sum(counts)} cut kernels declared, {ends.size} gaps found")
    # A gap's bytes add up to the kept kernels passed, and its last byte stands for the cut kernel itself too.
    after = np.cumsum(coded + (coded != ESCAPE), dtype=np.int64)[ends]
    keeps: list[np.ndarray | None] = []
    first, origin = 0, 0
    for size, count in zip(sizes, counts, strict=True):
        if count == 0:
            keeps.append(None)
            continue
        cut = after[first : first + count] - 1 - origin
        if cut[-1] >= size:
            raise DamagedFileError(f"keep bits: a cut kernel at {cut[-1]} in a layer of {size}")
        keep = np.ones(size, bool)
        keep[cut] = False
        keeps.append(keep)
        first, origin = first + count, int(after[first + count - 1])
    return keeps


def _pack(keeps: Sequence[np.ndarray]) -> bytes:
    return np.packbits(np.concatenate(keeps)).tobytes() if keeps else b""


def _unpack(raw: bytes, sizes: Sequence[int]) -> list[np.ndarray | None]:
    bits = np.unpackbits(np.frombuffer(raw, np.uint8)).view(bool)
    total = sum(sizes)
    if bits[total:].any():
        raise DamagedFileError("keep bits: bits are set behind the last layer")
    keeps = np.split(bits[:total], np.cumsum(sizes)[:-1]) if sizes else []
    return [None if keep.all() else keep.copy() for keep in keeps]


def _varint(number: int) -> bytes:
    """Seven bits a byte, low ones first, the high bit set on all but the last: 300 is 0xAC 0x02."""
    coded = bytearray()
    while number > 0x7F:
        coded.append(number & 0x7F | 0x80)
        number >>= 7
    coded.append(number)
    return bytes(coded)


def _read_varints(raw: bytes, count: int) -> tuple[list[int], int]:
    """`count` varints from the start of `raw`, and where they end."""
    numbers, position = [], 0
    for _ in range(count):
        number = shift = 0
        while True:
            if position == len(raw) or shift > 28:
                raise DamagedFileError("keep bits: the counts of cut kernels cannot be read")
            byte = raw[position]
            position += 1
            number |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        numbers.append(number)
    return numbers, position
