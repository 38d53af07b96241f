"""A reader that was written from the specification reads what this project's own reader reads, bit for bit."""

from __future__ import annotations

import ast
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import second_coding
import second_reader
import test_pack_damage as damage
from contents import of_pack, of_second
from hypothesis import given, settings
from signing import KeyFiles
from test_pack_format import all_bits, packs, possible
from tiny import LAYERS, tiny_bundle, tiny_pack

from ksm_edge.bundle.golden import golden_images
from ksm_edge.bundle.layers import MAX_PIXELS, InputContract
from ksm_edge.coding.deflate import encode_codes
from ksm_edge.coding.keep import GROUPS, PACKED, decode_keep, encode_keep
from ksm_edge.errors import FileError
from ksm_edge.fuse import fuse, fused_digest
from ksm_edge.pack.format import encode
from ksm_edge.pack.keys import load_private_key, load_public_key
from ksm_edge.pack.metadata import MAX_LAYERS, MAX_STEP, MAX_VALUES
from ksm_edge.pack.reader import decode
from ksm_edge.pack.record import Pack
from ksm_edge.pack.signature import signed

SPECIFICATION = (Path(__file__).parents[2] / "docs/pack-format.md").read_text(encoding="utf-8")


def assert_both_read_the_same(data: bytes) -> None:
    (values, arrays), (second_values, second_arrays) = of_pack(decode(data)), of_second(second_reader.read_pack(data))
    assert second_values == values
    assert second_arrays.keys() == arrays.keys()
    for name, array in arrays.items():
        assert second_arrays[name].dtype == array.dtype, name
        assert second_arrays[name].shape == array.shape, name
        assert second_arrays[name].tobytes() == array.tobytes(), name


@settings(max_examples=100, deadline=None)
@given(packs, all_bits)
def test_both_readers_read_the_same(pack: Pack, bits: dict[str, int]) -> None:
    assert_both_read_the_same(encode(pack, **possible(pack, bits)))


@pytest.mark.parametrize("shares", [(0.01, 0.2, 0.0, 0.0), (0.01, 0.0, 0.2, 0.0), (0.01, 0.2, 0.2, 0.1)])
def test_both_read_busy_rows_and_columns(shares: tuple[float, ...]) -> None:
    rng = np.random.default_rng(0)
    busy_row, busy_column = rng.random(70) < 0.2, rng.random(60) < 0.2
    share = np.array(shares).reshape(2, 2)[busy_row.astype(int)][:, busy_column.astype(int)]
    keeps = [rng.random((70, 60)) >= share, np.ones((3, 2), bool)]
    codec, data = encode_keep([np.flatnonzero(~keep) for keep in keeps], [keep.shape for keep in keeps])
    assert codec == GROUPS
    for keep, found in zip(keeps, second_coding.read_groups(data, [(70, 60), (3, 2)]), strict=True):
        np.testing.assert_array_equal(found, keep)


def test_both_ignore_fields_that_a_later_writer_may_add() -> None:
    def add(metadata: dict) -> None:
        for values in (metadata, *(metadata[name] for name in ("input", "bits", "codecs", "record"))):
            values["later"] = {"any": ["thing", 1, None]}

    data = damage.rewritten(add)
    assert_both_read_the_same(data)
    assert encode(replace(decode(data), record=decode(damage.GOOD).record)) == damage.GOOD


def test_both_accept_text_and_streams_laid_out_by_another_writer() -> None:
    header, body = damage.split()
    streams = {name: body[slice(*header[name]["data_offsets"])] for name in sorted(header) if name != "__metadata__"}
    turned, position = b"", 0
    for name, stream in reversed(streams.items()):  # in another order, floats behind an odd number of bytes
        header[name]["data_offsets"] = [position, position + len(stream)]
        turned, position = turned + stream, position + len(stream)
    data = damage.joined(header, turned)
    assert_both_read_the_same(data)
    assert encode(decode(data)) == damage.GOOD


def broken() -> list[bytes]:
    """A good pack with one thing wrong, of each kind that test_pack_damage knows."""
    marks = {
        mark.args[0]: mark.args[1]
        for test in vars(damage).values()
        for mark in getattr(test, "pytestmark", [])
        if isinstance(mark.args[0], (str, tuple))
    }
    metadata = [damage.rewritten(damage.change(key, value)) for key, value in marks["key", "value"]]
    streams = [damage.rewritten(streams={name: stream}) for name, stream in marks["name", "stream"]]
    texts = [damage.reworded(*case) for case in marks["written", "instead"]]
    header, body = damage.split()
    entries = [damage.joined(header | {"bias": entry}, body) for entry in marks["entry"]]
    return metadata + streams + texts + entries


@pytest.mark.parametrize("data", broken(), ids=range(len(broken())))
def test_both_refuse_the_same(data: bytes) -> None:
    with pytest.raises(FileError):
        decode(data)
    with pytest.raises(second_coding.RefusedError):
        second_reader.read_pack(data)


def test_no_flipped_byte_makes_the_readers_differ() -> None:
    for position in range(0, len(damage.GOOD), 3):
        data = bytearray(damage.GOOD)
        data[position] ^= 0x10
        try:
            decode(bytes(data))
        except FileError:
            with pytest.raises(second_coding.RefusedError):
                second_reader.read_pack(bytes(data))
        else:
            assert_both_read_the_same(bytes(data))


@pytest.mark.parametrize("granularity", ["kernel", "group:3", "channel", "element"])
@pytest.mark.parametrize("statistics", ["frozen", "batch"])
@pytest.mark.parametrize("amplify", [False, True])
def test_both_fuse_to_the_same_bits(tmp_path: Path, granularity: str, statistics: str, amplify: bool) -> None:
    bundle = tiny_bundle(tmp_path)
    pack = tiny_pack(granularity, statistics=statistics, cut=0.3, amplify=amplify)
    layers = {name: state for name, state in pack.layers.items() if name != "grouped"}
    pack = replace(pack, layers=layers, weight_shapes={name: pack.weight_shapes[name] for name in layers})
    data = encode(pack)
    read, expected = second_reader.read_pack(data), fuse(bundle, decode(data))
    found = {}
    for layer in LAYERS:
        weight, bias = second_reader.fuse_layer(
            read, layer.name, {**vars(bundle.weights[layer.name]), "eps": layer.eps}
        )
        found |= {f"{layer.name}.weight": weight, f"{layer.name}.bias": bias}
    assert second_reader.fused_digest(found) == fused_digest(expected)


@pytest.mark.parametrize("size", [1, 8, 23])
def test_both_make_the_same_golden_images(size: int) -> None:
    contract = InputContract(size, size, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    images = second_reader.golden_images(size, list(contract.mean), list(contract.std))
    assert images.tobytes() == golden_images(contract).tobytes()


def test_the_signature_is_of_what_the_specification_says(key_files: KeyFiles) -> None:
    data = signed(damage.GOOD, load_private_key(key_files.private, lambda: b""))
    assert second_reader.signed_message(damage.GOOD) is None
    assert_both_read_the_same(data)
    found = second_reader.signed_message(data)
    assert found is not None
    load_public_key(key_files.public).verify(*found)


def test_another_version_and_another_codec_are_refused_by_name() -> None:
    for change, message in (
        (lambda metadata: metadata.update(format=2), "format 2"),
        (lambda metadata: metadata["codecs"].update(bits="rans"), "codec rans"),
        (lambda metadata: metadata["codecs"].update(head="zstd"), "codec zstd"),
        (lambda metadata: metadata["codecs"].update(norm="mirrored-deflate"), "codec mirrored-deflate"),
    ):
        with pytest.raises(second_coding.RefusedError, match=message):
            second_reader.read_pack(damage.rewritten(change))


def test_the_examples_of_the_specification_hold() -> None:
    assert "`02 01 03 00 01 40 27`" in SPECIFICATION
    example, shapes = bytes.fromhex("02 01 03 00 01 40 27"), [(3, 4), (2, 2)]
    expected = np.array([[1, 1, 1, 1], [0, 1, 0, 0], [0, 1, 1, 1]], bool)
    np.testing.assert_array_equal(decode_keep(GROUPS, example, shapes)[0], np.flatnonzero(~expected))
    np.testing.assert_array_equal(second_coding.read_groups(example, shapes)[0], expected)
    assert "`b3 04 00`" in SPECIFICATION
    assert encode_codes(np.array([1, 2, 3], np.uint8), 2) == bytes.fromhex("b3 04 00")


def test_the_bounds_of_the_specification_are_the_readers() -> None:
    assert (MAX_VALUES, MAX_STEP, MAX_LAYERS, MAX_PIXELS) == (2**25, 2**120, 2048, 4096)
    for bound in ("at most 2^25", "2^120", "L <= 2048", "<= 4096", f"`{GROUPS}`", f"`{PACKED}`"):
        assert bound in SPECIFICATION


@pytest.mark.parametrize("module", [second_reader, second_coding])
def test_the_second_reader_has_nothing_of_ours(module: object) -> None:
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))  # type: ignore[attr-defined]
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} <= sys.stdlib_module_names | {"numpy", "second_coding"}
