from __future__ import annotations

import math
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksm_edge.bitcode import GAPS, PACKED, decode_keep, deflate, encode_keep, inflate
from ksm_edge.errors import DamagedFileError, UnsupportedVersionError


@st.composite
def layers(draw: st.DrawFn) -> list[np.ndarray]:
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    sizes = draw(st.lists(st.integers(1, 3000), max_size=5))
    shares = [draw(st.sampled_from([0.0, 0.001, 0.03, 0.5, 0.97, 1.0])) for _ in sizes]
    return [rng.random(size) >= share for size, share in zip(sizes, shares, strict=True)]


@settings(max_examples=150, deadline=None)
@given(layers())
def test_keep_bits_come_back_as_they_were(keeps: list[np.ndarray]) -> None:
    codec, data = encode_keep(keeps)
    back = decode_keep(codec, data, [keep.size for keep in keeps])
    for keep, found in zip(keeps, back, strict=True):
        if keep.all():
            assert found is None
        else:
            np.testing.assert_array_equal(found, keep)


@pytest.mark.parametrize("gap", [0, 1, 253, 254, 255, 256, 509, 510, 511, 765])
def test_a_gap_at_the_escapes_border_comes_back(gap: int) -> None:
    keep = np.ones(2000, bool)
    keep[[7, 7 + gap + 1]] = False
    codec, data = encode_keep([keep, ~keep, keep])
    for expected, found in zip([keep, ~keep, keep], decode_keep(codec, data, [2000] * 3), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_layers_that_keep_everything_cost_about_a_byte() -> None:
    codec, data = encode_keep([np.ones(100_000, bool)] * 50)
    assert codec == GAPS
    assert len(data) <= 52


@pytest.mark.parametrize(("share", "slack"), [(0.003, 1.08), (0.027, 1.04), (0.1, 1.06), (0.3, 1.10)])
def test_sparse_cuts_cost_little_more_than_their_entropy(share: float, slack: float) -> None:
    keep = np.random.default_rng(0).random(500_000) >= share
    _, data = encode_keep([keep])
    p = 1 - keep.mean()
    entropy_bytes = -(p * math.log2(p) + (1 - p) * math.log2(1 - p)) * keep.size / 8
    assert len(data) <= slack * entropy_bytes


def test_noise_is_packed() -> None:
    keep = np.random.default_rng(0).random(80_000) >= 0.5
    codec, data = encode_keep([keep])
    assert codec == PACKED
    assert len(data) < 10_100


def raw_deflate(data: bytes) -> bytes:
    stream = zlib.compressobj(9, zlib.DEFLATED, -15)
    return stream.compress(data) + stream.flush()


@pytest.mark.parametrize(
    ("codec", "raw", "sizes", "message"),
    [
        (GAPS, b"", [4], "counts of cut kernels"),
        (GAPS, b"\x80\x80\x80\x80\x80\x01", [4], "counts of cut kernels"),
        (GAPS, b"\x02\x00", [4], "2 cut kernels declared, 1 gaps"),
        (GAPS, b"\x01\x00\x00", [4], "1 cut kernels declared, 2 gaps"),
        (GAPS, b"\x00\xff", [400], "0 cut kernels declared"),
        (GAPS, b"\x01\x04", [4], "cut kernel at 4 in a layer of 4"),
        (GAPS, b"\x01\xff\x00", [255], "cut kernel at 255 in a layer of 255"),
        (PACKED, b"\xff", [9], "1 bytes where 2 are needed"),
        (PACKED, b"\xff\xff\xff", [9], "more than 2 bytes where 2 are needed"),
        (PACKED, b"\xff\xff", [9], "bits are set behind the last layer"),
    ],
)
def test_bytes_that_do_not_fit_the_layers_are_refused(codec: str, raw: bytes, sizes: list[int], message: str) -> None:
    with pytest.raises(DamagedFileError, match=message):
        decode_keep(codec, raw_deflate(raw), sizes)


def test_an_unknown_codec_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedVersionError, match="'range-coder'; this release knows gaps-deflate and bits"):
        decode_keep("range-coder", b"", [4])


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=3000))
def test_bytes_come_back_as_they_were(data: bytes) -> None:
    assert inflate(deflate(data), exactly=len(data)) == data


def test_what_is_cut_short_or_too_long_or_no_stream_is_refused() -> None:
    coded = deflate(b"abc" * 100)
    with pytest.raises(DamagedFileError, match=r"bytes where 300 are needed|ends too early"):
        inflate(coded[:-2], exactly=300)
    with pytest.raises(DamagedFileError, match="bytes left over"):
        inflate(coded + b"x", exactly=300)
    with pytest.raises(DamagedFileError, match="more than 299 bytes where 299 are needed"):
        inflate(coded, exactly=299)
    with pytest.raises(DamagedFileError, match="300 bytes where 301 are needed"):
        inflate(coded, exactly=301)
    with pytest.raises(DamagedFileError, match="cannot be decoded"):
        inflate(b"\xff" * 20, exactly=5)


def test_a_bomb_is_refused_before_it_takes_memory() -> None:
    import tracemalloc

    bomb = raw_deflate(bytes(100_000_000))
    tracemalloc.start()
    with pytest.raises(DamagedFileError, match="more than 1000 bytes"):
        inflate(bomb, at_most=1000)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()
