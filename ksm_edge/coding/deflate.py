"""Deflate for bytes and for small codes; decoding never takes more memory than declared."""

from __future__ import annotations

import zlib

import numpy as np

from ksm_edge.errors import DamagedFileError

DEFLATE = "deflate"  # of codes, several to a byte
MIRRORED = "mirrored-deflate"  # of scales, with one bit more that says which of them amplify


def deflate(data: bytes) -> bytes:
    """The smallest of some deflate streams: with matches, and Huffman codes alone in blocks of several lengths."""
    settings = [(zlib.Z_DEFAULT_STRATEGY, 9), *((zlib.Z_HUFFMAN_ONLY, memory) for memory in (9, 7, 5))]
    return min((_deflate(data, strategy, memory) for strategy, memory in settings), key=len)


def inflate(data: bytes, length: int) -> bytes:
    """Undo `deflate`; DamagedFileError for any other length than given, or for bytes left over."""
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        # One byte more than allowed is enough to know: what follows is never written to memory.
        raw = stream.decompress(data, length + 1)
    except zlib.error as error:
        raise DamagedFileError(f"a deflate stream of {len(data)} bytes cannot be decoded: {error}") from error
    if len(raw) != length:
        found = f"more than {length}" if len(raw) > length else str(len(raw))
        raise DamagedFileError(f"a deflate stream holds {found} bytes where {length} are needed")
    if not stream.eof or stream.unused_data:
        fault = "has bytes left over" if stream.eof else "ends too early"
        raise DamagedFileError(f"a deflate stream of {len(data)} bytes {fault}")
    return raw


def encode_codes(codes: np.ndarray, bits: int) -> bytes:
    """Codes of `bits` bits each, uint8, several to a byte and deflated: Huffman alone would take a bit for each code.

    Three codes of 2 bits, 1 2 3, are the byte 0b00111001: the first code is the lowest, what is missing is 0.
    """
    each = 8 // bits
    rows = np.concatenate([codes.ravel(), np.zeros(-codes.size % each, np.uint8)]).reshape(-1, each)
    packed = np.zeros(len(rows), np.uint8)
    for place in range(each):
        packed |= rows[:, place] << np.uint8(bits * place)
    return deflate(packed.tobytes())


def decode_codes(data: bytes, bits: int, count: int) -> np.ndarray:
    """The `count` codes, (count,) uint8; DamagedFileError where the data holds more or fewer."""
    each = 8 // bits
    packed = np.frombuffer(inflate(data, -(-count // each)), np.uint8)
    codes = np.empty((packed.size, each), np.uint8)
    for place in range(each):
        codes[:, place] = packed >> np.uint8(bits * place) & np.uint8(2**bits - 1)
    flat = codes.ravel()
    if flat[count:].any() or (packed >> np.uint8(bits * each - 1) > 1).any():
        raise DamagedFileError("a stream of codes has bits set behind the last code")
    return flat[:count]


def _deflate(data: bytes, strategy: int, memory: int) -> bytes:
    stream = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, memory, strategy)
    return stream.compress(data) + stream.flush()
