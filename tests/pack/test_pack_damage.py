"""Each way a pack file can be broken, and what the reader says of it."""

from __future__ import annotations

import json
import tracemalloc
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tiny import tiny_pack

from ksm_edge.coding.deflate import MIRRORED
from ksm_edge.coding.keep import PACKED
from ksm_edge.errors import DamagedFileError, FileError, UnsupportedVersionError
from ksm_edge.pack.container import MAX_FILE_BYTES, MAX_HEADER_BYTES, read_container, write_container
from ksm_edge.pack.format import encode
from ksm_edge.pack.metadata import COVERED_FROM, MAX_LAYERS, OPENING, checksum
from ksm_edge.pack.reader import STREAMS, decode

GOOD = encode(tiny_pack(statistics="batch"))


def split(data: bytes = GOOD) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: dict[str, Any], body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def rewritten(
    change: Callable[[dict[str, Any]], object] = lambda metadata: None, streams: dict[str, np.ndarray] | None = None
) -> bytes:
    """A pack by a writer that gets its checksums right and one thing wrong."""
    text, good = read_container(GOOD)
    metadata = json.loads(text)
    good |= streams or {}
    metadata["checksums"] = {name: checksum(stream.tobytes()) for name, stream in good.items()}
    change(metadata)
    del metadata["checksum"]
    covered = '",' + json.dumps(metadata)[1:]
    return write_container(OPENING + checksum(covered.encode()) + covered, good)


def reworded(written: str, instead: str) -> bytes:
    """The good pack with a piece of its metadata replaced, letter by letter."""
    text, streams = read_container(GOOD)
    assert written in text
    covered = text[COVERED_FROM:].replace(written, instead)
    return write_container(OPENING + checksum(covered.encode()) + covered, streams)


def deflated(data: bytes) -> np.ndarray:
    stream = zlib.compressobj(9, zlib.DEFLATED, -15)
    return np.frombuffer(stream.compress(data) + stream.flush(), np.uint8)


def test_the_good_file_is_read() -> None:
    assert encode(decode(GOOD)) == GOOD
    assert decode(rewritten()).task == "tiny kernel"


@pytest.mark.parametrize("length", [0, 1, 7, 8, 20, 500, len(GOOD) // 2, len(GOOD) - 1])
def test_a_file_cut_short_is_damaged(length: int) -> None:
    with pytest.raises(DamagedFileError):
        decode(GOOD[:length])


def test_bytes_left_over_are_damage() -> None:
    with pytest.raises(DamagedFileError, match=r"the streams hold \d+ bytes, the file \d+"):
        decode(GOOD + b"\0")


@pytest.mark.parametrize("name", sorted(STREAMS))
def test_a_flipped_bit_in_any_stream_is_named(name: str) -> None:
    header, body = split()
    start, end = header[name]["data_offsets"]
    broken = bytearray(body)
    broken[(start + end) // 2] ^= 0x10
    with pytest.raises(DamagedFileError, match=f"stream '{name}' is not what was written: its checksum does not hold"):
        decode(joined(header, bytes(broken)))


def test_no_flipped_byte_anywhere_changes_what_is_read() -> None:
    for position in range(len(GOOD)):
        broken = bytearray(GOOD)
        broken[position] ^= 0x04
        try:
            pack = decode(bytes(broken))
        except FileError:
            continue
        assert encode(pack) == GOOD, f"byte {position} went unnoticed"


def test_a_change_of_the_metadata_is_seen() -> None:
    header, body = split()
    header["__metadata__"]["ksm_edge"] = header["__metadata__"]["ksm_edge"].replace("class 1", "class 7")
    with pytest.raises(DamagedFileError, match="metadata is not what was written: its checksum does not hold"):
        decode(joined(header, body))


def test_a_header_too_large_is_refused_before_it_is_read() -> None:
    with pytest.raises(DamagedFileError, match=f"claims {1 << 40} bytes: at most {MAX_HEADER_BYTES} are possible"):
        decode((1 << 40).to_bytes(8, "little") + bytes(100))
    spaces = MAX_HEADER_BYTES + 1
    with pytest.raises(DamagedFileError, match=f"claims {spaces} bytes"):
        decode(spaces.to_bytes(8, "little") + b" " * spaces)


def test_a_file_too_large_is_refused() -> None:
    class Huge(bytes):
        def __len__(self) -> int:
            return MAX_FILE_BYTES + 1

    with pytest.raises(DamagedFileError, match="bytes are no task pack"):
        decode(Huge(GOOD))


@pytest.mark.parametrize(
    "header",
    [
        b'{"__metadata__":{"ksm_edge":"a","ksm_edge":"b"}}',
        b"not json",
        b"[1, 2]",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a": 1e999999}',
        b'{"__metadata__": {"ksm_edge": 1}}',
    ],
)
def test_a_header_that_is_none_is_damage(header: bytes) -> None:
    with pytest.raises(DamagedFileError, match=r"header|no task pack"):
        decode(len(header).to_bytes(8, "little") + header)


def test_another_safetensors_file_is_no_pack() -> None:
    from safetensors.numpy import save

    with pytest.raises(DamagedFileError, match=r"no task pack: .* Packs are written by `ksm-edge adapt`"):
        decode(save({"weight": np.zeros(4, np.float32)}))


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [0, 1 << 63], "data_offsets": [0, 0]},
        {"dtype": "F32", "shape": [1], "data_offsets": [1 << 50, (1 << 50) + 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]},
        {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4]},
        {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]},
        {"shape": [1], "data_offsets": [0, 4]},
        None,
        7,
    ],
)
def test_a_stream_entry_that_does_not_hold_is_named(entry: object) -> None:
    header, body = split()
    header["bias"] = entry
    with pytest.raises(DamagedFileError, match="stream 'bias'"):
        decode(joined(header, body))


def test_missing_and_unknown_streams_are_named() -> None:
    text, streams = read_container(GOOD)
    without = {name: stream for name, stream in streams.items() if name != "golden"}
    with pytest.raises(DamagedFileError, match="not those of its format: golden"):
        decode(write_container(text, without))
    with pytest.raises(DamagedFileError, match="not those of its format: extra"):
        decode(write_container(text, streams | {"extra": np.zeros(1, np.uint8)}))


@pytest.mark.parametrize("version", [2, 0, True, "1"])
def test_another_format_version_is_told_from_damage(version: object) -> None:
    message = rf"format version {version}; this release reads 1\. Install a newer"
    with pytest.raises(UnsupportedVersionError, match=message):
        decode(rewritten(lambda metadata: metadata.update(format=version)))


@pytest.mark.parametrize("name", ["bits", "scales", "norm", "head"])
def test_an_unknown_codec_is_told_from_damage(name: str) -> None:
    with pytest.raises(UnsupportedVersionError, match="coded as 'rans'; this release knows"):
        decode(rewritten(lambda metadata: metadata["codecs"].update({name: "rans"})))


def test_eight_bits_of_a_scale_and_one_that_amplifies_are_too_many() -> None:
    def many(metadata: dict[str, Any]) -> None:
        metadata["codecs"]["scales"], metadata["bits"]["scale"] = MIRRORED, 8

    with pytest.raises(DamagedFileError, match="leave none for mirrored-deflate"):
        decode(rewritten(many))


def change(key: str, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda metadata: metadata.update({key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("layers", [["a", 1, 1, 1, 1], ["a", 1, 1, 1, 1]]),
        ("layers", [["a", 0, 1, 1, 1]]),
        ("layers", [["a", -1, -1, 1, 1]]),
        ("layers", [["a", 1 << 20, 1 << 20, 1, 1]]),
        ("layers", [["a", 1 << 40, 1, 1, 1]]),
        ("layers", [["a", 1, 1]]),
        ("layers", 5),
        ("granularity", "group:0"),
        ("granularity", "group:1000000000"),
        ("granularity", "group:" + "9" * 5000),
        ("granularity", "tensor"),
        ("granularity", "group:\u0663"),
        ("statistics", "running"),
        ("statistics", "frozen"),
        ("own_statistics", [9]),
        ("own_statistics", [0, 0]),
        ("own_statistics", [-1]),
        ("features", 0),
        ("features", 1 << 40),
        ("features", "ten"),
        ("classes", []),
        ("classes", None),
        ("bits", {"scale": 9, "norm": 8, "head": 8}),
        ("bits", {"scale": 4, "norm": 1, "head": 8}),
        ("bits", {"scale": 1, "norm": 99, "head": 8}),
        ("bits", {"norm": 8, "head": 8}),
        ("input", {"size": 1}),
        ("input", {"size": 0, "resize": 18, "mean": [0, 0, 0], "std": [1, 1, 1]}),
        ("input", {"size": 16, "resize": 18, "mean": [0, 0, 0], "std": [1, 0, 1]}),
        ("input", {"size": 16, "resize": 18, "mean": [0, 0], "std": [1, 1]}),
        ("record", 3),
    ],
)
def test_metadata_that_makes_no_sense_is_damage_though_its_checksum_holds(key: str, value: object) -> None:
    with pytest.raises(DamagedFileError, match=r"does not make sense|stream|deflate"):
        decode(rewritten(change(key, value)))


@pytest.mark.parametrize("key", sorted(set(json.loads(read_container(GOOD)[0])) - {"checksum"}))
def test_no_entry_of_the_metadata_can_be_left_out(key: str) -> None:
    with pytest.raises(DamagedFileError):
        decode(rewritten(lambda metadata: metadata.pop(key)))


@pytest.mark.parametrize(
    ("written", "instead"),
    [
        ('"features":10', '"features":1e999'),
        ('"features":10', '"features":10.0'),
        ('"features":10', '"features":"10"'),
        ('"features":10', '"features":true'),
        ('"format":1', '"format":NaN'),
        ('"mean":[0.485', '"mean":[1' + 400 * "0"),
        ('"mean":[0.485', '"mean":["0.485"'),
        ('"classes":', '"classes":["another"],"classes":'),
        ('"own_statistics":[0', '"own_statistics":[false'),
        ('"record":{', '"record":{"loss":Infinity,'),
        ('"record":{', '"record":{"note":' + 5000 * "[" + 5000 * "]" + ","),
        ('"soft":true', '"soft":"no"'),
        ('"task":"tiny kernel"', '"task":["tiny kernel"]'),
        ('"task":"tiny kernel"', r'"task":"half a pair: \ud83d"'),
        ('["class 0","class 1","class 2"]', '"abc"'),
    ],
    ids=lambda text: text[:40],
)
def test_metadata_of_another_type_is_damage_rather_than_converted(written: str, instead: str) -> None:
    with pytest.raises(DamagedFileError, match=r"metadata (cannot be read|does not make sense)"):
        decode(reworded(written, instead))


def test_half_a_surrogate_pair_in_the_header_is_damage() -> None:
    header, body = split()
    text = header["__metadata__"]["ksm_edge"]
    header["__metadata__"]["ksm_edge"] = text.replace("tiny kernel", "tiny \ud83d")
    with pytest.raises(DamagedFileError, match="metadata is not what was written"):
        decode(joined(header, body))


def test_more_layers_than_any_backbone_has_are_refused() -> None:
    layers = [[str(number), 1, 1, 1, 1] for number in range(MAX_LAYERS + 1)]
    with pytest.raises(DamagedFileError, match=f"{MAX_LAYERS + 1} layers; at most {MAX_LAYERS} are possible"):
        decode(rewritten(change("layers", layers)))


def test_metadata_that_is_no_json_object_is_damage() -> None:
    _, streams = read_container(GOOD)
    covered = '",nonsense'
    with pytest.raises(DamagedFileError, match="metadata cannot be read"):
        decode(write_container(OPENING + checksum(covered.encode()) + covered, streams))
    with pytest.raises(DamagedFileError, match="checksum does not hold"):
        decode(write_container("{}"[:COVERED_FROM], streams))


@pytest.mark.parametrize(
    ("name", "stream"),
    [
        ("bits", deflated(b"\x01" * 3)),
        ("scales", deflated(b"")),
        ("scales", deflated(b"\xff" * 200)),
        ("norm", deflated(b"\xff" * 66)),
        ("norm", deflated(b"\x00")),
        ("head", deflated(b"\x00" * 31)),
        ("ranges", np.zeros((9, 2), np.float32)),
        ("ranges", np.full((4, 2), np.nan, np.float32)),
        ("ranges", np.array([[0, -1]] * 4, np.float32)),
        ("steps", np.zeros(12, np.float32)),
        ("steps", np.full(13, -1, np.float32)),
        ("steps", np.full(13, 1.4e36, np.float32)),
        ("steps", np.full(13, np.inf, np.float32)),
        ("bias", np.zeros(4, np.float32)),
        ("bias", np.zeros((3, 1), np.float32)),
        ("bias", np.zeros(12, np.uint8)),
        ("own", np.zeros(2, np.float32)),
        ("own", np.full(60, -1, np.float32)),
        ("golden", np.zeros((2, 4), np.float32)),
        ("golden", np.zeros(6, np.float32)),
    ],
)
def test_a_stream_that_does_not_fit_is_damage_though_its_checksum_holds(name: str, stream: np.ndarray) -> None:
    with pytest.raises(DamagedFileError):
        decode(rewritten(streams={name: stream}))


@pytest.mark.parametrize("name", ["bits", "scales", "norm", "head"])
def test_a_bomb_in_any_coded_stream_takes_no_memory(name: str) -> None:
    bomb = deflated(bytes(50_000_000))
    codecs = {"bits": PACKED} if name == "bits" else {}
    data = rewritten(lambda metadata: metadata["codecs"].update(codecs), streams={name: bomb})
    tracemalloc.start()
    try:
        with pytest.raises(DamagedFileError, match="bytes where"):
            decode(data)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_streams_that_share_bytes_are_damage_though_their_sizes_add_up() -> None:
    header, body = split()
    start = header["own"]["data_offsets"][0]
    header["bias"]["data_offsets"] = [start, start + 12]
    with pytest.raises(DamagedFileError, match=r"the streams overlap or leave a gap: one ends at byte \d+, the next"):
        decode(joined(header, body))
