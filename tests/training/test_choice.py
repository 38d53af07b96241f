"""The epoch to end with: the last one that the held-out images cannot tell from the best."""

from __future__ import annotations

import pytest

from ksm_edge.training.checkpoint import Progress
from ksm_edge.training.choice import as_good


@pytest.mark.parametrize("images", [1, 10, 100, 10_000])
@pytest.mark.parametrize("best", [0.0, 0.5, 0.9, 1.0])
def test_the_best_is_as_good_as_itself_and_nothing_that_is_far_below(best: float, images: int) -> None:
    assert as_good(best, best, images, 8)
    assert not as_good(best - 1.5 / images**0.5, best, images, 8)


def test_one_more_mistake_counts_the_less_the_fewer_mistakes_tell() -> None:
    # Of 100 images two errors are 6 at 0.9 and 2.7 at 1: that all answers are right does not make it certain.
    assert as_good(0.84, 0.90, 100, 7)
    assert not as_good(0.83, 0.90, 100, 7)
    assert as_good(0.98, 1.00, 100, 7)
    assert not as_good(0.97, 1.00, 100, 7)
    assert as_good(0.895, 0.90, 10_000, 7)
    assert not as_good(0.893, 0.90, 10_000, 7)


def test_the_best_of_many_epochs_is_luckier_than_that_of_a_few() -> None:
    # sqrt(2 ln 48) is 2.8 errors.
    assert as_good(0.82, 0.90, 100, 48)
    assert not as_good(0.81, 0.90, 100, 48)
    assert not as_good(0.83, 0.90, 100, 1)  # of fewer than eight it is two


def chosen(accuracies: list[float | None], images: int) -> tuple[int, float | None]:
    progress = Progress()
    for accuracy in accuracies:
        progress.add(0.1, 1, 1)
        progress.finish_epoch(accuracy)
        progress.choose(accuracy, images)
    return progress.best_epoch, progress.best_accuracy


def test_the_last_that_is_as_good_as_the_best_is_chosen() -> None:
    assert chosen([0.70, 0.96, 0.94, 0.95], 100) == (4, 0.95)
    assert chosen([0.70, 0.96, 0.94, 0.95], 10_000) == (2, 0.96)
    assert chosen([0.70, 0.96, 0.95, 0.80], 100) == (3, 0.95)  # what goes wrong late is left


def test_a_slow_decline_does_not_lower_what_counts_as_good() -> None:
    assert chosen([0.90, 0.88, 0.86, 0.84, 0.82, 0.80], 100) == (4, 0.84)


def test_without_held_out_images_it_is_the_last() -> None:
    assert chosen([None, None, None], 0) == (3, None)
