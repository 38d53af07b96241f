"""A signature covers every bit of a pack file, and signing changes nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from signing import KeyFiles, smallest_pack
from tiny import tiny_pack

from ksm_edge.errors import DamagedFileError, FileError, SignatureError, UnsignedError
from ksm_edge.pack.budget import budget
from ksm_edge.pack.container import place, read_container, write_container
from ksm_edge.pack.files import load_pack
from ksm_edge.pack.format import encode
from ksm_edge.pack.keys import load_private_key, load_public_key
from ksm_edge.pack.reader import decode
from ksm_edge.pack.signature import SIGNATURE, SIGNATURE_BYTES, require_signature, signed

PLAIN = encode(smallest_pack())


@pytest.fixture(scope="module")
def keys(key_files: KeyFiles) -> list:
    return [load_public_key(key_files.public)]


@pytest.fixture(scope="module")
def good(key_files: KeyFiles) -> bytes:
    return by(key_files.private, PLAIN)


def by(private: Path, data: bytes) -> bytes:
    return signed(data, load_private_key(private, lambda: b""))


def test_a_signed_pack_is_accepted_with_its_key_and_read_as_before(good: bytes, keys: list) -> None:
    require_signature(good, keys)
    assert encode(decode(good)) == PLAIN


@pytest.mark.parametrize("statistics", ["frozen", "batch"])
def test_signing_keeps_the_metadata_and_every_stream(key_files: KeyFiles, keys: list, statistics: str) -> None:
    plain = encode(tiny_pack(statistics=statistics))
    data = by(key_files.private, plain)
    require_signature(data, keys)
    text, streams = read_container(plain)
    signed_text, signed_streams = read_container(data)
    assert signed_text == text
    assert signed_streams.pop(SIGNATURE).nbytes == SIGNATURE_BYTES
    assert signed_streams.keys() == streams.keys()
    for name, stream in streams.items():
        assert signed_streams[name].dtype == stream.dtype
        assert signed_streams[name].shape == stream.shape
        assert signed_streams[name].tobytes() == stream.tobytes()


def test_what_is_signed_is_the_file_with_zeros_in_the_signatures_place(good: bytes, keys: list) -> None:
    where = place(good, SIGNATURE)
    header_bytes = int.from_bytes(good[:8], "little")
    start, end = json.loads(good[8 : 8 + header_bytes])[SIGNATURE]["data_offsets"]
    assert (where.start, where.stop) == (8 + header_bytes + start, 8 + header_bytes + end)
    keys[0].verify(good[where], good[: where.start] + bytes(64) + good[where.stop :])


def test_the_stock_library_reads_a_signed_pack(good: bytes) -> None:
    streams = safetensors.numpy.load(good)
    assert streams[SIGNATURE].dtype == np.uint8
    assert streams[SIGNATURE].shape == (64,)
    assert streams.keys() - {SIGNATURE} == safetensors.numpy.load(PLAIN).keys()


def test_no_flipped_bit_anywhere_goes_unnoticed(good: bytes, keys: list) -> None:
    unnoticed = []
    for bit in range(8 * len(good)):
        broken = bytearray(good)
        broken[bit // 8] ^= 1 << bit % 8
        try:
            require_signature(bytes(broken), keys)
        except FileError:
            continue
        unnoticed.append(bit)
    assert not unnoticed


def test_no_file_cut_short_is_read_or_verified(good: bytes, keys: list) -> None:
    for length in range(len(good)):
        with pytest.raises(DamagedFileError):
            decode(good[:length])
        with pytest.raises(DamagedFileError):
            require_signature(good[:length], keys)


def test_signing_again_replaces_the_signature(good: bytes, key_files: KeyFiles, keys: list) -> None:
    again = by(key_files.other, good)
    assert len(again) == len(good)
    require_signature(again, [load_public_key(key_files.other_public)])
    with pytest.raises(SignatureError):
        require_signature(again, keys)
    assert by(key_files.private, again) == good


def test_of_several_keys_any_may_fit(good: bytes, key_files: KeyFiles, keys: list) -> None:
    other = load_public_key(key_files.other_public)
    require_signature(good, [other, *keys])
    require_signature(good, [*keys, other])
    for wrong in ([other], []):
        with pytest.raises(SignatureError, match=rf"fits none of the {len(wrong)} public key\(s\) given"):
            require_signature(good, wrong)


def test_an_unsigned_pack_is_refused_with_what_to_do() -> None:
    with pytest.raises(
        UnsignedError, match=r"not signed, and a signature is required.*ksm-edge sign PACK --key"
    ) as caught:
        require_signature(PLAIN, [])
    assert caught.value.exit_code == 3


def test_another_packs_signature_does_not_fit(good: bytes, key_files: KeyFiles, keys: list) -> None:
    text, streams = read_container(by(key_files.private, encode(tiny_pack())))
    _, own = read_container(good)
    with pytest.raises(SignatureError):
        require_signature(write_container(text, streams | {SIGNATURE: own[SIGNATURE]}), keys)


@pytest.mark.parametrize(
    "stream",
    [np.zeros(63, np.uint8), np.zeros(65, np.uint8), np.zeros((1, 64), np.uint8), np.zeros(16, np.float32)],
    ids=["63", "65", "1x64", "float"],
)
def test_a_signature_that_can_be_none_is_damage(stream: np.ndarray) -> None:
    text, streams = read_container(PLAIN)
    data = write_container(text, streams | {SIGNATURE: stream})
    for check in (decode, lambda data: require_signature(data, [])):
        with pytest.raises(DamagedFileError, match=r"stream 'signature' holds .*; needed uint8 of \(64,\)"):
            check(data)


def test_a_signature_that_no_key_is_asked_for_is_read_over() -> None:
    text, streams = read_container(PLAIN)
    assert encode(decode(write_container(text, streams | {SIGNATURE: np.zeros(64, np.uint8)}))) == PLAIN


def test_a_file_is_refused_before_it_is_decoded(
    good: bytes, keys: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[bytes] = []
    monkeypatch.setattr("ksm_edge.pack.files.decode", decoded.append)
    for data, error in ((PLAIN, UnsignedError), (good[:-1] + bytes([good[-1] ^ 1]), SignatureError)):
        (tmp_path / "a.ksm").write_bytes(data)
        with pytest.raises(error, match=r"a\.ksm: the pack"):
            load_pack(tmp_path / "a.ksm", keys)
    assert not decoded
    (tmp_path / "a.ksm").write_bytes(good)
    load_pack(tmp_path / "a.ksm", keys)
    assert decoded == [good]


def test_the_budget_counts_the_signature(good: bytes) -> None:
    assert budget(PLAIN)["signature"] == 0
    assert budget(good)["signature"] == SIGNATURE_BYTES
    assert sum(budget(good).values()) == len(good)
