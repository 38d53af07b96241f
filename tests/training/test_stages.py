"""Which epochs are learned in images of what size, and that another size goes on with what was learned."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_bundle

from ksm_edge.bundle.layers import Bundle
from ksm_edge.runtimes.compile import compile_graph
from ksm_edge.runtimes.engine import Engine
from ksm_edge.runtimes.workers import Workers
from ksm_edge.training.settings import Settings
from ksm_edge.training.stages import stages
from ksm_edge.training.trainer import Trainer, gradient_spec, of_size

CLASSES = 3


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return tiny_bundle(tmp_path / "bundle")


@pytest.mark.parametrize(
    ("whole", "scale", "expected"),
    [(36, 1.0, 36), (36, 0.9, 32), (30, 0.99, 30), (224, 0.7, 160), (160, 0.7, 112), (16, 0.01, 8), (4, 0.5, 4)],
)
def test_smaller_images_are_of_a_multiple_of_eight_pixels(
    bundle: Bundle, whole: int, scale: float, expected: int
) -> None:
    odd = replace(bundle, input=replace(bundle.input, size=whole, resize=2 * whole))
    found = stages(odd, Settings(train_scale=scale))[0].input
    assert (found.size, found.resize) == (expected, 2 * expected)
    assert gradient_spec(odd, CLASSES, Settings(train_scale=scale), 1).size == expected


@pytest.mark.parametrize(
    ("epochs", "whole_at", "expected"),
    [
        (8, 0.75, {range(6): 8, range(6, 8): 16}),
        (8, 0.9, {range(7): 8, range(7, 8): 16}),
        (8, 1.0, {range(8): 8}),
        (8, 0.0, {range(8): 16}),
        (1, 0.75, {range(1): 8}),
        (2, 0.75, {range(1): 8, range(1, 2): 16}),
        (3, 0.75, {range(2): 8, range(2, 3): 16}),
        (6, 0.75, {range(5): 8, range(5, 6): 16}),
        (10, 0.75, {range(8): 8, range(8, 10): 16}),
        (8, 0.99, {range(7): 8, range(7, 8): 16}),
    ],
)
def test_the_last_epochs_are_in_whole_images(
    bundle: Bundle, epochs: int, whole_at: float, expected: dict[range, int]
) -> None:
    found = stages(bundle, Settings(epochs=epochs, train_scale=0.5, whole_at=whole_at))
    assert {stage.epochs: stage.input.size for stage in found} == expected


def test_images_that_are_whole_anyway_are_one_stage(bundle: Bundle) -> None:
    for scale in (1.0, 0.9):  # which the nearest multiple of 8 is no different from
        assert [stage.epochs for stage in stages(bundle, Settings(train_scale=scale))] == [range(8)]


def test_without_kept_views_every_epoch_has_its_own(bundle: Bundle) -> None:
    found = stages(bundle, Settings(train_scale=0.5))
    assert [stage.view(epoch) for stage in found for epoch in stage.epochs] == list(range(8))


def test_kept_views_take_turns_and_none_is_kept_that_nobody_looks_at(bundle: Bundle) -> None:
    found = stages(bundle, Settings(train_scale=0.5, views=4, layers="project.."))
    assert [stage.views for stage in found] == [4, 2]
    assert [[stage.view(epoch) for epoch in stage.epochs] for stage in found] == [[0, 1, 2, 3, 0, 1], [6, 7]]
    turns = [stage.turn(epoch) for stage in found for epoch in stage.epochs]
    assert turns == pytest.approx([0, 1 / 3, 2 / 3, 1, 0, 1 / 3, 0, 1])
    (only,) = stages(bundle, Settings(views=1, layers="project.."))
    assert {only.turn(epoch) for epoch in only.epochs} == {0}


@pytest.mark.parametrize(("statistics", "workers"), [("frozen", 1), ("frozen", 2), ("batch", 1)])
def test_training_goes_on_in_another_size_with_the_same_parameters(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, statistics: str, workers: int
) -> None:
    """What a step does next is what it does in a training that had those parameters in that size from the start."""
    settings = Settings(batch=4, train_scale=0.5, statistics=statistics, score_rate=2e-3, norm_rate=1e-2)
    small, engine = gradient_spec(bundle, CLASSES, settings, 4 // workers), Engine(threads=workers, workers=workers)
    graphs = []
    for size in (8, 16):
        folder = bundle.path / str(size)
        folder.mkdir()
        graphs.append(compile_graph(bundle, of_size(small, size), folder))
    began = Trainer(bundle, graphs[0], settings, steps=10, engine=engine)
    for step in range(3):
        began.step(*batch(step, 8))
    other = Trainer(bundle, graphs[1], settings, steps=10, engine=engine)
    other.restore({name: array.copy() for name, array in began.state().items()}, began.count)
    former, opens = weakref.ref(began._workers), Engine.open

    def alone(self: Engine, *given: Any) -> Workers:
        assert former() is None  # whose memory the next ones are planned to have
        return opens(self, *given)

    monkeypatch.setattr(Engine, "open", alone)
    began.go_on_with(graphs[1])
    assert len(began._workers._sessions) == workers
    found = [trainer.step(*batch(3, 16)) for trainer in (began, other)]
    assert found[0] == found[1]
    assert all(np.array_equal(array, other.state()[name]) for name, array in began.state().items())


def batch(step: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([step, size])
    images = rng.standard_normal((4, 3, size, size)).astype(np.float32)
    return images, np.eye(CLASSES, dtype=np.float32)[rng.integers(0, CLASSES, 4)] / 4
