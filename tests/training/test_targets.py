from __future__ import annotations

import numpy as np
import pytest

from ksm_edge.training.targets import balanced_weights, target_rows

LABELS = np.array([0, 2, 2, 1])


def test_rows_are_shares_of_one_step() -> None:
    rows = target_rows(LABELS, 3, 0.0)
    assert rows.dtype == np.float32
    assert rows.tolist() == [[0.25, 0, 0], [0, 0, 0.25], [0, 0, 0.25], [0, 0.25, 0]]


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("weights", [None, np.array([1, 2, 0.5], np.float32)])
def test_the_sum_of_a_step_is_one(smoothing: float, weights: np.ndarray | None) -> None:
    assert target_rows(LABELS, 3, smoothing, weights).sum() == pytest.approx(1, rel=1e-6)


def test_smoothing_spreads_over_all_classes() -> None:
    row = target_rows(np.array([1]), 4, 0.2)[0]
    np.testing.assert_allclose(row, [0.05, 0.85, 0.05, 0.05], rtol=1e-6)


def test_class_weights_divide_by_the_sum_of_the_whole_step() -> None:
    rows = target_rows(LABELS, 3, 0.0, np.array([1, 2, 4], np.float32))
    np.testing.assert_allclose(rows.sum(1), np.array([1, 4, 4, 2]) / 11, rtol=1e-6)


def test_balanced_weights_make_every_class_count_the_same_and_are_one_on_average() -> None:
    labels = np.array([0] * 6 + [1] * 3 + [2])
    weights = balanced_weights(labels, 3)
    np.testing.assert_allclose(np.bincount(labels) * weights, 10 / 3, rtol=1e-6)
    assert weights[labels].mean() == pytest.approx(1, rel=1e-6)


def test_a_class_without_images_does_not_divide_by_zero() -> None:
    assert np.isfinite(balanced_weights(np.array([0, 0]), 2)).all()
