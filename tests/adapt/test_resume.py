"""A training that was interrupted goes on bit for bit as if it had not been."""

from __future__ import annotations

import errno
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from journeys import Stopper, Watcher, interrupted_then_resumed, settings
from tiny import LAYERS

from ksm_edge.adapt.interrupt import interrupt_held_back
from ksm_edge.adapt.journey import Interrupted, adapt, checkpoint_path
from ksm_edge.adapt.observer import Observer
from ksm_edge.autodiff.spec import STANDARD
from ksm_edge.bundle.layers import Bundle
from ksm_edge.data.image_set import ImageSet
from ksm_edge.errors import KsmEdgeError, UsageError
from ksm_edge.training.layer import TrainedLayer
from ksm_edge.training.planner import Plan, make_plan

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
    "changes",
    [
        {"statistics": "batch"},
        {"method": "head"},
        {"granularity": "element"},
        {"moment_bits": 8},
        {"activation_bits": 16},
        {"product_bits": 16},
        {"views": 1, "layers": "dw.."},
    ],
    ids=str,
)
def test_that_holds_for_every_kind_of_state(
    bundle: Bundle, images: ImageSet, tmp_path: Path, changes: dict[str, object]
) -> None:
    chosen = settings(epochs=2, **changes)
    whole = adapt(bundle, images, tmp_path / "whole.ksm", chosen)
    resumed = interrupted_then_resumed(bundle, images, tmp_path / "stopped.ksm", chosen, Stopper(step=6))
    assert resumed.pack_path.read_bytes() == whole.pack_path.read_bytes()


@pytest.mark.parametrize("views", [{}, {"views": 1, "layers": "dw.."}], ids=str)
@pytest.mark.parametrize("stop", [Stopper(step=3), Stopper(step=5), Stopper(epoch=1), Stopper(step=7)], ids=vars)
def test_that_holds_for_images_of_two_sizes(
    bundle: Bundle, images: ImageSet, tmp_path: Path, stop: Observer, views: dict[str, Any]
) -> None:
    chosen = settings(epochs=2, train_scale=0.5, whole_at=0.5, **views)
    whole = adapt(bundle, images, tmp_path / "whole.ksm", chosen, threads=2)
    with pytest.raises(Interrupted):
        adapt(bundle, images, tmp_path / "stopped.ksm", chosen, threads=2, observer=stop)
    resumed = adapt(bundle, images, tmp_path / "stopped.ksm", chosen, threads=2, resume=True)
    assert resumed.pack_path.read_bytes() == whole.pack_path.read_bytes()


def test_that_holds_where_crops_have_become_narrower(bundle: Bundle, images: ImageSet, tmp_path: Path) -> None:
    chosen = settings(epochs=6, layers="project..")
    whole = adapt(bundle, images, tmp_path / "whole.ksm", chosen)
    assert whole.history[-2]["train_accuracy"] > 0.85  # so that the last epoch, in which it stops, has narrower ones
    resumed = interrupted_then_resumed(bundle, images, tmp_path / "stopped.ksm", chosen, Stopper(step=whole.steps - 2))
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


@pytest.mark.torch
@pytest.mark.parametrize("statistics", ["frozen", "batch"])
def test_that_holds_for_torch(bundle: Bundle, images: ImageSet, tmp_path: Path, statistics: str) -> None:
    pytest.importorskip("torch")
    chosen = settings(statistics=statistics)
    whole = adapt(bundle, images, tmp_path / "whole.ksm", chosen, runtime="pytorch")
    with pytest.raises(Interrupted):
        adapt(bundle, images, tmp_path / "stopped.ksm", chosen, runtime="pytorch", observer=Stopper(step=7))
    with pytest.raises(UsageError, match="begun with --runtime pytorch: go on with that"):
        adapt(bundle, images, tmp_path / "stopped.ksm", chosen, resume=True)
    resumed = adapt(bundle, images, tmp_path / "stopped.ksm", chosen, resume=True, runtime="pytorch")
    assert resumed.pack_path.read_bytes() == whole.pack_path.read_bytes()


LEAST = {"micro_batch": 1, "runtime": "onnxruntime", "workers": 1, "fast": False, "inside": True, "moment_bits": 8,
         "own": False, "widened": True, "tile_bytes": 0, "products": STANDARD}  # fmt: skip


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
    falling = iter([0.9, 0.6, 0.3])  # by more than the error of as few images as there are
    monkeypatch.setattr("ksm_edge.adapt.job.Job._accuracy", lambda job, pack: next(falling))
    found = adapt(bundle, images, tmp_path / "a.ksm", settings(epochs=3, thin=0.5))
    assert (found.best_epoch, found.validation_accuracy) == (2, 0.6)  # thinned in the second epoch


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


def test_a_checkpoint_is_not_lost_by_who_forgets_to_resume(bundle: Bundle, images: ImageSet, tmp_path: Path) -> None:
    out = tmp_path / "a.ksm"
    with pytest.raises(Interrupted):
        adapt(bundle, images, out, settings(), observer=Stopper(step=3))
    first = checkpoint_path(out).read_bytes()
    with pytest.raises(UsageError, match=r"a\.ksm\.checkpoint of an interrupted .* --resume, or begin anew by --fresh"):
        adapt(bundle, images, out, settings())
    assert checkpoint_path(out).read_bytes() == first
    with pytest.raises(Interrupted):
        adapt(bundle, images, out, settings(), fresh=True, observer=Stopper(step=1))
    assert checkpoint_path(out).read_bytes() != first
    adapt(bundle, images, out, settings(), fresh=True)
    assert not checkpoint_path(out).exists()


def test_a_checkpoint_that_cannot_be_written_when_interrupted_is_said(
    bundle: Bundle, images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("ksm_edge.adapt.job.save_checkpoint", full)
    with pytest.raises(
        KsmEdgeError, match=r"interrupted, and .*a\.ksm\.checkpoint could not be written: No space left"
    ):
        adapt(bundle, images, tmp_path / "a.ksm", settings(), observer=Stopper(step=2))


def test_resuming_what_was_never_interrupted_is_said(bundle: Bundle, images: ImageSet, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no checkpoint"):
        adapt(bundle, images, tmp_path / "a.ksm", settings(), resume=True)


def test_resuming_with_other_settings_is_refused_and_the_checkpoint_kept(
    bundle: Bundle, images: ImageSet, tmp_path: Path
) -> None:
    out = tmp_path / "a.ksm"
    with pytest.raises(Interrupted):
        adapt(bundle, images, out, settings(), observer=Stopper(step=2))
    with pytest.raises(UsageError, match=r"its head_rate is 0\.\d+, now 0\.001\. Resume"):
        adapt(bundle, images, out, settings(head_rate=1e-3), resume=True)
    assert checkpoint_path(out).exists()
