import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksm_edge.data.split import stratified_split
from ksm_edge.errors import UsageError

labels = st.lists(st.integers(0, 6), max_size=120)
fractions = st.floats(0.01, 0.95)
seeds = st.integers(0, 2**32)


@given(labels, fractions, seeds)
def test_every_image_is_in_exactly_one_part(labels, fraction, seed):
    train, held_out = stratified_split(labels, fraction, seed)
    assert sorted([*train, *held_out]) == list(range(len(labels)))
    assert train.dtype == held_out.dtype == np.int64


@given(labels, fractions, seeds)
def test_every_class_gives_its_share_and_keeps_some(labels, fraction, seed):
    train, held_out = stratified_split(labels, fraction, seed)
    kept, given = np.bincount(np.take(labels, train).astype(int)), np.bincount(np.take(labels, held_out).astype(int))
    for label in set(labels):
        count = labels.count(label)
        out = given[label] if label < len(given) else 0
        assert kept[label] >= 1
        assert out == 0 if count == 1 else out >= 1
        assert abs(out - count * fraction) <= 1 or out in (1, count - 1)


@given(labels, fractions, seeds)
def test_the_same_seed_gives_the_same_split(labels, fraction, seed):
    for once, again in zip(
        stratified_split(labels, fraction, seed), stratified_split(np.array(labels, int), fraction, seed), strict=True
    ):
        np.testing.assert_array_equal(once, again)


def test_another_seed_gives_another_split():
    assert set(stratified_split([0] * 50, 0.2, 0)[1]) != set(stratified_split([0] * 50, 0.2, 1)[1])


def test_fraction_zero_holds_nothing_out():
    assert stratified_split([0, 0, 1, 1], 0, 0)[1].size == 0


@pytest.mark.parametrize("fraction", [-0.1, 1, 15, float("nan")])
def test_a_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(UsageError, match="less than 1"):
        stratified_split([0, 0], fraction, 0)
