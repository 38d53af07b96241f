"""Features in front of the layers that learn, kept for a few views of each image."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from journeys import SETTINGS, Stopper, Watcher, interrupted_then_resumed, settings
from tiny import LAYERS

from ksm_edge.adapt import journey
from ksm_edge.adapt.journey import Interrupted, adapt
from ksm_edge.adapt.observer import Observer
from ksm_edge.adapt.views import Views
from ksm_edge.bundle.layers import Bundle
from ksm_edge.data.batches import Batch
from ksm_edge.data.image_set import ImageSet
from ksm_edge.errors import DataError, UsageError
from ksm_edge.fuse import fuse_layer
from ksm_edge.pack.files import save_pack
from ksm_edge.runtimes.compile import CompiledGraph, compiled
from ksm_edge.runtimes.engine import Engine
from ksm_edge.training import planner
from ksm_edge.training.checkpoint import Progress
from ksm_edge.training.footprint import PROCESS_BYTES
from ksm_edge.training.planner import make_plan
from ksm_edge.training.settings import Settings
from ksm_edge.training.trainer import ONE_THREAD, Trainer, front_spec, gradient_spec

IMAGES, CLASSES = 5, 3
LATE = {"layers": "project..", "views": 1}


def front(bundle: Bundle, micro_batch: int = 2) -> CompiledGraph:
    return compiled(bundle, front_spec(gradient_spec(bundle, CLASSES, Settings(**LATE), micro_batch)))


def some_images(bundle: Bundle, seed: int = 0) -> np.ndarray:
    side = bundle.input.size
    return np.random.default_rng(seed).standard_normal((IMAGES, 3, side, side)).astype(np.float32)


def batches(images: np.ndarray) -> list[Batch]:
    labels = np.zeros(len(images), np.int64)
    parts = [np.arange(first, min(first + 2, len(images))) for first in range(0, len(images), 2)]
    return [Batch(images[part], labels[part], part) for part in parts]


def first_layer(bundle: Bundle, images: np.ndarray) -> np.ndarray:
    """What the stem makes of images, in float64."""
    layer = LAYERS[0]
    weight, bias = (array.astype(np.float64) for array in fuse_layer(layer, bundle.weights[layer.name], None))
    padded = np.pad(images.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))[:, :, ::2, ::2]
    return np.maximum(np.einsum("nihwkl,oikl->nohw", windows, weight) + bias[:, None, None], 0)


def test_another_front_begins_anew_in_the_same_room(bundle: Bundle, tmp_path: Path) -> None:
    spec = replace(gradient_spec(bundle, CLASSES, Settings(**LATE), 2), size=8)
    small = compiled(bundle, front_spec(spec))
    views = Views(bundle, [(small, 2), (front(bundle), 1)], ONE_THREAD, IMAGES, tmp_path)
    images = some_images(bundle)
    for view in (0, 1):
        views.fill(view, batches(np.ascontiguousarray(images[:, :, :8, :8])))
    views.begin(front(bundle))
    assert not views.has(0)
    views.fill(7, batches(images))
    assert views.has(7)
    expected = first_layer(bundle, images)[[3, 1]]
    np.testing.assert_allclose(views.features(7, np.array([3, 1])), expected, rtol=2**-11, atol=1e-5)
    assert os.fstat(views._file).st_size == views.bytes == 2 * IMAGES * expected[0].size
    views.close()


@pytest.mark.parametrize("engine", [ONE_THREAD, Engine(threads=2, workers=2)])
def test_each_view_has_the_features_of_its_own_images(bundle: Bundle, tmp_path: Path, engine: Engine) -> None:
    """Only the stem lies in front of `project`: what it gives goes around `project` too."""
    views, seen = Views(bundle, [(front(bundle), 2)], engine, IMAGES, tmp_path), []
    assert not any(tmp_path.iterdir())  # no name, so nothing is left behind
    for view in (0, 1):
        assert not views.has(view)
        views.fill(view, batches(some_images(bundle, seed=view)), seen.append)
        assert views.has(view)
    assert seen == [2, 4, 5] * 2
    for view in (0, 1):
        found = views.features(view, np.array([4, 0, 2]))
        assert found.dtype == np.float32
        expected = first_layer(bundle, some_images(bundle, seed=view))[[4, 0, 2]]
        np.testing.assert_allclose(found, expected, rtol=2**-11, atol=1e-5)
    assert views.bytes == 2 * 2 * IMAGES * found[0].size
    views.close()


def test_values_that_half_precision_cannot_hold_end_at_its_largest(bundle: Bundle) -> None:
    views = Views(bundle, [(front(bundle), 1)], ONE_THREAD, IMAGES)
    views.fill(0, batches(1e7 * some_images(bundle)))
    found = views.features(0, np.arange(IMAGES))
    assert found.max() == np.finfo(np.float16).max
    views.close()


def test_a_disk_without_room_is_told_of_before_anything_is_learned(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DataError, match=r"3 views of 5 images, 1 MiB are needed in .*No space left.*fewer --views"):
        Views(bundle, [(front(bundle), 3)], ONE_THREAD, IMAGES)


@pytest.mark.parametrize(
    "changes", [{}, {"statistics": "batch"}, {"granularity": "element"}, {"method": "norm"}], ids=str
)
@pytest.mark.parametrize("layers", ["dw..", "grouped..", "plain"])
def test_the_rest_accumulates_what_the_whole_graph_does(
    bundle: Bundle, changes: dict[str, object], layers: str
) -> None:
    chosen = settings(layers=layers, batch=4, **changes)
    images, rng = some_images(bundle)[:4], np.random.default_rng(1)
    targets = (rng.dirichlet(np.ones(CLASSES), 4) / 4).astype(np.float32)
    found = []
    for views in (0, 1):
        spec = gradient_spec(bundle, CLASSES, replace(chosen, views=views), micro_batch=4)
        trainer = Trainer(bundle, compiled(bundle, spec), chosen, steps=10)
        trainer.run_head[:] = np.random.default_rng(2).standard_normal(trainer.run_head.shape)
        seen = images
        if views:
            (session,) = ONE_THREAD.open(bundle, compiled(bundle, front_spec(spec)), {})._sessions
            session.image[:] = images
            session.run()
            seen = session.output("features")
        loss = trainer.accumulate(seen, targets).loss
        arrays = {name: array.copy() for name, array in trainer._workers.first.accumulators.items()}
        found.append((loss, arrays))
    (loss, arrays), (expected_loss, expected) = found
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert arrays.keys() == expected.keys()
    for name, array in arrays.items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("changes", [{"layers": "project.."}, {"method": "head"}], ids=str)
def test_as_many_views_as_epochs_are_what_is_learned_from_otherwise(
    bundle: Bundle, images: ImageSet, tmp_path: Path, changes: dict[str, object]
) -> None:
    # By default crops of views narrow in another way; and a score that is amplified a step later changes a lot.
    chosen = settings(crop_scale=0.5, amplify=False, **changes)
    plain = adapt(bundle, images, tmp_path / "plain.ksm", chosen)
    for views in (3, 9):
        kept = adapt(bundle, images, tmp_path / "kept.ksm", replace(chosen, views=views))
        for record, expected in zip(kept.history, plain.history, strict=True):
            assert record["loss"] == pytest.approx(expected["loss"], rel=1e-3)  # they come in half precision
        assert kept.timing.views_ms > 0
    assert plain.timing.views_ms == 0


def test_fewer_views_take_turns(
    bundle: Bundle, images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Counting(Watcher):
        def seeing(self, done: int, total: int) -> None:
            if done == total:
                filled.append(total)

    def noted(views: Views, view: int, indices: np.ndarray) -> np.ndarray:
        read.append(view)
        return plain(views, view, indices)

    filled, read, plain = list[int](), list[int](), Views.features
    monkeypatch.setattr(Views, "features", noted)
    chosen = settings(layers="project..", views=2, epochs=5)
    adapt(bundle, images, tmp_path / "kept.ksm", chosen, observer=Counting())
    assert filled == [42, 42]  # the held-out ones as well, which join in the last epoch
    assert [view for view, _ in groupby(read)] == [0, 1, 0, 1, 0]


class StopSeeing(Observer):
    """Presses Ctrl-C when a view has been put through the front so many times in part."""

    def __init__(self, call: int) -> None:
        self.left = call

    def seeing(self, done: int, total: int) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("call", [1, 3, 7])  # the last while it sees the second view
@pytest.mark.parametrize("threads", [1, 3])
def test_a_training_interrupted_while_it_keeps_features_goes_on_to_the_very_bytes(
    bundle: Bundle, images: ImageSet, tmp_path: Path, call: int, threads: int
) -> None:
    chosen = settings(layers="project..", views=2)
    whole = adapt(bundle, images, tmp_path / "whole.ksm", chosen, threads=threads)
    out, stop = tmp_path / "stopped.ksm", StopSeeing(call)
    with pytest.raises(Interrupted):
        adapt(bundle, images, out, chosen, threads=threads, observer=stop)
    assert stop.left == 0
    assert not files_without_a_name()
    resumed = adapt(bundle, images, out, chosen, threads=threads, resume=True)
    assert resumed.pack_path.read_bytes() == whole.pack_path.read_bytes()


def test_the_front_and_the_judge_may_have_fewer_images_at_a_time(
    bundle: Bundle, images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner, "_comfortable", lambda bundle, spec: compiled(bundle, replace(spec, micro_batch=1)))
    chosen = settings(layers="project..", views=2)
    plan = make_plan(bundle, len(images.classes), chosen, threads=1, budget_bytes=None)
    front = plan.stages[0].front
    assert front is not None
    assert (plan.micro_batch, front.spec.micro_batch, plan.forward.spec.micro_batch) == (SETTINGS["batch"], 1, 1)
    whole = adapt(bundle, images, tmp_path / "whole.ksm", chosen)
    resumed = interrupted_then_resumed(bundle, images, tmp_path / "stopped.ksm", chosen, Stopper(step=6))
    assert resumed.pack_path.read_bytes() == whole.pack_path.read_bytes()


def files_without_a_name() -> list[str]:
    """That this process holds, of those that this package makes."""
    links = [os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if alive(name)]
    return [link for link in links if "ksm-edge-" in link and link.endswith("(deleted)")]


def alive(descriptor: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{descriptor}")


def test_the_room_on_disk_is_free_before_anything_else_is_written(
    bundle: Bundle, images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Looking(Watcher):
        def step(self, progress: Progress, steps: int, loss: float, accuracy: float) -> None:
            held.append(len(files_without_a_name()))

    def saved(*args: Any, **kwargs: Any) -> int:
        assert not files_without_a_name()
        return save_pack(*args, **kwargs)

    held: list[int] = []
    monkeypatch.setattr(journey, "save_pack", saved)
    chosen = settings(layers="project..", views=2)
    found = adapt(bundle, images, tmp_path / "kept.ksm", chosen, observer=Looking())
    assert found.pack_path.exists()
    assert set(held) == {1}


def test_views_without_a_front_are_refused(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match=r"here the first one learns: give --layers NAME\.\."):
        make_plan(bundle, CLASSES, settings(views=2), threads=1, budget_bytes=None)


@pytest.mark.torch
def test_torch_sees_every_image_anew(bundle: Bundle) -> None:
    pytest.importorskip("torch")
    with pytest.raises(UsageError, match="torch on the processor sees every image anew: leave out --views and --fast"):
        make_plan(bundle, CLASSES, settings(**LATE), threads=1, budget_bytes=None, runtime="pytorch")


def test_what_runs_beside_the_rest_is_in_the_plan(bundle: Bundle) -> None:
    """Validation runs the whole forward pass, whose activations are more than the rest's."""
    large = replace(bundle, input=replace(bundle.input, size=256, resize=256))
    kept, plain = (
        make_plan(large, CLASSES, settings(method="head", views=views), threads=1, budget_bytes=None)
        for views in (1, 0)
    )
    assert kept.stages[0].front is not None
    assert plain.stages[0].front is None
    assert kept.graph.activation_bytes < kept.forward.activation_bytes
    assert kept.expected_peak_bytes is not None
    assert plain.expected_peak_bytes is not None
    assert kept.micro_batch == SETTINGS["batch"]  # as many as a head learns from
    assert PROCESS_BYTES + kept.forward.activation_bytes < kept.expected_peak_bytes < 1.02 * plain.expected_peak_bytes
