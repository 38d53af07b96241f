from __future__ import annotations

import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksm_edge.coding.deflate import decode_codes, deflate, encode_codes, inflate
from ksm_edge.errors import DamagedFileError


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=3000))
def test_bytes_come_back_as_they_were(data: bytes) -> None:
    assert inflate(deflate(data), len(data)) == data


def test_what_is_cut_short_or_too_long_or_no_stream_is_refused() -> None:
    coded = deflate(b"abc" * 100)
    with pytest.raises(DamagedFileError, match=r"bytes where 300 are needed|ends too early"):
        inflate(coded[:-2], 300)
    with pytest.raises(DamagedFileError, match="bytes left over"):
        inflate(coded + b"x", 300)
    with pytest.raises(DamagedFileError, match="more than 299 bytes where 299 are needed"):
        inflate(coded, 299)
    with pytest.raises(DamagedFileError, match="300 bytes where 301 are needed"):
        inflate(coded, 301)
    with pytest.raises(DamagedFileError, match="cannot be decoded"):
        inflate(b"\xff" * 20, 5)


def test_a_bomb_is_refused_before_it_takes_memory() -> None:
    stream = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = stream.compress(bytes(100_000_000)) + stream.flush()
    tracemalloc.start()
    with pytest.raises(DamagedFileError, match="more than 1000 bytes"):
        inflate(bomb, 1000)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 8), st.integers(0, 300), st.integers(0, 2**31))
def test_codes_come_back_as_they_were(bits: int, count: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, count).astype(np.uint8)
    np.testing.assert_array_equal(decode_codes(encode_codes(codes, bits), bits, count), codes)


def test_the_first_code_is_the_lowest_of_its_byte() -> None:
    assert inflate(encode_codes(np.array([1, 2, 3], np.uint8), 2), 1) == bytes([0b00_11_10_01])
    assert inflate(encode_codes(np.array([5, 2, 7], np.uint8), 3), 2) == bytes([0b00_010_101, 0b00_000_111])


def test_lopsided_codes_take_less_than_a_bit_each() -> None:
    codes = (np.random.default_rng(0).random(40_000) < 0.05).astype(np.uint8)
    assert len(encode_codes(codes, 1)) < 0.31 * codes.size / 8  # the entropy is 0.286


@pytest.mark.parametrize(("raw", "bits", "count"), [(0b10_00_00_00, 2, 3), (0b01_000_000, 3, 2), (0b00_001_000, 3, 1)])
def test_bits_behind_the_last_code_are_refused(raw: int, bits: int, count: int) -> None:
    with pytest.raises(DamagedFileError, match="bits set behind the last code"):
        decode_codes(deflate(bytes([raw])), bits, count)
