"""Packs with something wrong in them, made from good ones: in front of the checksums, and behind them.

A mutation behind the checksums changes metadata or streams and gets every checksum right again, as somebody would who
means harm. Everything is drawn from one random.Random, so that a seed gives the same packs again.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import numpy as np

from ksm_edge.errors import DamagedFileError
from ksm_edge.pack.container import read_container, write_container
from ksm_edge.pack.metadata import OPENING, checksum

CODED = ("bits", "scales", "norm", "head")
MAX_GROWTH = 1 << 16  # bytes that one mutation adds at most

# As JSON, so that what Python does not write is among them.
VALUES = """
    null true false 0 -0 1 -1 2 3 7 8 9 16 63 255 256 1000 2048 2049 4096 65535 65536 1048576 33554432 33554433
    2147483648 4294967296 9223372036854775808 1e400 -1e400 1e-999 0.5 -0.5 1.0 3.4e38 NaN Infinity -Infinity
    "" "0" "1" "kernel" "channel" "element" "group:1" "group:2" "group:4" "group:0" "group:-1" "group:9999999999999999"
    "group:" "group" "frozen" "batch" "deflate" "bits-deflate" "groups-golomb" "rans"
    "\\ud800" "\\u0000" "\\ud83d\\ude00"
    [] [0] [0,0] [1,2] [0.5,0.5,0.5] [[]] ["a","a"] [["a",1,1,1,1]] [["a",4096,4096,1,1]] [["a",1,33000000,1,1]]
    [["a",16000000,1,1,1]] {} {"a":1} {"size":1}
""".split()  # noqa: SIM905  # ninety literals in quotes and commas could not be read
VALUES += ["1" + "0" * 400, "1" + "0" * 5000, '"' + "x" * 70_000 + '"', "[" * 500 + "]" * 500, "[" * 3000 + "]" * 3000]
VALUES += ["[" + ",".join(f'["l{i}",1,1,1,1]' for i in range(n)) + "]" for n in (2048, 2049)]
FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1e30, 3.4e38, -3.4e38, float("nan"), float("inf"), float("-inf"))

# What a mutation meets in a pack that has been broken before, as a fuzzer that goes on from its own inputs has many.
BROKEN = (AttributeError, LookupError, RecursionError, TypeError, ValueError)

Streams = dict[str, np.ndarray]


def mutated(random: Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    """A pack with one to a few things wrong; `seeds` are good ones, from which a stream may be taken."""
    if random.random() < 0.15:
        return _bytes(random, data)
    try:
        if random.random() < 0.1:
            return _header(random, data)
        text, streams = read_container(data)
        if random.random() < 0.01:
            text = _enlarged(random, text, streams)
        ways = random.choices((_streams, _values, _text), (8, 4, 1), k=random.choice((0, 1, 1, 1, 2, 3, 5)))
        for way in ways:
            text = way(random, text, streams, seeds)
        return behind_checksums(text, streams)
    except (DamagedFileError, *BROKEN):
        return _bytes(random, data)


def behind_checksums(text: str, streams: Streams) -> bytes:
    """The pack with all its checksums made right; where the metadata is no object any more, with the text's alone."""
    covered = text[len(OPENING) + 16 :]
    try:
        values = json.loads("{" + covered.removeprefix('",'))
        values["checksums"] = {name: checksum(s.tobytes()) for name, s in streams.items() if name != "signature"}
        covered = '",' + json.dumps(values, separators=(",", ":"))[1:]
    except (ValueError, TypeError, RecursionError):
        pass
    return write_container(OPENING + checksum(covered.encode(errors="replace")) + covered, streams)


def _bytes(random: Random, data: bytes) -> bytes:
    """Bits flipped, bytes set, taken out, doubled or put in, wherever they are."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 4, 16))):
        at, length = random.randrange(len(changed) + 1), random.choice((1, 1, 2, 4, 8, 64, 1024))
        kind = random.randrange(6)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            changed[at : at + length] = random.choice((b"\0", b"\xff", b"\x80", b"\x7f", b"0")) * length
        elif kind == 2:
            del changed[at : at + length]
        elif kind == 3:
            changed[at:at] = changed[at : at + length]
        elif kind == 4:
            changed[at:at] = random.randbytes(length)
        else:
            del changed[at:]
    return bytes(changed)


def _header(random: Random, data: bytes) -> bytes:
    """The safetensors header with one value replaced, taken out or named twice."""
    length = int.from_bytes(data[:8], "little")
    if length > len(data) - 8:
        return _bytes(random, data)
    try:
        header = json.loads(data[8 : 8 + length])
    except ValueError:
        return _bytes(random, data)
    text = _replaced(random, header).encode(errors="surrogatepass")
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def _streams(random: Random, text: str, streams: Streams, seeds: Sequence[bytes]) -> str:
    """One stream changed: its bytes, what it inflates to, its numbers, its shape, or taken from another pack."""
    name = random.choice(sorted(streams))
    stream = streams[name]
    kinds: list[Callable[[], np.ndarray]] = [
        lambda: _as(_bytes(random, stream.tobytes()), stream.dtype),
        lambda: _reshaped(random, stream),
        lambda: _taken(random, name, seeds, stream),
    ]
    if name in CODED:
        kinds += [lambda: _recoded(random, stream)] * 3
    if stream.dtype == np.float32 and stream.size:
        kinds += [lambda: _other_numbers(random, stream)] * 2
    streams[name] = random.choice(kinds)()
    if random.random() < 0.02:
        del streams[name]
    return text


def _enlarged(random: Random, text: str, streams: Streams) -> str:
    """One layer of up to 2^24 scores in the place of all, and streams that fit it, short for what they hold."""
    values = json.loads(text)
    classes, scale_bits = len(values["classes"]), random.choice((1, 2, 8))
    scores = 1 << random.randrange(10, 25)
    O = random.choice((1, 2, min(scores, 1024), scores))
    codec = random.choice(("groups-golomb", "bits-deflate"))
    period = b"\0" if codec == "groups-golomb" else random.choice((b"\0", b"\x7f", b"\xfe" + 31 * b"\xff"))
    packed = period * (scores // 8 // len(period))
    cut = 8 * len(packed) - int.from_bytes(packed, "little").bit_count()
    values |= {"granularity": "kernel", "soft": random.random() < 0.7, "own_statistics": []}
    values["layers"] = [["a", O, scores // O, 1, 1]]
    values["bits"] = {"scale": scale_bits, "norm": 8, "head": values["bits"]["head"]}
    values["codecs"]["bits"] = codec
    contents = b"\x01" + bytes(scores >> 7 * i & 127 | 128 for i in range(4)) + b"\0\0"
    streams["bits"] = _as(contents + packed, np.dtype("u1")) if codec == "groups-golomb" else _deflated(packed)
    streams["scales"] = _deflated(bytes(-(-cut // (8 // scale_bits))) if values["soft"] else b"")
    streams["ranges"] = np.zeros((1, 2), np.float32)
    streams["steps"] = np.ones(2 + classes, np.float32)
    streams["norm"] = _deflated(bytes(2 * O))
    streams["own"] = np.zeros(0, np.float32)
    del values["checksum"]
    return OPENING + 16 * "0" + '",' + json.dumps(values)[1:]


def _deflated(raw: bytes) -> np.ndarray:
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    return _as(coder.compress(raw) + coder.flush(), np.dtype("u1"))


def _as(data: bytes, dtype: np.dtype) -> np.ndarray:
    return np.frombuffer(data[: len(data) // dtype.itemsize * dtype.itemsize], dtype)


def _reshaped(random: Random, stream: np.ndarray) -> np.ndarray:
    flat = stream.ravel()
    kind = random.randrange(5)
    if kind == 0:
        return flat[: random.randrange(flat.size + 1)]
    if kind == 1:
        return np.resize(flat, min(flat.size * 2 + 1, MAX_GROWTH)) if flat.size else flat
    if kind == 2 and flat.size % 2 == 0:
        return flat.reshape(random.choice(((2, -1), (-1, 2)))) if flat.size else flat.reshape(0, 2)
    if kind == 3:
        return flat.reshape(random.choice(((1, flat.size), (flat.size, 1), (1, 1, flat.size))))
    return np.ascontiguousarray(flat.view(np.uint8)) if flat.dtype != np.uint8 else _as(flat.tobytes(), np.dtype("<f4"))


def _taken(random: Random, name: str, seeds: Sequence[bytes], stream: np.ndarray) -> np.ndarray:
    return read_container(random.choice(seeds))[1].get(name, stream)


def _recoded(random: Random, stream: np.ndarray) -> np.ndarray:
    """A deflate stream of other bytes; one in eight of very many zeros or ones."""
    try:
        raw = zlib.decompress(stream.tobytes(), -15)
    except zlib.error:
        raw = stream.tobytes()
    if random.random() < 0.125:
        raw = random.choice((b"\0", b"\xff", b"\x55")) * random.choice((1 << 16, 1 << 20, 1 << 23))
    return _deflated(_bytes(random, raw))


def _other_numbers(random: Random, stream: np.ndarray) -> np.ndarray:
    changed = stream.copy()
    for _ in range(random.choice((1, 1, 3))):
        changed.flat[random.randrange(changed.size)] = random.choice(FLOATS)
    return changed


def _values(random: Random, text: str, streams: Streams, seeds: Sequence[bytes]) -> str:
    """A value of the metadata replaced, taken out or named twice."""
    del streams, seeds
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return text
    values.pop("checksum", None)
    return OPENING + 16 * "0" + '",' + _replaced(random, values)[1:]


def _text(random: Random, text: str, streams: Streams, seeds: Sequence[bytes]) -> str:
    """Letters of the metadata changed."""
    del streams, seeds
    start = len(OPENING) + 16
    return text[:start] + _bytes(random, text[start:].encode(errors="replace")).decode(errors="replace")


def _replaced(random: Random, values: dict[str, Any]) -> str:
    """The JSON of `values` with one value, at any depth, changed."""
    places = list(_places(values))
    if not places:
        return json.dumps(values)
    holder, key = random.choice(places)
    kind = random.randrange(8)
    if kind == 0:
        del holder[key]
    elif kind == 1 and type(holder[key]) is int:
        holder[key] += random.choice((-1, 1, 7, -holder[key] * 2, holder[key], 1 << 16, 1 << 20, 1 << 24, 1 << 31))
    elif kind == 2 and isinstance(holder, list):
        holder *= 1 + random.randrange(3)
    elif kind == 3:
        holder[key] = random.choice(places)[0]
        try:
            return json.dumps(values)
        except ValueError:  # an object within itself
            return "{}"
    else:
        was, holder[key] = holder[key], "@@"
        given = random.choice(VALUES)
        twice = isinstance(holder, dict) and kind == 4
        return json.dumps(values).replace('"@@"', f"{json.dumps(was)},{json.dumps(key)}:{given}" if twice else given, 1)
    return json.dumps(values)


def _places(values: Any) -> Any:
    """Every holder and key or index in nested lists and objects."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in list(items):
        yield values, key
        yield from _places(value)
