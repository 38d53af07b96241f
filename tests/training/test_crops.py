from __future__ import annotations

import pytest

from ksm_edge.training.crops import crop_scale
from ksm_edge.training.settings import Settings


def after(*known: float) -> list[dict[str, float]]:
    return [{"train_accuracy": accuracy} for accuracy in known]


@pytest.mark.parametrize(("known", "scale"), [(0.0, 0.8), (0.8, 0.8), (0.9, 0.575), (0.95, 0.4625), (1.0, 0.35)])
def test_crops_narrow_as_the_last_fifth_is_learned(known: float, scale: float) -> None:
    assert crop_scale(Settings(), after(0.5, known), 2) == pytest.approx(scale)


def test_the_first_crops_are_wide() -> None:
    assert crop_scale(Settings(), [], 0) == pytest.approx(0.8)


def test_a_view_that_is_seen_again_is_the_one_of_its_first_epoch() -> None:
    then = crop_scale(Settings(), after(0.9), 1)
    assert crop_scale(Settings(), after(0.9, 0.95, 1.0), 1) == then != crop_scale(Settings(), after(0.9, 1.0), 2)


def test_what_was_asked_for_stays() -> None:
    assert crop_scale(Settings(crop_scale=0.5), after(0.99), 1) == 0.5
