from __future__ import annotations

import numpy as np
import pytest
from tiny import LAYERS, tiny_weights

from ksm_edge.mask import INITIAL_SCORE, THRESHOLD
from ksm_edge.training.layer import TrainedLayer
from ksm_edge.training.settings import Settings
from ksm_edge.training.thinning import late_step, salience, thin

TABLE = {layer.name: layer for layer in LAYERS}


def layer(
    name: str, granularity: str = "kernel", form: str = "pointwise", seed: int = 1, moment_bits: int = 32
) -> TrainedLayer:
    """A layer some of whose scores are cut, behind steps with gradients of its own."""
    settings = Settings(granularity=granularity, moment_bits=moment_bits)
    result, rng = TrainedLayer(TABLE[name], tiny_weights()[name], form, settings), np.random.default_rng(seed)
    result.score[...] = rng.normal(8e-3, 5e-3, result.score.shape)
    for count in range(1, 4):
        gradient = rng.standard_normal(result.score.shape).astype(np.float32)
        result.learning["score"].step(gradient, 0.0, count)
    result.fuse()
    return result


FORMS = {"project": "pointwise", "stem": "taps"}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("granularity", ["kernel", "group:3", "channel", "element"])
def test_salience_is_the_change_of_the_mask_by_the_gradients_squares(name: str, granularity: str) -> None:
    subject = layer(name, granularity, FORMS[name])
    mask, rng, squares = subject.mask(), np.random.default_rng(1), np.zeros(subject.score.shape)
    rng.normal(size=squares.shape)  # the scores
    for _ in range(3):
        squares = 0.999 * squares + 0.001 * rng.standard_normal(squares.shape) ** 2
    expected = ((1 - mask.values) ** 2 * squares)[~mask.keep]
    np.testing.assert_allclose(salience(subject), expected, rtol=1e-4)


def test_moments_in_eight_bits_tell_nearly_the_same() -> None:
    whole, few = (layer("project", moment_bits=bits) for bits in (32, 8))
    np.testing.assert_allclose(salience(few), salience(whole), rtol=0.25)


def test_the_least_salient_of_all_layers_go_back_and_the_others_stay() -> None:
    subjects = [layer("stem", form="taps", seed=1), layer("project", seed=2)]
    before = [(salience(subject), subject.score < THRESHOLD) for subject in subjects]
    thin(subjects, sum(values.size for values, _ in before) // 2)
    median = np.quantile(np.concatenate([values for values, _ in before]), 0.5)
    for subject, (values, was_cut) in zip(subjects, before, strict=True):
        is_cut = subject.score < THRESHOLD
        np.testing.assert_array_equal(is_cut[was_cut], values >= median)
        assert (subject.score[~is_cut] == np.float32(INITIAL_SCORE)).all()
        np.testing.assert_array_equal(subject.mask().keep, ~is_cut)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.9])
def test_so_many_go_back_as_were_asked_for(share: float) -> None:
    subjects = [layer("stem", form="taps", seed=1), layer("project", seed=2)]
    count = sum((subject.score < THRESHOLD).sum() for subject in subjects)
    thin(subjects, int(share * count))
    assert sum(subject.cut for subject in subjects) == count - int(share * count)


def test_what_is_kept_stays_and_what_is_cut_still_learns() -> None:
    subject = layer("project")
    thin([subject], subject.cut // 2)
    before = subject.score.copy()
    rng = np.random.default_rng(0)
    for count in range(1, 4):
        subject.product[...] = rng.standard_normal(subject.product.shape)
        subject.step({"score": 1e-3, "gamma": 1e-3, "beta": 1e-3}, count)
    is_cut = before < THRESHOLD
    np.testing.assert_array_equal(subject.score[~is_cut], before[~is_cut])
    assert (subject.score[is_cut] != before[is_cut]).all()


def test_nothing_cut_is_nothing_to_thin() -> None:
    subject = TrainedLayer(TABLE["project"], tiny_weights()["project"], "pointwise", Settings())
    thin([subject], 0)
    assert subject.mask().keep.all()


def test_thinning_leaves_steps_to_learn_to_do_without() -> None:
    assert late_step(1, 0.5) == 1
    assert all(1 <= late_step(steps, 0.5) < steps for steps in range(2, 500))


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_among_equals_so_many_go_back_all_the_same(share: float) -> None:
    subjects = [layer("stem", form="taps"), layer("project")]
    for subject in subjects:
        subject.learning["score"].square[...] = 0  # no gradient was ever felt
    count = sum(subject.cut for subject in subjects)
    thin(subjects, int(share * count))
    assert sum(subject.cut for subject in subjects) == count - int(share * count)
