"""From a folder of images to a task pack, on the tiny backbone."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from journeys import Watcher, accuracy, settings
from shapes import CLASSES, make_shapes

from ksm_edge.adapt import job
from ksm_edge.adapt.journey import Adapted, adapt
from ksm_edge.bundle.golden import golden_images
from ksm_edge.bundle.layers import Bundle
from ksm_edge.data.image_set import ImageSet, open_image_set
from ksm_edge.data.split import stratified_split
from ksm_edge.errors import BudgetError, DataError, UsageError
from ksm_edge.fuse import fuse, fused_digest
from ksm_edge.pack.files import load_pack, require_backbone
from ksm_edge.pack.record import Pack
from ksm_edge.runtimes.onnxruntime import Session
from ksm_edge.training import choice
from ksm_edge.training.judge import Judge
from ksm_edge.training.planner import make_plan
from ksm_edge.training.trainer import Trainer

# What comes out.


@pytest.fixture(scope="module")
def journey(
    bundle: Bundle, images: ImageSet, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Adapted, Pack, Watcher]:
    watcher = Watcher()
    out = tmp_path_factory.mktemp("out") / "shapes.ksm"
    chosen = settings(epochs=6, join_at=1.0)
    found = adapt(bundle, images, out, chosen, observer=watcher, provenance={"device": "a board"})
    return found, load_pack(out), watcher


def test_a_task_is_learned(journey: tuple[Adapted, Pack, Watcher], bundle: Bundle, images: ImageSet) -> None:
    found, pack, _ = journey
    assert found.validation_accuracy is not None
    assert found.validation_accuracy >= 0.7  # chance: 0.33
    assert accuracy(bundle, pack, images, range(len(images.train))) >= 0.7


def test_the_pack_is_of_this_task_and_this_backbone(
    journey: tuple[Adapted, Pack, Watcher], bundle: Bundle, images: ImageSet
) -> None:
    found, pack, _ = journey
    require_backbone(pack, bundle)
    assert (pack.task, pack.classes, pack.input) == ("shapes", CLASSES, bundle.input)
    assert (pack.granularity, pack.soft, pack.statistics) == ("kernel", True, "frozen")
    assert found.pack_bytes == found.pack_path.stat().st_size
    assert pack.record["device"] == "a board"
    assert pack.record["data_digest"] == images.digest()
    assert pack.record["images"] == len(images.train)
    assert pack.record["validation_accuracy"] == found.validation_accuracy
    assert pack.record["steps"] == found.steps


def test_the_fused_digest_and_the_golden_outputs_are_those_of_the_pack_as_read(
    journey: tuple[Adapted, Pack, Watcher], bundle: Bundle
) -> None:
    _, pack, _ = journey
    fused = fuse(bundle, pack)
    assert pack.fused_digest == fused_digest(fused)
    assert pack.fused_digest != fused_digest(fuse(bundle, None))
    features = Session(bundle.graph_path, fused).run(golden_images(bundle.input))
    np.testing.assert_allclose(pack.golden_logits, features @ pack.head_weight.T + pack.head_bias, rtol=1e-5, atol=1e-6)


def test_the_validation_accuracy_is_that_of_the_pack_as_written(
    journey: tuple[Adapted, Pack, Watcher], bundle: Bundle, images: ImageSet
) -> None:
    found, pack, watcher = journey
    _, held_out = stratified_split([item.label for item in images.train], 0.2, 0)
    assert accuracy(bundle, pack, images, held_out) == found.validation_accuracy
    best = max(record["validation_accuracy"] for record in found.history)
    assert found.validation_accuracy == best
    assert found.history[found.best_epoch - 1]["validation_accuracy"] == best
    assert found.history == watcher.records


def test_whoever_watches_is_told_in_order(journey: tuple[Adapted, Pack, Watcher], images: ImageSet) -> None:
    found, _, watcher = journey
    train, held_out, steps = watcher.planned
    assert train + held_out == len(images.train)
    assert steps == found.steps == watcher.steps == len(found.timing.step_ms) == 6 * -(-train // 8)
    assert found.timing.images == 6 * train
    told = watcher.told[watcher.told.index("plan") :]
    assert "reading" in watcher.told
    assert "reading" not in told
    assert [i for i, what in enumerate(told) if what == "epoch"] == [e * (steps // 6 + 1) for e in range(1, 7)]


@pytest.fixture
def crops(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The least shares that crops are asked to show, in their order, each once."""
    asked: list[float] = []
    views = job.training_views

    def noted(*words: Any, **options: Any) -> Any:
        scale = options["augmentation"].crop_scale
        asked.extend([scale] if asked[-1:] != [scale] else [])
        return views(*words, **options)

    monkeypatch.setattr(job, "training_views", noted)
    return asked


def test_crops_show_at_least_the_share_that_was_asked_for(
    bundle: Bundle, images: ImageSet, tmp_path: Path, crops: list[float]
) -> None:
    adapt(bundle, images, tmp_path / "a.ksm", settings(epochs=2, crop_scale=0.7))
    assert crops == [0.7]


def test_crops_narrow_from_the_first_view_that_is_kept_to_the_last(
    bundle: Bundle, images: ImageSet, tmp_path: Path, crops: list[float]
) -> None:
    adapt(bundle, images, tmp_path / "a.ksm", settings(epochs=5, layers="project..", views=3, crop_start=0.75))
    assert crops == pytest.approx([0.75, 0.55, 0.35])


def test_crops_narrow_with_what_was_known_in_the_epoch_before(
    bundle: Bundle, images: ImageSet, tmp_path: Path, crops: list[float]
) -> None:
    found = adapt(bundle, images, tmp_path / "a.ksm", settings(epochs=6, layers="project.."))
    seen = [0.0, *(epoch["train_accuracy"] for epoch in found.history[:-1])]
    first = 0.8 * (bundle.input.size / bundle.input.resize) ** 2  # of the image, of which evaluation sees so much
    assert first > 0.4
    expected = [0.35 + (first - 0.35) * min(1.0, (1 - known) / 0.2) for known in seen]
    assert crops == pytest.approx([scale for scale, _ in groupby(expected)])
    assert len(crops) > 1


def test_of_many_epochs_only_some_are_judged_and_the_last_is(
    bundle: Bundle, images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "JUDGED", 2)
    watcher = Watcher()
    found = adapt(bundle, images, tmp_path / "a.ksm", settings(epochs=5, layers="project.."), observer=watcher)
    judged = [record["epoch"] for record in found.history if "validation_accuracy" in record]
    assert judged == [3, 5]
    assert len(found.history) == 5
    assert watcher.told.count("epoch") == 2
    assert found.best_epoch in judged


def test_no_checkpoint_is_left_behind(journey: tuple[Adapted, Pack, Watcher]) -> None:
    assert [path.name for path in journey[0].pack_path.parent.iterdir()] == ["shapes.ksm"]


VARIANTS = {
    "norm": {"method": "norm"},
    "head": {"method": "head"},
    "group": {"granularity": "group:3"},
    "channel": {"granularity": "channel"},
    "element": {"granularity": "element"},
    "binary": {"soft": False},
    "amplified": {"amplify": True},
    "batch statistics": {"statistics": "batch"},
    "element, batch statistics": {"granularity": "element", "statistics": "batch"},
    "norm, batch statistics": {"method": "norm", "statistics": "batch"},
    "head, batch statistics": {"method": "head", "statistics": "batch"},
    "balanced": {"balanced": True, "flip": True, "label_smoothing": 0.1},
    "smaller images": {"train_scale": 0.5, "whole_at": 1.0},
    "smaller images, then whole ones": {"train_scale": 0.5, "whole_at": 0.5},
    "features of smaller images": {"train_scale": 0.5, "layers": "project..", "views": 2, "whole_at": 1.0},
    "features of smaller images, then of whole ones": {"train_scale": 0.5, "layers": "project..", "views": 2},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_every_variant_ends_in_a_pack_as_good_as_it_says(
    bundle: Bundle, images: ImageSet, tmp_path: Path, changes: dict[str, object]
) -> None:
    chosen = settings(**changes)
    found = adapt(bundle, images, tmp_path / "a.ksm", chosen)
    pack = load_pack(found.pack_path)
    assert (pack.granularity, pack.soft, pack.statistics) == (chosen.granularity, chosen.soft, chosen.statistics)
    assert pack.fused_digest == fused_digest(fuse(bundle, pack))
    _, held_out = stratified_split([item.label for item in images.train], 0.2, 0)
    assert accuracy(bundle, pack, images, held_out) == found.validation_accuracy
    layers = pack.layers.values()
    if chosen.method != "ksm":
        assert all(state.mask is None for state in layers)
    if chosen.method == "head":
        assert pack.fused_digest == fused_digest(fuse(bundle, None))
    assert all(state.mean is None and state.var is None for state in layers)  # they are in gamma and beta


@pytest.mark.parametrize(
    ("scale", "whole_at", "sizes"),
    [(1.0, 0.75, [16, 16]), (0.9, 0.75, [16, 16]), (0.6, 1.0, [8, 8]), (0.01, 0.5, [8, 16]), (0.5, 0.0, [16, 16])],
)
def test_images_enter_training_in_the_size_that_was_asked_for(
    bundle: Bundle,
    images: ImageSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scale: float,
    whole_at: float,
    sizes: list[int],
) -> None:
    seen, judged = list[tuple[int, ...]](), set()
    step, accuracy_of = Trainer.step, Judge.accuracy

    def looking(self: Trainer, images: Any, *of: Any, **more: Any) -> Any:
        parts = list(images)
        seen.extend({part.shape[1:] for part in parts})
        return step(self, iter(parts), *of, **more)

    def judging(self: Judge, pack: Pack, batches: Any) -> float:
        parts = list(batches)
        judged.update(part.images.shape[1:] for part in parts)
        return accuracy_of(self, pack, parts)

    monkeypatch.setattr(Trainer, "step", looking)
    monkeypatch.setattr(Judge, "accuracy", judging)
    found = adapt(bundle, images, tmp_path / "a.ksm", settings(epochs=2, train_scale=scale, whole_at=whole_at))
    assert seen == [(3, size, size) for size in sizes for _ in range(found.steps // 2)]
    assert judged == {(3, 16, 16)}


def test_without_a_validation_split_the_last_epoch_is_kept(bundle: Bundle, images: ImageSet, tmp_path: Path) -> None:
    found = adapt(bundle, images, tmp_path / "a.ksm", settings(epochs=2, validation=0.0))
    assert (found.validation_accuracy, found.best_epoch) == (None, 2)
    assert load_pack(found.pack_path).record["validation_accuracy"] is None


def test_fewer_images_than_a_batch_make_one_smaller_batch(bundle: Bundle, tmp_path: Path) -> None:
    few = open_image_set(make_shapes(tmp_path / "few", count=2))
    assert adapt(bundle, few, tmp_path / "a.ksm", settings(epochs=1, batch=64)).steps == 1


def test_the_same_call_gives_the_same_bytes_and_another_seed_gives_others(
    bundle: Bundle, images: ImageSet, tmp_path: Path
) -> None:
    packs = [
        adapt(bundle, images, tmp_path / f"{i}.ksm", settings(epochs=1, seed=seed)).pack_path.read_bytes()
        for i, seed in enumerate((0, 0, 1))
    ]
    assert packs[0] == packs[1] != packs[2]


# Images that cannot be read, and calls that cannot be met.


def test_corrupt_images_are_left_out_and_listed(bundle: Bundle, tmp_path: Path) -> None:
    broken = open_image_set(make_shapes(tmp_path / "data", count=6, corrupt={"disc": 2, "stripes": 1}))
    found = adapt(bundle, broken, tmp_path / "a.ksm", settings(epochs=1))
    assert [source for source, _ in found.skipped] == ["disc/broken0.png", "disc/broken1.png", "stripes/broken0.png"]
    assert all(reason for _, reason in found.skipped)
    assert load_pack(found.pack_path).record["images"] == 18


def test_a_class_of_corrupt_images_only_is_named_with_the_reason(bundle: Bundle, tmp_path: Path) -> None:
    broken = open_image_set(make_shapes(tmp_path / "data", count=4, corrupt={"star": 2}))
    with pytest.raises(DataError, match=r"no image of class 'star' can be read \(star/broken0\.png: .+\)"):
        adapt(bundle, broken, tmp_path / "a.ksm", settings())
    assert not list(tmp_path.glob("a.ksm*"))


@pytest.mark.parametrize("changes", [{"name": "caf\udce9"}, {"classes": ("a", "b", "caf\udce9")}])
def test_a_name_that_no_pack_can_hold_is_told_before_anything_is_learned(
    bundle: Bundle, images: ImageSet, tmp_path: Path, changes: dict[str, Any]
) -> None:
    watcher = Watcher()
    with pytest.raises(DataError, match=r"'caf\\udce9' is not UTF-8"):
        adapt(bundle, replace(images, **changes), tmp_path / "a.ksm", settings(), observer=watcher)
    assert not watcher.steps


@pytest.mark.parametrize("out", ["absent/a.ksm", "a folder.ksm"])
def test_a_place_that_cannot_be_written_to_is_told_before_anything_is_learned(
    bundle: Bundle, images: ImageSet, tmp_path: Path, out: str
) -> None:
    (tmp_path / "a folder.ksm").mkdir()
    watcher = Watcher()
    with pytest.raises(UsageError, match=r"cannot be written.*folder"):
        adapt(bundle, images, tmp_path / out, settings(), observer=watcher)
    assert not watcher.told


def test_batch_statistics_need_a_whole_batch_at_once(bundle: Bundle, images: ImageSet, tmp_path: Path) -> None:
    """An incomplete last batch is dropped: 35 images in steps of 8 are 4 steps."""
    watcher = Watcher()
    adapt(bundle, images, tmp_path / "a.ksm", settings(epochs=1, statistics="batch"), observer=watcher)
    assert watcher.planned[2] == watcher.planned[0] // 8


def test_too_small_a_budget_is_told_before_anything_is_learned(
    bundle: Bundle, images: ImageSet, tmp_path: Path
) -> None:
    watcher = Watcher()
    with pytest.raises(BudgetError, match="--memory-budget"):
        adapt(bundle, images, tmp_path / "a.ksm", settings(), budget_bytes=2**20, observer=watcher)
    assert "plan" not in watcher.told
    assert not list(tmp_path.iterdir())


# In torch.


@pytest.mark.torch
@pytest.mark.parametrize("changes", [{}, {"statistics": "batch"}, {"granularity": "element"}], ids=str)
def test_torch_learns_the_same_task(
    bundle: Bundle, images: ImageSet, tmp_path: Path, changes: dict[str, object]
) -> None:
    pytest.importorskip("torch")
    chosen, histories = settings(epochs=6, **changes), []
    for runtime in ("onnxruntime", "pytorch"):
        found = adapt(bundle, images, tmp_path / f"{runtime}.ksm", chosen, runtime=runtime)
        _, held_out = stratified_split([item.label for item in images.train], 0.2, 0)
        as_read = accuracy(bundle, load_pack(found.pack_path), images, held_out)  # by ONNX Runtime
        assert found.validation_accuracy == pytest.approx(as_read)
        histories.append([epoch["loss"] for epoch in found.history])
    np.testing.assert_allclose(histories[1], histories[0], rtol=1e-3)


@pytest.mark.torch
def test_torch_promises_no_memory(bundle: Bundle, images: ImageSet, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    with pytest.raises(UsageError, match="the runtime pytorch keeps no memory budget: leave it out"):
        adapt(bundle, images, tmp_path / "a.ksm", settings(), runtime="pytorch", budget_bytes=2**30)
    with pytest.raises(UsageError, match="keeps activations as it likes: leave out --activation-bits"):
        adapt(bundle, images, tmp_path / "a.ksm", settings(activation_bits=16), runtime="pytorch")
    with pytest.raises(UsageError, match="multiplies as it likes: leave out --product-bits"):
        adapt(bundle, images, tmp_path / "a.ksm", settings(product_bits=16), runtime="pytorch")
    plan = make_plan(bundle, 3, settings(batch=100), threads=1, budget_bytes=None, runtime="pytorch")
    assert (plan.expected_peak_bytes, plan.micro_batch, plan.engine.workers) == (None, 32, 1)
