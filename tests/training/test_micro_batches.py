from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from learner import CLASSES, SETTINGS, batch, same_bits, train, trainer

from ksm_edge.bundle.layers import Bundle
from ksm_edge.errors import UsageError
from ksm_edge.training.targets import target_rows


@pytest.mark.parametrize("changes", [{}, {"granularity": "element"}, {"method": "norm"}], ids=str)
def test_how_a_batch_is_cut_does_not_matter(bundle: Bundle, changes: dict[str, object]) -> None:
    settings = replace(SETTINGS, **changes)  # type: ignore[arg-type]
    trainers = [trainer(bundle, settings, micro_batch) for micro_batch in (1, 4, 3)]
    losses = [train(subject, 0, 1)[0] for subject in trainers]
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-5)
    first = trainers[0].state()
    for subject in trainers[1:]:
        for name, array in subject.state().items():
            if name.endswith(
                ":mean"
            ):  # after one step a tenth of the gradient, which Adam's own step hides the size of
                np.testing.assert_allclose(
                    array, first[name], atol=1e-5 * abs(first[name]).max(), rtol=1e-5, err_msg=name
                )


@pytest.mark.parametrize("part", [1, 3, 4, 8])
def test_images_that_come_in_parts_are_one_batch(bundle: Bundle, part: int) -> None:
    whole, cut = trainer(bundle, micro_batch=1), trainer(bundle, micro_batch=1)
    images, labels = batch(0)
    targets = target_rows(labels, CLASSES, 0.0)
    result = whole.step(images, targets)
    assert cut.step((images[i : i + part] for i in range(0, 8, part)), targets) == result
    assert same_bits(cut, whole)


def test_a_smaller_last_batch_is_that_batch_alone(bundle: Bundle) -> None:
    padded, exact = trainer(bundle, micro_batch=4), trainer(bundle, micro_batch=1)
    images, labels = batch(0, 5)
    results = [subject.step(images, target_rows(labels, CLASSES, 0.0)) for subject in (padded, exact)]
    assert results[0].loss == pytest.approx(results[1].loss, rel=1e-5)
    assert (results[0].correct, results[0].count) == (results[1].correct, 5)


def test_batch_statistics_in_parts_are_refused(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="batch 8, micro-batch 4"):
        trainer(bundle, replace(SETTINGS, statistics="batch"), micro_batch=4)


@pytest.mark.parametrize("method", ["ksm", "head"])
def test_workers_add_up_to_the_same_step_every_time(bundle: Bundle, method: str) -> None:
    settings = replace(SETTINGS, method=method)
    alone, together, again = (trainer(bundle, settings, micro_batch=1, workers=n) for n in (1, 3, 3))
    images, labels = batch(0)
    targets = target_rows(labels, CLASSES, 0.0)
    for release in (False, True, False):  # the first run, one that gives its memory back, and one behind it
        results = [subject.step(images, targets, release=release) for subject in (alone, together, again)]
        assert results[0].loss == pytest.approx(results[1].loss, rel=1e-5)
        assert results[1] == results[2]
        assert same_bits(together, again)
    moments = {name: array for name, array in alone.state().items() if name.endswith(":mean")}
    for name, array in moments.items():
        np.testing.assert_allclose(together.state()[name], array, rtol=1e-3, atol=1e-4 * abs(array).max(), err_msg=name)


def test_workers_begin_a_step_anew_where_the_one_before_failed(bundle: Bundle) -> None:
    failed, other = (trainer(bundle, micro_batch=1, workers=2) for _ in range(2))
    images, labels = batch(0)
    targets = target_rows(labels, CLASSES, 0.0)

    def torn() -> Iterator[np.ndarray]:
        yield images[:5]
        raise OSError("the card is gone")

    with pytest.raises(OSError, match="the card is gone"):
        failed.step(torn(), targets)
    assert failed.step(images, targets) == other.step(images, targets)
    assert same_bits(failed, other)
