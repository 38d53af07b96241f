from __future__ import annotations

from dataclasses import replace

import pytest

from ksm_edge.bundle.layers import InputContract
from ksm_edge.errors import UsageError
from ksm_edge.training import crops
from ksm_edge.training.settings import Settings

WHOLE = InputContract(32, 32, (0.0,) * 3, (1.0,) * 3)


def crop_scale(settings: Settings, history: list[dict[str, float]], contract: InputContract = WHOLE) -> float:
    return crops.crop_scale(settings, contract, history, turn=0)


def after(*known: float) -> list[dict[str, float]]:
    return [{"train_accuracy": accuracy} for accuracy in known]


@pytest.mark.parametrize(("known", "scale"), [(0.0, 0.8), (0.8, 0.8), (0.9, 0.575), (0.95, 0.4625), (1.0, 0.35)])
def test_crops_narrow_as_the_last_fifth_is_learned(known: float, scale: float) -> None:
    assert crop_scale(Settings(), after(0.99, known)) == pytest.approx(scale)


def test_the_first_crops_are_wide() -> None:
    assert crop_scale(Settings(), []) == pytest.approx(0.8)
    assert crop_scale(Settings(crop_start=0.5), []) == pytest.approx(0.5)


@pytest.mark.parametrize(("resize", "scale"), [(40, 0.512), (64, 0.35), (16, 0.8)])
def test_wide_is_what_evaluation_sees_much_of(resize: int, scale: float) -> None:
    contract = replace(WHOLE, resize=resize)
    assert crop_scale(Settings(), [], contract) == pytest.approx(scale)
    assert crop_scale(Settings(), after(1.0), contract) == pytest.approx(0.35)
    assert crop_scale(Settings(crop_start=0.9), [], contract) == pytest.approx(0.9)


def test_crops_of_smaller_images_are_narrow() -> None:
    assert {crop_scale(Settings(train_scale=0.7), history) for history in ([], after(0.1), after(0.1, 0.9))} == {0.35}


@pytest.mark.parametrize(("turn", "scale"), [(0, 0.8), (1 / 3, 0.65), (1, 0.35)])
def test_crops_narrow_from_one_view_to_the_next_whatever_is_known(turn: float, scale: float) -> None:
    for history in ([], after(0.1), after(1.0)):
        assert crops.crop_scale(Settings(views=4), WHOLE, history, turn) == pytest.approx(scale)


def test_crops_cannot_widen() -> None:
    with pytest.raises(UsageError, match=r"crop_start 0\.2: must lie in \[0\.35, 1\]"):
        Settings(crop_start=0.2)


@pytest.mark.parametrize("views", [0, 4])
def test_what_was_asked_for_stays(views: int) -> None:
    assert crops.crop_scale(Settings(crop_scale=0.5, views=views), WHOLE, after(0.99), turn=1) == 0.5
