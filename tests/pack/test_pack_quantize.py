from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ksm_edge.pack.quantize import dequantize_difference, dequantize_scale, quantize_difference, quantize_scale

differences = hnp.arrays(
    np.float32, st.integers(0, 20), elements=st.floats(-(2.0**40), 2.0**40, width=32) | st.floats(-1, 1, width=32)
)


@settings(max_examples=300, deadline=None)
@given(differences, st.integers(2, 8))
def test_differences_quantized_once_are_not_changed_by_doing_it_again(values: np.ndarray, bits: int) -> None:
    codes, step = quantize_difference(values, bits)
    again, step_again = quantize_difference(dequantize_difference(codes, step), bits)
    np.testing.assert_array_equal(again, codes)
    assert step_again == step


@settings(max_examples=200, deadline=None)
@given(differences, st.integers(2, 8))
def test_a_difference_is_off_by_half_a_step_at_most(values: np.ndarray, bits: int) -> None:
    codes, step = quantize_difference(values, bits)
    limit = 2 ** (bits - 1) - 1
    assert codes.dtype == np.int8
    assert np.abs(codes).max(initial=0) <= limit
    error = np.abs(dequantize_difference(codes, step).astype(np.float64) - values)
    assert error.max(initial=0) <= max(0.5001 * float(step), 1.3e-28)
    # No step is wasted: the greatest value gets the greatest code.
    if step:
        assert np.abs(codes).max() == limit


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_every_scale_code_comes_back(bits: int) -> None:
    codes = np.arange(2**bits, dtype=np.uint8)
    scales = dequantize_scale(codes, bits)
    assert scales[0] == 0
    assert scales[-1] == 0.5
    assert scales.dtype == np.float32
    np.testing.assert_array_equal(quantize_scale(scales, bits), codes)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 7])
def test_every_code_of_one_that_amplifies_comes_back_and_is_a_mirror_image(bits: int) -> None:
    codes = np.arange(2**bits, dtype=np.uint8)
    scales = dequantize_scale(codes + np.uint8(2**bits), bits)
    np.testing.assert_array_equal(scales, 2 - dequantize_scale(codes, bits))
    assert scales.dtype == np.float32
    np.testing.assert_array_equal(quantize_scale(scales, bits), codes + 2**bits)


@settings(max_examples=100, deadline=None)
@given(hnp.arrays(np.float32, 8, elements=st.floats(0, 0.5, width=32)), st.integers(1, 8))
def test_a_scale_is_off_by_half_a_code_at_most(scale: np.ndarray, bits: int) -> None:
    back = dequantize_scale(quantize_scale(scale, bits), bits)
    assert np.abs(back - scale).max() <= 0.25 / (2**bits - 1) + 1e-7
