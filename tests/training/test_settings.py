from __future__ import annotations

import pytest

from ksm_edge.errors import UsageError
from ksm_edge.training.settings import Settings, usual_epochs


@pytest.mark.parametrize(
    ("name", "value"),
    [("method", "lora"), ("statistics", "running"), ("head_start", "ones"), ("granularity", "group:0"),
     ("granularity", "pixel"), ("epochs", 0),
     ("batch", 0), ("score_rate", -1.0), ("validation", 1.0), ("label_smoothing", float("nan")),
     ("mask_bits", float("inf")), ("mask_bits", -0.1), ("thin", 1.0),
     ("train_scale", 0.0), ("train_scale", 1.1), ("whole_at", -0.1), ("whole_at", 1.1),
     ("join_at", -0.1), ("join_at", 1.1),
     ("crop_scale", 0.0), ("crop_scale", 1.1), ("crop_start", 0.0)],
)  # fmt: skip
def test_settings_out_of_range_are_named(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=name.partition("_")[0]):
        Settings(**{name: value})  # type: ignore[arg-type]


def test_batch_statistics_keep_batch_norm_at_eight_bits() -> None:
    assert Settings(statistics="batch", norm_bits=3).pack_bits["norm_bits"] == 8
    assert Settings(norm_bits=3).pack_bits["norm_bits"] == 3


@pytest.mark.parametrize(("images", "epochs"), [(0, 240), (40, 240), (100, 96), (1199, 9), (1200, 8), (9000, 8)])
def test_few_images_are_shown_more_often(images: int, epochs: int) -> None:
    assert usual_epochs(images) == epochs


@pytest.mark.parametrize(
    ("join_at", "epochs", "last"),
    [(0.75, 8, 6), (0.75, 6, 5), (0.75, 3, 3), (1.0, 8, 8), (0.0, 8, 1), (0.55, 100, 55), (0.07, 100, 7)],
)
def test_images_are_held_out_until_a_share_of_the_epochs_has_passed(join_at: float, epochs: int, last: int) -> None:
    assert Settings(join_at=join_at, epochs=epochs).held_out_until == last
