from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import LAYERS, tiny_bundle

from ksm_edge.bundle.layers import Bundle
from ksm_edge.data.batches import Batch
from ksm_edge.errors import UsageError
from ksm_edge.fuse import fuse, fused_digest
from ksm_edge.mask import INITIAL_SCORE
from ksm_edge.runtimes.compile import compile_graph
from ksm_edge.runtimes.engine import Engine
from ksm_edge.runtimes.gradient import GradientSession
from ksm_edge.runtimes.onnxruntime import Session
from ksm_edge.runtimes.workers import Workers
from ksm_edge.training.checkpoint import Progress, load_checkpoint, save_checkpoint
from ksm_edge.training.judge import Judge
from ksm_edge.training.packing import finished, to_pack, unquantized
from ksm_edge.training.settings import Settings, usual_epochs
from ksm_edge.training.targets import target_rows
from ksm_edge.training.thinning import late_step
from ksm_edge.training.trainer import Trainer, forward_spec, gradient_spec

CLASSES = 3
STEPS = 30
# Rates at which a few steps on the tiny backbone show, and scores fall below the threshold.
SETTINGS = Settings(
    batch=8, score_rate=2e-3, norm_rate=1e-2, scaled_rates=False, thin=0.5, head_rate=5e-2, label_smoothing=0.0
)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return tiny_bundle(tmp_path / "bundle")


def trainer(
    bundle: Bundle, settings: Settings = SETTINGS, micro_batch: int = 4, steps: int = STEPS, workers: int = 1
) -> Trainer:
    folder = bundle.path / f"{abs(hash((settings, micro_batch)))}"
    folder.mkdir(exist_ok=True)
    graph = compile_graph(bundle, gradient_spec(bundle, CLASSES, settings, micro_batch), folder)
    subject = Trainer(bundle, graph, settings, steps=steps, engine=Engine(threads=workers, workers=workers))
    # From a head at 0 nothing flows back at the first step, which would hide mistakes there.
    subject.head_weight[:] = np.random.default_rng(settings.seed).standard_normal(subject.head_weight.shape) / 4
    subject.run_head[:] = subject.head_weight
    return subject


def judge(subject: Trainer, workers: int = 1) -> Judge:
    bundle, spec = subject.bundle, gradient_spec(subject.bundle, CLASSES, subject.settings, subject.micro_batch)
    folder = bundle.path / "forward"
    folder.mkdir(exist_ok=True)
    forward = forward_spec(spec, {name: layer.form for name, layer in subject.layers.items()})
    return Judge(subject, compile_graph(bundle, forward, folder), Engine(threads=workers, workers=workers))


def batch(step: int, n: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """A task of three classes: which of the colours an image is brightest in."""
    rng = np.random.default_rng([7, step])
    labels = rng.integers(0, CLASSES, n)
    images = rng.standard_normal((n, 3, 16, 16)).astype(np.float32)
    images[np.arange(n), labels] += 1
    return images, labels


def train(subject: Trainer, start: int, end: int) -> list[float]:
    losses = []
    for step in range(start, end):
        images, labels = batch(step)
        losses.append(subject.step(images, target_rows(labels, CLASSES, 0.0)).loss)
    return losses


def same_bits(a: Trainer, b: Trainer) -> bool:
    left, right = a.state(), b.state()
    return left.keys() == right.keys() and all(np.array_equal(left[n], right[n]) for n in left)


METHODS = {
    "ksm": {},
    "norm": {"method": "norm"},
    "head": {"method": "head"},
    "batch statistics": {"statistics": "batch"},
    "element": {"granularity": "element"},
    "group": {"granularity": "group:3"},
    "channel": {"granularity": "channel"},
    "binary": {"soft": False},
    "some layers": {"layers": "dw..", "masked": "project, plain"},
    "in bits": {"learn_in_bits": True, "scale_bits": 2, "norm_bits": 5},
    "in bits with batch statistics": {"learn_in_bits": True, "statistics": "batch"},
}
each_method = pytest.mark.parametrize("changes", METHODS.values(), ids=METHODS)


def with_changes(changes: dict[str, object]) -> tuple[Settings, int]:
    settings = replace(SETTINGS, **changes)  # type: ignore[arg-type]
    return settings, 8 if settings.statistics == "batch" else 4


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


def test_workers_judge_as_one_does(bundle: Bundle) -> None:
    subject = trainer(bundle)
    train(subject, 0, 5)
    pack, (images, labels) = to_pack(subject, "colours", ("r", "g", "b")), batch(50, 13)
    parts = [Batch(images[p], labels[p], labels[p]) for p in (slice(0, 6), slice(6, 13))]
    alone, together = judge(subject), judge(subject, workers=3)
    np.testing.assert_array_equal(together.logits(pack, images), alone.logits(pack, images))
    assert together.accuracy(pack, parts) == alone.accuracy(pack, parts)


def test_a_smaller_last_batch_is_that_batch_alone(bundle: Bundle) -> None:
    padded, exact = trainer(bundle, micro_batch=4), trainer(bundle, micro_batch=1)
    images, labels = batch(0, 5)
    results = [subject.step(images, target_rows(labels, CLASSES, 0.0)) for subject in (padded, exact)]
    assert results[0].loss == pytest.approx(results[1].loss, rel=1e-5)
    assert (results[0].correct, results[0].count) == (results[1].correct, 5)


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


def test_an_adapted_network_is_what_its_pack_makes_of_the_backbone(bundle: Bundle) -> None:
    """The trainer's own session, the pack read back, and fuse: one and the same network."""
    subject = trainer(bundle)
    train(subject, 0, STEPS)
    masks = [layer.mask().keep for layer in subject.layers.values()]
    assert not all(keep.all() for keep in masks)
    pack = to_pack(subject, "colours", ("r", "g", "b"))
    pack = finished(pack, bundle, judge(subject), {})
    assert pack.fused_digest == fused_digest(fuse(bundle, pack))
    images, labels = batch(99, 64)
    logits = Session(bundle.graph_path, fuse(bundle, pack)).run(images) @ pack.head_weight.T + pack.head_bias
    # The next step's loss is that of the network as trained so far; the pack's few bits cost little of it.
    loss = np.mean([subject.step(images[i : i + 8], target_rows(labels[i : i + 8], CLASSES, 0.0)).loss for i in (0,)])
    probability = np.exp(logits - logits.max(1, keepdims=True))
    probability /= probability.sum(1, keepdims=True)
    assert -np.log(probability[np.arange(8), labels[:8]]).mean() == pytest.approx(loss, abs=0.1)


@each_method
def test_judging_a_pack_is_running_it_and_leaves_the_training_as_it_was(
    bundle: Bundle, changes: dict[str, object]
) -> None:
    settings, micro_batch = with_changes(changes)
    judged, other = trainer(bundle, settings, micro_batch), trainer(bundle, settings, micro_batch)
    for subject in (judged, other):
        train(subject, 0, 5)
    pack = to_pack(judged, "colours", ("r", "g", "b"))
    images, labels = batch(50, 13)  # no multiple of the micro-batch
    answer = judge(judged)
    logits = Session(bundle.graph_path, fuse(bundle, pack)).run(images) @ pack.head_weight.T + pack.head_bias
    np.testing.assert_allclose(answer.logits(pack, images), logits, rtol=1e-4, atol=1e-5)
    parts = [Batch(images[p], labels[p], labels[p]) for p in (slice(0, 6), slice(6, 13))]
    assert answer.accuracy(pack, parts) == (logits.argmax(1) == labels).mean()
    assert train(judged, 5, 8) == train(other, 5, 8)
    assert same_bits(judged, other)


def test_only_while_it_judges_a_judge_has_a_session(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    subject, alive = trainer(bundle), weakref.WeakSet[GradientSession]()

    class Watched(Workers):
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            alive.add(self.first)

    monkeypatch.setattr("ksm_edge.runtimes.engine.Workers", Watched)
    watching, pack = judge(subject), to_pack(subject, "colours", ("r", "g", "b"))
    images, labels = batch(1, 4)

    def batches() -> Iterator[Batch]:
        assert len(alive) == 1
        yield Batch(images, labels, labels)

    assert not alive
    watching.accuracy(pack, batches())
    gc.collect()
    assert not alive


def test_judging_that_is_interrupted_leaves_the_training_as_it_was(bundle: Bundle) -> None:
    judged, other = trainer(bundle), trainer(bundle)

    def interrupted():
        raise KeyboardInterrupt
        yield

    pack = to_pack(judged, "colours", ("r", "g", "b"))
    train(judged, 0, 3)
    train(other, 0, 3)
    with pytest.raises(KeyboardInterrupt):
        judge(judged).accuracy(pack, interrupted())
    assert train(judged, 3, 5) == train(other, 3, 5)


def test_what_does_not_learn_stays_as_it_is(bundle: Bundle) -> None:
    head, norm = trainer(bundle, replace(SETTINGS, method="head")), trainer(bundle, replace(SETTINGS, method="norm"))
    for subject in (head, norm):
        train(subject, 0, 2)
    assert not head.layers
    assert all((layer.score == np.float32(INITIAL_SCORE)).all() for layer in norm.layers.values())
    assert {name.partition(":")[2] for name in norm.state()} >= {"gamma", "beta"}
    assert not any(":score" in name for name in norm.state())


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


def test_batch_statistics_in_parts_are_refused(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="batch 8, micro-batch 4"):
        trainer(bundle, replace(SETTINGS, statistics="batch"), micro_batch=4)


def test_the_backbone_is_not_written_to(bundle: Bundle) -> None:
    before = {layer.name: bundle.weights[layer.name].weight.copy() for layer in LAYERS}
    train(trainer(bundle), 0, 3)
    assert all(np.array_equal(bundle.weights[name].weight, array) for name, array in before.items())


@pytest.mark.parametrize(
    ("name", "value"),
    [("method", "lora"), ("statistics", "running"), ("head_start", "ones"), ("granularity", "group:0"),
     ("granularity", "pixel"), ("epochs", 0),
     ("batch", 0), ("score_rate", -1.0), ("validation", 1.0), ("label_smoothing", float("nan")),
     ("mask_bits", float("inf")), ("mask_bits", -0.1), ("thin", 1.0),
     ("train_scale", 0.0), ("train_scale", 1.1), ("whole_at", -0.1), ("whole_at", 1.1),
     ("crop_scale", 0.0), ("crop_scale", 1.1)],
)  # fmt: skip
def test_settings_out_of_range_are_named(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=name.partition("_")[0]):
        Settings(**{name: value})  # type: ignore[arg-type]


def cut_of(subject: Trainer) -> list[np.ndarray]:
    return [layer.mask().cut for layer in subject.layers.values()]


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


def count(subject: Trainer) -> int:
    return sum(map(len, cut_of(subject)))


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
    assert asked == [(bundle, sum(layer.score.size for layer in subject.layers.values()), CLASSES, usual)]


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
    subject, whole = limited(1.5)[0], trainer(bundle, replace(SETTINGS, thin=0.0))
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


def test_learning_in_bits_runs_what_the_pack_will_hold(bundle: Bundle) -> None:
    changes = {"learn_in_bits": True, "scale_bits": 1, "norm_bits": 3, "head_bits": 4}
    subject, at = trainer(bundle, *with_changes(changes)), late_step(STEPS, SETTINGS.thin_at)

    def differing() -> set[str]:
        """What the gradient graph reads and a pack made now would not give."""
        pack, found = to_pack(subject, "t", ("a", "b", "c")), set()
        for name, layer in subject.layers.items():
            before = layer.weight.copy(), layer.bias.copy()
            layer.show(pack.layers[name])
            found |= {
                kind
                for kind, old, new in zip(("weight", "bias"), before, (layer.weight, layer.bias), strict=True)
                if not np.array_equal(old, new)
            }
            layer.fuse()
        return found | (set() if np.array_equal(subject.run_head, pack.head_weight) else {"head"})

    train(subject, 0, at - 1)
    assert differing() == {"weight", "bias", "head"}
    train(subject, at - 1, at)
    assert not differing()
    train(subject, at, at + 2)
    assert not differing()


def test_with_batch_statistics_a_layer_without_batch_norm_runs_as_its_pack_too(bundle: Bundle) -> None:
    settings, micro_batch = with_changes({"learn_in_bits": True, "statistics": "batch", "norm_bits": 3})
    subject = trainer(bundle, settings, micro_batch)
    train(subject, 0, late_step(STEPS, SETTINGS.thin_at) + 1)
    layer, state = subject.layers["plain"], to_pack(subject, "t", ("a", "b", "c")).layers["plain"]
    before = layer.weight.copy(), layer.bias.copy()
    layer.show(state)
    np.testing.assert_array_equal(before[0], layer.weight)
    np.testing.assert_array_equal(before[1], layer.bias)


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


@pytest.mark.parametrize("statistics", ["frozen", "batch"])
def test_a_pack_answers_as_the_numbers_it_was_rounded_from(bundle: Bundle, statistics: str) -> None:
    settings, micro_batch = with_changes({"statistics": statistics, "norm_bits": 5})
    subject = trainer(bundle, settings, micro_batch)
    train(subject, 0, STEPS)
    classes, (images, _) = ("a", "b", "c"), batch(0)
    exact, rounded = (judge(subject).logits(made(subject, "t", classes), images) for made in (unquantized, to_pack))
    assert 0 < np.abs(rounded - exact).max() < 0.15 * np.ptp(exact)


def test_batch_statistics_keep_batch_norm_at_eight_bits() -> None:
    assert Settings(statistics="batch", norm_bits=3).pack_bits["norm_bits"] == 8
    assert Settings(norm_bits=3).pack_bits["norm_bits"] == 3


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


@pytest.mark.parametrize(("images", "epochs"), [(0, 60), (1, 60), (40, 60), (100, 24), (299, 9), (300, 8), (9000, 8)])
def test_few_images_are_shown_more_often(images: int, epochs: int) -> None:
    assert usual_epochs(images) == epochs
