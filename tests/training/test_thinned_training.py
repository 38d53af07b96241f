from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from learner import CLASSES, SETTINGS, STEPS, count, cut_of, same_bits, train, trainer

from ksm_edge.bundle.layers import Bundle
from ksm_edge.training.thinning import late_step
from ksm_edge.training.trainer import Trainer


def test_masks_are_thinned_once_and_none_is_cut_from_then_on(bundle: Bundle) -> None:
    at = late_step(STEPS, SETTINGS.thin_at)
    thinned, whole = (trainer(bundle, replace(SETTINGS, thin=share)) for share in (0.5, 0.0))
    for subject in (thinned, whole):
        train(subject, 0, at - 1)
    assert not thinned.is_thinned
    assert same_bits(thinned, whole)
    for subject in (thinned, whole):
        train(subject, at - 1, at)
    assert thinned.is_thinned
    before, left = (sum(map(len, cut_of(subject))) for subject in (whole, thinned))
    assert 1 < left == before - before // 2
    allowed = cut_of(thinned)
    train(thinned, at, STEPS)
    for found, once in zip(cut_of(thinned), allowed, strict=True):
        assert set(found) <= set(once)
    train(whole, at, STEPS)
    assert any(set(found) - set(once) for found, once in zip(cut_of(whole), allowed, strict=True))


@pytest.fixture
def limited(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Trainer, int]]:
    """A trainer whose usual masks may have that share of what they had unlimited, and how many scores that is."""
    most: list[int] = []
    monkeypatch.setattr("ksm_edge.training.trainer.most_cut", lambda *of: most[0])

    def make(share: float, warmup: float = SETTINGS.warmup) -> tuple[Trainer, int]:
        usual = replace(SETTINGS, thin=None, warmup=warmup)
        most[:] = [1_000_000]
        free = trainer(bundle, usual)
        train(free, 0, STEPS)
        most[:] = [int(share * count(free))]
        return trainer(bundle, usual), most[0]

    return make


def test_usual_masks_lose_what_they_have_too_much_and_no_more(limited: Callable[..., tuple[Trainer, int]]) -> None:
    subject, most = limited(0.5)
    at = late_step(STEPS, SETTINGS.thin_at)
    train(subject, 0, at - 1)
    assert count(subject) > most
    assert not subject.is_thinned
    train(subject, at - 1, at)
    assert count(subject) == most
    assert subject.is_thinned
    allowed = cut_of(subject)
    train(subject, at, STEPS)
    assert all(set(found) <= set(once) for found, once in zip(cut_of(subject), allowed, strict=True))


def test_masks_that_pass_the_limit_later_lose_it_then(limited: Callable[..., tuple[Trainer, int]]) -> None:
    subject, most = limited(0.95, warmup=0.9)
    at = late_step(STEPS, SETTINGS.thin_at)
    train(subject, 0, at)
    assert 0 < count(subject) < most  # and is not held to what is cut so far
    counts = []
    for step in range(at, STEPS):
        train(subject, step, step + 1)
        counts.append(count(subject))
    assert max(counts) == most


def test_a_training_resumed_in_front_of_the_limit_knows_so(limited: Callable[..., tuple[Trainer, int]]) -> None:
    (straight, _), (again, _) = limited(0.95, warmup=0.9), limited(0.95, warmup=0.9)

    def settled(subject: Trainer) -> set[bool]:
        return {layer.settled for layer in subject.layers.values()}

    seen = []
    for step in range(STEPS):
        train(straight, step, step + 1)
        again.restore({name: array.copy() for name, array in straight.state().items()}, step + 1)
        seen.append(settled(again))
        assert seen[-1] == settled(straight)
    at = late_step(STEPS, SETTINGS.thin_at)
    assert (seen[at], seen[-1]) == ({False}, {True})


def test_what_may_be_cut_is_that_of_the_task(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr("ksm_edge.training.trainer.most_cut", lambda *of: asked.append(of) or 5)
    usual = replace(SETTINGS, thin=None)
    subject = trainer(bundle, usual)
    assert asked == [(bundle, sum(layer.score.size for layer in subject.layers.values()), CLASSES, subject.settings)]
    assert subject.settings == replace(usual, amplify=True)


@pytest.mark.parametrize("thin_at", [0.05, 0.5])
def test_a_share_of_none_leaves_none_to_be_cut_later(bundle: Bundle, thin_at: float) -> None:
    subject = trainer(bundle, replace(SETTINGS, thin=0.5, thin_at=thin_at))
    at = late_step(STEPS, thin_at)
    train(subject, 0, at)
    left = count(subject)
    train(subject, at, STEPS)
    assert count(subject) <= left


@pytest.mark.parametrize("method", ["norm", "head"])
def test_without_masks_every_epoch_may_be_the_one_to_end_with(bundle: Bundle, method: str) -> None:
    subject = trainer(bundle, replace(SETTINGS, method=method, thin=0.7))
    train(subject, 0, 1)
    assert subject.is_thinned


def test_masks_within_the_limit_are_those_without_one(
    bundle: Bundle, limited: Callable[..., tuple[Trainer, int]]
) -> None:
    subject, whole = limited(1.5)[0], trainer(bundle, replace(SETTINGS, thin=0.0, amplify=True))
    for other in (subject, whole):
        train(other, 0, STEPS)
    assert same_bits(subject, whole)


@pytest.mark.parametrize("learn_in_bits", [False, True])
def test_a_training_resumed_behind_the_thinning_goes_on_alike(bundle: Bundle, learn_in_bits: bool) -> None:
    done, changed = late_step(STEPS, SETTINGS.thin_at) + 2, replace(SETTINGS, learn_in_bits=learn_in_bits)
    straight, again = trainer(bundle, changed), trainer(bundle, changed)
    train(straight, 0, done)
    again.restore({name: array.copy() for name, array in straight.state().items()}, done)
    for subject in (straight, again):
        train(subject, done, STEPS)
    assert same_bits(straight, again)
    assert [cut.tolist() for cut in cut_of(again)] == [cut.tolist() for cut in cut_of(straight)]
