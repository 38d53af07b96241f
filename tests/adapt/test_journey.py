"""From a folder of images to a task pack, on the tiny backbone."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shapes import CLASSES, make_shapes
from tiny import LAYERS, saved_tiny_bundle

from ksm_edge.adapt.interrupt import interrupt_held_back
from ksm_edge.adapt.journey import Adapted, Interrupted, adapt, checkpoint_path
from ksm_edge.adapt.observer import Observer
from ksm_edge.bundle.golden import golden_images
from ksm_edge.bundle.layers import Bundle
from ksm_edge.data.image import open_rgb, to_input
from ksm_edge.data.image_set import ImageSet, open_image_set
from ksm_edge.data.split import stratified_split
from ksm_edge.errors import BudgetError, DataError, UsageError
from ksm_edge.fuse import fuse, fused_digest
from ksm_edge.pack.files import load_pack, require_backbone
from ksm_edge.pack.record import Pack
from ksm_edge.runtimes.onnxruntime import Session
from ksm_edge.training.checkpoint import Progress
from ksm_edge.training.layer import TrainedLayer
from ksm_edge.training.planner import Plan, make_plan
from ksm_edge.training.settings import Settings

# Rates at which the tiny backbone learns, and loses kernels, within a few steps.
SETTINGS = {
    "epochs": 3,
    "batch": 8,
    "score_rate": 2e-3,
    "norm_rate": 1e-2,
    "scaled_rates": False,
    "head_rate": 5e-2,
    "validation": 0.2,
    "label_smoothing": 0.0,
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return saved_tiny_bundle(tmp_path_factory.mktemp("backbone") / "bundle")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    return open_image_set(make_shapes(tmp_path_factory.mktemp("data") / "shapes"))


def settings(**changes: object) -> Settings:
    return Settings(**{**SETTINGS, **changes})  # type: ignore[arg-type]


def accuracy(bundle: Bundle, pack: Pack, images: ImageSet, indices: Iterator[int] | np.ndarray) -> float:
    """As an app would: every image decoded from its file, alone, through the fused backbone."""
    session = Session(bundle.graph_path, fuse(bundle, pack))
    right = []
    for index in indices:
        item = images.train[index]
        image = to_input(open_rgb(images.read(item)), pack.input)
        logits = session.run(image[None]) @ pack.head_weight.T + pack.head_bias
        right.append(pack.classes[int(logits.argmax())] == images.classes[item.label])
    return float(np.mean(right))


class Watcher(Observer):
    def __init__(self) -> None:
        self.told: list[str] = []
        self.steps = 0
        self.records: list[dict[str, float]] = []
        self.planned = (0, 0, 0)

    def reading(self, done: int, total: int) -> None:
        self.told.append("reading")

    def plan(self, plan: object, train: int, held_out: int, skipped: object, steps: int, done: int) -> None:
        self.told.append("plan")
        self.planned = (train, held_out, steps)

    def step(self, progress: Progress, steps: int, loss: float, accuracy: float) -> None:
        self.told.append("step")
        self.steps += 1
        assert progress.steps_done <= steps
        assert 0 <= accuracy <= 1

    def epoch(self, record: dict[str, float], epochs: int) -> None:
        self.told.append("epoch")
        self.records.append(dict(record))


# What comes out.


@pytest.fixture(scope="module")
def journey(
    bundle: Bundle, images: ImageSet, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Adapted, Pack, Watcher]:
    watcher = Watcher()
    out = tmp_path_factory.mktemp("out") / "shapes.ksm"
    found = adapt(bundle, images, out, settings(epochs=6), observer=watcher, provenance={"device": "a board"})
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


def test_no_checkpoint_is_left_behind(journey: tuple[Adapted, Pack, Watcher]) -> None:
    assert [path.name for path in journey[0].pack_path.parent.iterdir()] == ["shapes.ksm"]


VARIANTS = {
    "norm": {"method": "norm"},
    "head": {"method": "head"},
    "group": {"granularity": "group:3"},
    "channel": {"granularity": "channel"},
    "element": {"granularity": "element"},
    "binary": {"soft": False},
    "batch statistics": {"statistics": "batch"},
    "element, batch statistics": {"granularity": "element", "statistics": "batch"},
    "norm, batch statistics": {"method": "norm", "statistics": "batch"},
    "head, batch statistics": {"method": "head", "statistics": "batch"},
    "balanced": {"balanced": True, "flip": True, "label_smoothing": 0.1},
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


# Interrupted and resumed.


class Stopper(Observer):
    """Presses Ctrl-C once, after a step or an epoch."""

    def __init__(self, step: int = 0, epoch: int = 0) -> None:
        self._step, self._epoch = step, epoch

    def step(self, progress: Progress, steps: int, loss: float, accuracy: float) -> None:
        if progress.steps_done == self._step:
            raise KeyboardInterrupt

    def epoch(self, record: dict[str, float], epochs: int) -> None:
        if record["epoch"] == self._epoch:
            raise KeyboardInterrupt


def interrupted_then_resumed(bundle: Bundle, images: ImageSet, out: Path, chosen: Settings, stop: Observer) -> Adapted:
    with pytest.raises(Interrupted) as caught:
        adapt(bundle, images, out, chosen, observer=stop)
    assert caught.value.checkpoint == checkpoint_path(out)
    assert checkpoint_path(out).exists()
    assert not out.exists()
    found = adapt(bundle, images, out, chosen, resume=True)
    assert not checkpoint_path(out).exists()
    return found


# 35 images to learn from in steps of 8: 5 steps an epoch.
STOPS = {
    "first step": Stopper(step=1),
    "middle of an epoch": Stopper(step=7),
    "last step of an epoch": Stopper(step=10),
    "behind an epoch": Stopper(epoch=2),
    "behind the last epoch": Stopper(epoch=3),
}


@pytest.mark.parametrize("stop", STOPS.values(), ids=STOPS)
def test_a_resumed_training_ends_in_the_very_bytes_of_an_uninterrupted_one(
    bundle: Bundle, images: ImageSet, tmp_path: Path, stop: Observer
) -> None:
    whole = adapt(bundle, images, tmp_path / "whole.ksm", settings())
    assert whole.steps == 15
    resumed = interrupted_then_resumed(bundle, images, tmp_path / "stopped.ksm", settings(), stop)
    assert resumed.pack_path.read_bytes() == whole.pack_path.read_bytes()
    assert resumed.history == whole.history
    assert resumed.steps == whole.steps


@pytest.mark.parametrize(
    "changes", [{"statistics": "batch"}, {"method": "head"}, {"granularity": "element"}, {"moment_bits": 8}], ids=str
)
def test_that_holds_for_every_kind_of_state(
    bundle: Bundle, images: ImageSet, tmp_path: Path, changes: dict[str, object]
) -> None:
    chosen = settings(epochs=2, **changes)
    whole = adapt(bundle, images, tmp_path / "whole.ksm", chosen)
    resumed = interrupted_then_resumed(bundle, images, tmp_path / "stopped.ksm", chosen, Stopper(step=6))
    assert resumed.pack_path.read_bytes() == whole.pack_path.read_bytes()


def test_that_holds_for_workers(bundle: Bundle, images: ImageSet, tmp_path: Path) -> None:
    whole, other = (adapt(bundle, images, tmp_path / f"{n}.ksm", settings(), threads=3) for n in (1, 2))
    assert other.pack_path.read_bytes() == whole.pack_path.read_bytes()
    with pytest.raises(Interrupted):
        adapt(bundle, images, tmp_path / "stopped.ksm", settings(), threads=3, observer=Stopper(step=7))
    resumed = adapt(bundle, images, tmp_path / "stopped.ksm", settings(), threads=1, resume=True)  # the former 3
    assert resumed.threads == 3
    assert resumed.pack_path.read_bytes() == whole.pack_path.read_bytes()
    alone = adapt(bundle, images, tmp_path / "alone.ksm", settings(), threads=1)
    assert alone.pack_path.read_bytes() != whole.pack_path.read_bytes()  # sums of another order


LEAST = {"micro_batch": 1, "workers": 1, "fast": False, "inside": True, "moment_bits": 8}


def test_a_training_of_slower_forms_stays_with_them(
    bundle: Bundle, images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begun where memory was short, gone on with where it is not."""
    short, forms = True, []

    def planned(*given: Any, **named: Any) -> Plan:
        plan = make_plan(*given, **(named | ({"before": LEAST} if short else {})))
        forms.append(plan.choices)
        return plan

    monkeypatch.setattr("ksm_edge.adapt.journey.make_plan", planned)
    whole = adapt(bundle, images, tmp_path / "whole.ksm", settings())
    with pytest.raises(Interrupted):
        adapt(bundle, images, tmp_path / "stopped.ksm", settings(), observer=Stopper(step=7))
    short = False
    resumed = adapt(bundle, images, tmp_path / "stopped.ksm", settings(), resume=True)
    assert forms == [LEAST] * 3
    assert resumed.pack_path.read_bytes() == whole.pack_path.read_bytes()


@pytest.mark.parametrize("where", ["update", "validation"])
def test_ctrl_c_in_the_middle_of_anything_leaves_a_whole_state(
    bundle: Bundle, images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """A true SIGINT while the layers are being updated one by one, or while the pack is being judged."""
    whole = adapt(bundle, images, tmp_path / "whole.ksm", settings())
    calls = {"step": 0, "show": 0}

    def pressing(name: str, at: int):
        original = getattr(TrainedLayer, name)

        def method(self: TrainedLayer, *args: object) -> object:
            calls[name] += 1
            if calls[name] == at:
                signal.raise_signal(signal.SIGINT)
            return original(self, *args)

        return method

    with monkeypatch.context() as patch:
        if where == "update":  # the third of five layers, in the fourth step
            patch.setattr(TrainedLayer, "step", pressing("step", 3 * len(LAYERS) + 3))
        else:
            patch.setattr(TrainedLayer, "show", pressing("show", 3))
        with pytest.raises(Interrupted):
            adapt(bundle, images, tmp_path / "stopped.ksm", settings())
    resumed = adapt(bundle, images, tmp_path / "stopped.ksm", settings(), resume=True)
    assert resumed.pack_path.read_bytes() == whole.pack_path.read_bytes()
    assert resumed.history == whole.history


def test_only_an_epoch_that_ended_thinned_can_be_the_best(
    bundle: Bundle, images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    falling = iter([0.9, 0.6, 0.3])
    monkeypatch.setattr("ksm_edge.adapt.job.Job._accuracy", lambda job, pack: next(falling))
    found = adapt(bundle, images, tmp_path / "a.ksm", settings(epochs=3, thin=0.5))
    assert (found.best_epoch, found.validation_accuracy) == (2, 0.6)  # thinned at two thirds of all steps


def test_ctrl_c_behind_the_last_epoch_costs_nothing(
    bundle: Bundle, images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **bits: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ksm_edge.adapt.journey.save_pack", interrupted)
        with pytest.raises(Interrupted):
            adapt(bundle, images, tmp_path / "a.ksm", settings())
    watcher = Watcher()
    found = adapt(bundle, images, tmp_path / "a.ksm", settings(), resume=True, observer=watcher)
    assert watcher.steps == 0
    assert (found.steps, len(found.history)) == (15, 3)
    assert adapt(bundle, images, tmp_path / "b.ksm", settings()).pack_path.read_bytes() == found.pack_path.read_bytes()


def test_ctrl_c_is_held_back_until_the_block_has_ended() -> None:
    done = []

    def work() -> None:
        with interrupt_held_back():
            signal.raise_signal(signal.SIGINT)
            done.append("after the signal")
        done.append("behind the block")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["after the signal"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_holding_back_ctrl_c_does_nothing_in_other_threads() -> None:
    done = []

    def work() -> None:
        with interrupt_held_back():
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]


def test_resuming_what_was_never_interrupted_is_said(bundle: Bundle, images: ImageSet, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no checkpoint"):
        adapt(bundle, images, tmp_path / "a.ksm", settings(), resume=True)


def test_resuming_with_other_settings_is_refused_and_the_checkpoint_kept(
    bundle: Bundle, images: ImageSet, tmp_path: Path
) -> None:
    out = tmp_path / "a.ksm"
    with pytest.raises(Interrupted):
        adapt(bundle, images, out, settings(), observer=Stopper(step=2))
    with pytest.raises(UsageError, match="its settings is"):
        adapt(bundle, images, out, settings(head_rate=1e-3), resume=True)
    assert checkpoint_path(out).exists()


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


@pytest.mark.parametrize("out", ["absent/a.ksm", "a folder.ksm"])
def test_a_place_that_cannot_be_written_to_is_told_before_anything_is_learned(
    bundle: Bundle, images: ImageSet, tmp_path: Path, out: str
) -> None:
    (tmp_path / "a folder.ksm").mkdir()
    watcher = Watcher()
    with pytest.raises(DataError, match="folder"):
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
