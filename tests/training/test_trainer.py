from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from learner import CLASSES, SETTINGS, STEPS, batch, each_method, same_bits, train, trainer, with_changes
from tiny import LAYERS

from ksm_edge.bundle.layers import Bundle
from ksm_edge.errors import UsageError
from ksm_edge.fuse import fuse
from ksm_edge.mask import INITIAL_SCORE
from ksm_edge.runtimes.compile import compile_graph
from ksm_edge.runtimes.onnxruntime import Session
from ksm_edge.training.checkpoint import Progress, load_checkpoint, save_checkpoint
from ksm_edge.training.packing import to_pack
from ksm_edge.training.targets import target_rows
from ksm_edge.training.trainer import Trainer, gradient_spec


@each_method
def test_the_loss_falls(bundle: Bundle, changes: dict[str, object]) -> None:
    losses = train(trainer(bundle, *with_changes(changes)), 0, STEPS)
    assert np.mean(losses[:3]) > 0.8
    assert np.mean(losses[-5:]) < 0.75 * np.mean(losses[:3])


@each_method
def test_going_on_from_a_checkpoint_is_bit_for_bit_never_having_stopped(
    bundle: Bundle, tmp_path: Path, changes: dict[str, object]
) -> None:
    settings, micro_batch = with_changes(changes)
    whole = trainer(bundle, settings, micro_batch)
    train(whole, 0, 6)
    save_checkpoint(tmp_path / "x", whole.state(), Progress(0, 6, 6), None, {})
    losses = train(whole, 6, 12)
    again = trainer(bundle, settings, micro_batch)
    train(again, 20, 22)  # what it held before does not matter
    again.restore(load_checkpoint(tmp_path / "x", {})[0], 6)
    assert train(again, 6, 12) == losses
    assert same_bits(again, whole)


def test_two_runs_are_bit_for_bit_equal(bundle: Bundle) -> None:
    one, other = trainer(bundle), trainer(bundle)
    assert train(one, 0, 4) == train(other, 0, 4)
    assert same_bits(one, other)


def test_nobody_has_an_opinion_before_the_first_step(bundle: Bundle, tmp_path: Path) -> None:
    graph = compile_graph(bundle, gradient_spec(bundle, CLASSES, SETTINGS, 4), tmp_path)
    subject = Trainer(bundle, graph, SETTINGS, steps=STEPS)
    images, labels = batch(0)
    first = subject.step(images, target_rows(labels, CLASSES, 0.0))
    assert first.loss == pytest.approx(np.log(CLASSES), rel=1e-6)
    assert np.abs(subject.head_weight).min() > 0
    heads = [
        Trainer(bundle, graph, replace(SETTINGS, head_start="random", seed=s), steps=9).head_weight for s in (0, 1)
    ]
    assert not np.array_equal(*heads)
    assert subject.step(images, target_rows(labels, CLASSES, 0.0)).loss < first.loss


def test_the_first_step_sees_the_plain_backbone(bundle: Bundle) -> None:
    subject = trainer(bundle)
    weight, bias = subject.head_weight.copy(), subject.head_bias.copy()
    images, labels = batch(0)
    result = subject.step(images, target_rows(labels, CLASSES, 0.0))
    logits = Session(bundle.graph_path, fuse(bundle, None)).run(images) @ weight.T + bias
    shifted = logits - logits.max(1, keepdims=True)
    expected = -(shifted - np.log(np.exp(shifted).sum(1, keepdims=True)))[np.arange(8), labels].mean()
    assert result.loss == pytest.approx(expected, rel=1e-5)
    assert result.correct == (logits.argmax(1) == labels).sum()


def test_what_does_not_learn_stays_as_it_is(bundle: Bundle) -> None:
    head, norm = trainer(bundle, replace(SETTINGS, method="head")), trainer(bundle, replace(SETTINGS, method="norm"))
    for subject in (head, norm):
        train(subject, 0, 2)
    assert not head.layers
    assert all((layer.score == np.float32(INITIAL_SCORE)).all() for layer in norm.layers.values())
    assert {name.partition(":")[2] for name in norm.state()} >= {"gamma", "beta"}
    assert not any(":score" in name for name in norm.state())


def test_layers_that_are_not_chosen_stay_as_they_are(bundle: Bundle) -> None:
    settings = replace(SETTINGS, layers="project..", masked="plain", thin=0.0)
    subject = trainer(bundle, settings)
    train(subject, 0, STEPS)
    assert list(subject.layers) == ["project", "grouped", "plain"]
    assert [name for name, layer in subject.layers.items() if "score" in layer.learning] == ["plain"]
    pack = to_pack(subject, "t", ("a", "b", "c"))
    assert {name for name, state in pack.layers.items() if state.mask is not None} == {"plain"}
    plain, fused = fuse(bundle, None), fuse(bundle, pack)
    for name in ("stem", "dw"):
        np.testing.assert_array_equal(fused[f"{name}.weight"], plain[f"{name}.weight"])
    assert not np.array_equal(fused["grouped.weight"], plain["grouped.weight"])


def test_masks_for_layers_that_may_not_change_are_refused(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match=r"'stem' selects none of those that may change, 'project\.\.'"):
        trainer(bundle, replace(SETTINGS, layers="project..", masked="stem"))


def test_a_frozen_prefix_changes_no_gradient_behind_it(bundle: Bundle) -> None:
    whole, part = (trainer(bundle, replace(SETTINGS, layers=layers)) for layers in ("*", "project.."))
    for subject in (whole, part):
        train(subject, 0, 1)
    for name, layer in part.layers.items():
        np.testing.assert_allclose(layer.product, whole.layers[name].product, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(layer.dbias, whole.layers[name].dbias, rtol=1e-5, atol=1e-6)


def test_batch_statistics_are_kept_as_running_ones(bundle: Bundle) -> None:
    subject = trainer(bundle, replace(SETTINGS, statistics="batch"), micro_batch=8)
    for step in range(60):
        subject.step(*_one_distribution(step))
    # Running statistics come to those of the data: fusing with them is normalising with the batch's own.
    layer = subject.layers["stem"]
    z_mean = subject._workers.first.output("stem.batch_mean")
    spread = np.sqrt(layer.var)
    assert (abs(layer.mean - z_mean) < 0.3 * spread).all()
    assert not np.array_equal(layer.mean, layer.pristine.mean)


def _one_distribution(step: int) -> tuple[np.ndarray, np.ndarray]:
    images, labels = batch(step)
    return images, target_rows(labels, CLASSES, 0.0)


def test_the_backbone_is_not_written_to(bundle: Bundle) -> None:
    before = {layer.name: bundle.weights[layer.name].weight.copy() for layer in LAYERS}
    train(trainer(bundle), 0, 3)
    assert all(np.array_equal(bundle.weights[name].weight, array) for name, array in before.items())


def test_huge_pages_are_asked_for_once_memory_has_settled_and_again_when_it_was_given_back(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr("ksm_edge.runtimes.workers.use_huge_pages", lambda: asked.append(1))
    subject = trainer(bundle)
    images, labels = batch(0)
    counts = []
    for release in (False, False, True, False, False):
        subject.step(images, target_rows(labels, CLASSES, 0.0), release=release)
        counts.append(len(asked))
    assert counts == [0, 1, 1, 2, 2]
