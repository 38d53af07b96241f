"""The vectorised maths against METHOD.md written out as loops, one score at a time, in float64."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ksm_edge import mask as ksm
from ksm_edge.errors import UsageError

pytestmark = pytest.mark.usefixtures("each_form")

GRANULARITIES = ["kernel", "channel", "element", "group:1", "group:2", "group:3", "group:100"]
# (O, I per group, kh, kw): dense, 1x1, grouped (an I smaller than the input's channels looks the same), depthwise
SHAPES = [(4, 5, 3, 3), (3, 7, 1, 1), (6, 2, 3, 3), (8, 1, 3, 3), (2, 8, 1, 5), (1, 1, 1, 1)]


def score_index(o: int, i: int, y: int, x: int, granularity: str) -> tuple[int, ...]:
    """Which score belongs to weight[o, i, y, x]."""
    if granularity == "element":
        return (o, i, y, x)
    if granularity == "kernel":
        return (o, i)
    if granularity == "channel":
        return (o, 0)
    return (o, i // int(granularity.split(":")[1]))


def naive_soft_mask(score: np.ndarray, soft: bool) -> tuple[np.ndarray, np.ndarray, float, float]:
    """keep, scale, min and max by METHOD.md's forward equations."""
    keep = np.zeros(score.shape, bool)
    products: list[float] = []
    for index in np.ndindex(score.shape):
        keep[index] = score[index] >= score.dtype.type(5e-3)
        products.append(0.0 if keep[index] else float(score[index]))
    low, high = min(products), max(products)
    scale = np.zeros(score.shape)
    for index in np.ndindex(score.shape):
        if soft and not keep[index] and high - low > 1e-30:
            scale[index] = 0.5 * (float(score[index]) - low) / (high - low)
    return keep, scale, low, high


def naive_masked_weight(weight: np.ndarray, mask: np.ndarray, granularity: str) -> np.ndarray:
    masked = np.zeros_like(weight)
    for o, i, y, x in np.ndindex(weight.shape):
        masked[o, i, y, x] = weight[o, i, y, x] * mask[score_index(o, i, y, x, granularity)]
    return masked


def naive_score_gradient(score: np.ndarray, product: np.ndarray, granularity: str) -> np.ndarray:
    total = np.zeros(score.shape)
    for o, i, y, x in np.ndindex(product.shape):
        total[score_index(o, i, y, x, granularity)] += product[o, i, y, x]
    for index in np.ndindex(score.shape):
        g = 1 / (1 + math.exp(-12 * (score[index] - 5e-3)))
        total[index] *= 12 * g * (1 - g)
    return total


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, tuple[int, int, int, int], str]:
    shape = draw(st.sampled_from(SHAPES))
    granularity = draw(st.sampled_from(GRANULARITIES))
    # Few distinct values too, so that equal scores, and scores right at the threshold, come up.
    values = st.sampled_from([5e-3, 4.999e-3, 1e-2, 0.0, -1e-2, 2e-3]) | st.floats(-0.0625, 0.0625, width=32)
    score = draw(hnp.arrays(np.float32, ksm.score_shape(shape, granularity), elements=values.map(np.float32)))
    return score, shape, granularity


@settings(max_examples=150, deadline=None)
@given(cases(), st.booleans())
def test_soft_mask_is_the_method_written_as_loops(case: tuple, soft: bool) -> None:
    score = case[0]
    mask = ksm.soft_mask(score, soft=soft)
    keep, scale, low, high = naive_soft_mask(score, soft)
    np.testing.assert_array_equal(mask.keep, keep)
    # A scale is a difference over a difference: float32 loses what the range does not exceed by much.
    resolution = 2**-22 * max(abs(low), abs(high), 1e-30) / max(high - low, 1e-30)
    np.testing.assert_allclose(mask.scale, scale, atol=1e-6 + resolution)
    assert (mask.low, mask.high) == (low, high)
    assert mask.scale.dtype == mask.values.dtype == np.float32


@settings(max_examples=100, deadline=None)
@given(cases(), st.booleans())
def test_mask_is_one_where_kept_and_at_most_half_elsewhere(case: tuple, soft: bool) -> None:
    mask = ksm.soft_mask(case[0], soft=soft)
    assert (mask.values[mask.keep] == 1).all()
    assert (mask.values[~mask.keep] >= 0).all()
    assert (mask.values[~mask.keep] <= 0.5).all()


@settings(max_examples=100, deadline=None)
@given(cases(), st.integers(0, 2**31))
def test_masked_weight_and_score_gradient_are_the_method_written_as_loops(case: tuple, seed: int) -> None:
    score, shape, granularity = case
    weight, product = np.random.default_rng(seed).standard_normal((2, *shape))
    values = ksm.soft_mask(score).values
    np.testing.assert_array_equal(
        weight * ksm.expand(values, shape, granularity), naive_masked_weight(weight, values, granularity)
    )
    gradient = ksm.score_gradient(score.astype(np.float64), product, granularity)
    np.testing.assert_allclose(gradient, naive_score_gradient(score.astype(np.float64), product, granularity), 1e-9)


@settings(max_examples=60, deadline=None)
@given(cases(), st.integers(0, 2**31))
def test_reduce_is_the_transpose_of_expand(case: tuple, seed: int) -> None:
    score, shape, granularity = case
    rng = np.random.default_rng(seed)
    left, right = rng.standard_normal(score.shape), rng.standard_normal(shape)
    assert np.sum(ksm.expand(left, shape, granularity) * right) == pytest.approx(
        np.sum(left * ksm.reduce(right, granularity)), rel=1e-9, abs=1e-9
    )


@settings(max_examples=60, deadline=None)
@given(cases(), st.integers(0, 2**31))
def test_kernel_sums_are_enough_for_all_but_element(case: tuple, seed: int) -> None:
    _, shape, granularity = case
    if granularity == "element":
        return
    product = np.random.default_rng(seed).standard_normal(shape)
    np.testing.assert_allclose(
        ksm.reduce_kernels(product.sum(axis=(2, 3)), granularity), ksm.reduce(product, granularity), 1e-9, 1e-12
    )


@settings(max_examples=100, deadline=None)
@given(cases())
def test_scores_come_back_from_a_mask_that_has_been_made(case: tuple) -> None:
    mask = ksm.soft_mask(case[0])
    back = ksm.score_from_scale(mask)
    assert (back[mask.keep] == np.float32(ksm.INITIAL_SCORE)).all()
    if mask.high - mask.low > 1e-30:
        np.testing.assert_allclose(back[~mask.keep], case[0][~mask.keep], atol=1e-6 * max(-mask.low, mask.high, 1e-6))
    else:
        assert (back[~mask.keep] == np.float32(mask.low)).all()


@settings(max_examples=100, deadline=None)
@given(cases())
def test_what_is_as_far_above_the_initial_score_is_amplified_as_what_is_below_is_cut(case: tuple) -> None:
    below = np.minimum(case[0], np.float32(0.006))
    below[abs(below - ksm.THRESHOLD) < 1e-6] = 0  # as far above may be on the other side by an ulp
    cut = ksm.soft_mask(below)
    mixed = np.where(np.arange(below.size).reshape(below.shape) % 2, np.float32(0.02) - below, below)
    mask = ksm.soft_mask(mixed, amplify=True)
    above = mixed > ksm.INITIAL_SCORE
    np.testing.assert_array_equal(mask.keep, cut.keep)
    resolution = 4e-9 / max(cut.high - cut.low, 1e-30)  # of scores that were subtracted from 0.02
    np.testing.assert_allclose(mask.values, np.where(above, 2 - cut.values, cut.values), atol=1e-6 + resolution)
    assert ((mask.cut_scale <= 0.5) | ((mask.cut_scale >= 1.5) & (mask.cut_scale <= 2))).all()
    assert ksm.soft_mask(mixed).keep[above].all()
    assert not ksm.soft_mask(mixed, soft=False, amplify=True).values[~cut.keep & ~above].any()
    assert ksm.soft_mask(mixed, soft=False, amplify=True).keep[above].all()


@settings(max_examples=100, deadline=None)
@given(cases())
def test_amplified_scores_come_back_from_a_mask_too(case: tuple) -> None:
    mask = ksm.soft_mask(case[0], amplify=True)
    back = ksm.score_from_scale(mask)
    assert (back[mask.keep] == np.float32(ksm.INITIAL_SCORE)).all()
    if mask.high - mask.low > 1e-6:
        np.testing.assert_allclose(back[~mask.keep], case[0][~mask.keep], atol=1e-6)


def test_keep_gradient_is_that_of_the_soft_binarisation() -> None:
    score = np.linspace(-0.5, 0.5, 101)
    sigmoid = lambda s: 1 / (1 + np.exp(-12 * (s - 5e-3)))  # noqa: E731
    h = 1e-6
    np.testing.assert_allclose(ksm.keep_gradient(score), (sigmoid(score + h) - sigmoid(score - h)) / (2 * h), 1e-7)
    assert ksm.keep_gradient(np.array([5e-3])) == pytest.approx(3.0)


def test_initial_scores_keep_everything() -> None:
    mask = ksm.soft_mask(np.full((4, 3), ksm.INITIAL_SCORE, np.float32))
    assert mask.keep.all()
    assert (mask.values == 1).all()
    assert (mask.low, mask.high) == (0.0, 0.0)


def test_a_score_at_the_threshold_is_kept_and_the_next_one_below_is_not() -> None:
    threshold = np.float32(ksm.THRESHOLD)
    below = np.nextafter(threshold, np.float32(0))
    assert ksm.soft_mask(np.array([[threshold, below]])).keep.tolist() == [[True, False]]


def test_zeros_of_kept_kernels_take_part_in_the_range() -> None:
    # One kept: the range is 0 to 4e-3, so the two cut ones get 0.25 and 0.5; without the zero they would get 0 and 0.5.
    mask = ksm.soft_mask(np.array([[1e-2, 2e-3, 4e-3]], np.float32))
    np.testing.assert_allclose(mask.scale, [[0, 0.25, 0.5]], atol=1e-6)


def test_equal_cut_scores_with_none_kept_give_no_scale() -> None:
    mask = ksm.soft_mask(np.full((2, 2), 1e-3, np.float32))
    assert not mask.keep.any()
    assert not mask.scale.any()


@pytest.mark.parametrize("greatest", [1e-45, 1e-39, 1e-31])
def test_a_range_too_small_for_float32_counts_as_none(greatest: float) -> None:
    assert not ksm.soft_mask(np.array([[greatest, 0, 1e-2]], np.float32)).scale.any()


@pytest.mark.parametrize(
    "granularity",
    ["", "kernels", "group", "group:", "group:0", "group:-2", "group:x", "group:²", "group:1000000000", "layer"],
)
def test_what_is_no_granularity_is_refused_by_name(granularity: str) -> None:
    with pytest.raises(UsageError, match="expected kernel, group:N"):
        ksm.score_shape((2, 2, 3, 3), granularity)


def test_a_group_of_more_in_channels_than_there_are_takes_no_more_memory() -> None:
    tracemalloc.start()
    try:
        whole = ksm.expand(np.ones((2, 1), np.float32), (2, 8, 1, 1), "group:9999999")
        assert whole.shape == (2, 8, 1, 1)
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


def test_the_surrogate_gradient_is_finite_for_any_score() -> None:
    score = np.array([-2e37, -8, 0, ksm.THRESHOLD, 8, 2e37], np.float32)
    gradient = ksm.keep_gradient(score)
    assert np.isfinite(gradient).all()
    assert gradient[3] == gradient.max() == pytest.approx(ksm.SHARPNESS / 4)
