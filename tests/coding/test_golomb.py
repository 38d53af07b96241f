from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksm_edge.coding.golomb import BLOCK, decode, divisor, encode
from ksm_edge.errors import DamagedFileError

pairs = st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 700)), max_size=200)


@settings(max_examples=200, deadline=None)
@given(pairs, st.binary(max_size=3))
def test_gaps_come_back_and_leave_what_is_behind_them(gaps: list[tuple[int, int]], rest: bytes) -> None:
    values, divisors = (
        np.array(column, np.int64).reshape(-1) for column in ([g for g, _ in gaps], [m for _, m in gaps])
    )
    each = np.ones_like(divisors)
    data = encode(values, divisors, each)
    found, used = decode(data + rest, divisors, each)
    np.testing.assert_array_equal(found, values)
    assert used == len(data)


def test_gaps_of_several_blocks_come_back() -> None:
    rng = np.random.default_rng(0)
    counts = np.array([1, BLOCK - 1, 0, 5, 2 * BLOCK + 5, 3, BLOCK // 2])
    divisors = rng.integers(1, 40, counts.size)
    gaps = rng.geometric(1 / (np.repeat(divisors, counts) + 1)) - 1
    data = encode(gaps, divisors, counts)
    found, used = decode(data, divisors, counts)
    np.testing.assert_array_equal(found, gaps)
    assert used == len(data)


@pytest.mark.parametrize(
    ("gap", "m", "bits"),
    [
        (0, 1, "0"),
        (3, 1, "1110"),
        (0, 2, "00"),
        (3, 2, "101"),
        (0, 5, "000"),
        (2, 5, "010"),
        (3, 5, "0110"),
        (9, 5, "10111"),
    ],
)
def test_a_single_gap_is_unary_then_truncated_binary(gap: int, m: int, bits: str) -> None:
    expected = int(bits.ljust(8, "0"), 2)
    assert encode(np.array([gap]), np.array([m]), np.array([1])) == bytes([expected])


@pytest.mark.parametrize("share", [0.0005, 0.01, 0.1, 0.3])
def test_the_divisor_is_as_good_as_any(share: float) -> None:
    gaps = np.random.default_rng(0).geometric(share, 5000) - 1
    cells = int(gaps.sum()) + gaps.size
    count = np.array([gaps.size])
    (chosen,) = divisor(np.array([cells]), count).tolist()
    lengths = {m: len(encode(gaps, np.array([m]), count)) for m in range(max(1, chosen // 2), 2 * chosen + 2)}
    assert lengths[chosen] <= 1.002 * min(lengths.values())
    p = gaps.size / cells
    entropy = -(p * math.log2(p) + (1 - p) * math.log2(1 - p)) * cells / 8
    assert lengths[chosen] <= 1.02 * entropy


@pytest.mark.parametrize(
    ("data", "divisors", "message"),
    [
        (b"", [1], "1 gaps declared, 0 found"),
        (b"\xff\xff", [1], "1 gaps declared, 0 found"),
        (b"\x7f", [700], "remainders are missing"),
        (b"\xfe", [2], "last remainders are missing"),
        (b"\x01", [1], "bits are set behind"),
        (b"\xff\xff\x7f\0\0\0\0", [1 << 25], "at most 67108864 is possible"),
    ],
)
def test_what_is_cut_short_or_runs_on_is_refused(data: bytes, divisors: list[int], message: str) -> None:
    with pytest.raises(DamagedFileError, match=message):
        decode(data, np.array(divisors, np.int64), np.ones(len(divisors), np.int64))
