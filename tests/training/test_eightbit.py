from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from ksm_edge.training.eightbit import (
    POSITIVE,
    SIGNED,
    pack_positive,
    pack_signed,
    unpack_positive,
    unpack_signed,
)

NUMBERS = arrays.arrays(np.float32, st.integers(1, 40), elements=st.floats(-(2.0**99), 2.0**99, width=32))
COUNTS = st.integers(1, 100_000)


def signed(values: np.ndarray, count: int) -> np.ndarray:
    codes = np.empty((1, values.size), np.uint8)
    return unpack_signed(codes, pack_signed(values[None], codes, count))[0]


def positive(values: np.ndarray, count: int) -> np.ndarray:
    codes = np.empty((1, values.size), np.uint8)
    return unpack_positive(codes, pack_positive(values[None], codes, count))[0]


def test_rows_have_ranges_of_their_own() -> None:
    values = np.array([[1e-20, 3e-20], [1e20, 0]], np.float32)
    codes = np.empty(values.shape, np.uint8)
    np.testing.assert_allclose(unpack_signed(codes, pack_signed(values, codes, 1)), values, rtol=1 / 8)
    np.testing.assert_allclose(unpack_positive(codes, pack_positive(values, codes, 1)), values, rtol=1 / 8)


@given(NUMBERS, COUNTS)
def test_what_is_not_far_below_the_largest_comes_back_within_an_eighth(values: np.ndarray, count: int) -> None:
    for kept, true, octaves in ((signed(values, count), values, 15), (positive(abs(values), count), abs(values), 31)):
        near = np.abs(true) >= max(np.abs(true).max() * 2.0**-octaves, 1e-35)
        np.testing.assert_allclose(kept[near], true[near], rtol=1 / 8)
        assert not kept[true == 0].any()


@given(NUMBERS, COUNTS)
def test_signs_and_zeros_stay(values: np.ndarray, count: int) -> None:
    kept = signed(values, count)
    assert ((kept == 0) | (np.sign(kept) == np.sign(values))).all()
    assert (positive(abs(values), count)[abs(values) > 1e-35] > 0).all()  # a square of 0 would be divided by


@pytest.mark.parametrize(("pack", "most"), [(signed, SIGNED), (positive, POSITIVE)])
def test_rounding_averages_out(pack: object, most: int) -> None:
    rng = np.random.default_rng(0)
    values = np.float32(2.0) ** rng.uniform(-most / 8 + 1, 0, 5000).astype(np.float32)
    steps = 400
    mean = sum(pack(values, count).astype(np.float64) for count in range(1, steps + 1)) / steps  # type: ignore[operator]
    np.testing.assert_allclose(mean, values, rtol=2e-3)
    assert np.abs(pack(values, 1) / values - 1).max() > 0.05  # type: ignore[operator]
