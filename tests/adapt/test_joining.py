"""Held-out images, once they have nothing more to choose, are learned from as well."""

from __future__ import annotations

import signal
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from journeys import Stopper, Watcher, accuracy, interrupted_then_resumed, settings

from ksm_edge.adapt import job
from ksm_edge.adapt.journey import Adapted, Interrupted, adapt, checkpoint_path
from ksm_edge.adapt.views import Views
from ksm_edge.bundle.layers import Bundle
from ksm_edge.data.image import open_rgb, to_input
from ksm_edge.data.image_set import ImageSet
from ksm_edge.data.split import stratified_split
from ksm_edge.fuse import fuse
from ksm_edge.pack.calibration import FEWEST, calibrate
from ksm_edge.pack.files import load_pack
from ksm_edge.pack.reader import decode
from ksm_edge.runtimes.onnxruntime import Session
from ksm_edge.training import checkpoint, choice
from ksm_edge.training.checkpoint import load_checkpoint, read_identity

EPOCHS, UNTIL = 6, 4
JOINING = {"epochs": EPOCHS, "join_at": 0.6, "validation": 0.5}  # ceil(0.6 * 6) = 4


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[int]]:
    """The indices of the images that each epoch learned from."""
    found: dict[int, list[int]] = defaultdict(list)
    views = job.training_views

    def noted(cache: Any, items: Any, contract: Any, indices: np.ndarray, **options: Any) -> Any:
        found[options["view"]].extend(indices.tolist())
        return views(cache, items, contract, indices, **options)

    monkeypatch.setattr(job, "training_views", noted)
    return found


@pytest.fixture
def split(images: ImageSet) -> tuple[np.ndarray, np.ndarray]:
    return stratified_split([item.label for item in images.train], 0.5, 0)


@pytest.fixture(scope="module")
def whole(bundle: Bundle, images: ImageSet, tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    """A training that nobody interrupted."""
    return adapt(bundle, images, tmp_path_factory.mktemp("whole") / "a.ksm", settings(**JOINING))


def test_they_join_behind_the_epoch_that_was_asked_for(
    bundle: Bundle, images: ImageSet, tmp_path: Path, seen: dict[int, list[int]], split: tuple[np.ndarray, np.ndarray]
) -> None:
    train, held_out = map(len, split)
    found = adapt(bundle, images, tmp_path / "a.ksm", settings(**JOINING))
    assert (found.judged_epoch, found.best_epoch) == (UNTIL, EPOCHS)
    assert [len(seen[epoch]) for epoch in range(EPOCHS)] == [train] * EPOCHS  # so many steps each, as before
    for epoch in range(UNTIL):
        assert sorted(seen[epoch]) == list(range(train))
    for epoch in range(UNTIL, EPOCHS):
        assert len(set(seen[epoch])) == train
        assert set(seen[epoch]) < set(range(train + held_out))
    later = set().union(*(seen[epoch] for epoch in range(UNTIL, EPOCHS)))
    assert len(later & set(range(train, train + held_out))) > held_out / 2


def test_until_then_nothing_is_other_than_without_joining(
    bundle: Bundle, images: ImageSet, tmp_path: Path, whole: Adapted
) -> None:
    apart = adapt(bundle, images, tmp_path / "apart.ksm", settings(**{**JOINING, "join_at": 1.0}))
    assert whole.history[:UNTIL] == apart.history[:UNTIL]
    assert whole.steps == apart.steps
    assert not any("validation_accuracy" in record for record in whole.history[UNTIL:])
    assert all("validation_accuracy" in record for record in apart.history)
    assert apart.judged_epoch == apart.best_epoch


def test_what_they_say_they_say_before_they_join(
    bundle: Bundle, images: ImageSet, tmp_path: Path, split: tuple[np.ndarray, np.ndarray]
) -> None:
    """The accuracy and the calibration of the pack as it was then, which a checkpoint of that moment has."""
    held_out, out = split[1], tmp_path / "a.ksm"
    assert len(held_out) >= FEWEST
    with pytest.raises(Interrupted):
        adapt(bundle, images, out, settings(**JOINING), observer=Stopper(epoch=UNTIL))
    path = checkpoint_path(out)
    _, progress, best = load_checkpoint(path, read_identity(path))
    assert best is not None
    assert (progress.best_epoch, progress.joined) == (UNTIL, False)
    then = decode(best)
    found = adapt(bundle, images, out, settings(**JOINING), resume=True)
    assert found.validation_accuracy == accuracy(bundle, then, images, held_out)
    record = load_pack(out).record
    assert record["validation_accuracy"] == found.validation_accuracy
    assert (record["judged_epoch"], record["epoch"]) == (UNTIL, EPOCHS)
    session, items = Session(bundle.graph_path, fuse(bundle, then)), [images.train[i] for i in held_out]
    inputs = [to_input(open_rgb(images.read(item)), bundle.input) for item in items]
    features = np.concatenate([session.run(image[None]) for image in inputs])
    expected = calibrate(features @ then.head_weight.T + then.head_bias, np.array([item.label for item in items]))
    assert record["calibration"] == pytest.approx(expected.as_record(), abs=1e-3)
    assert expected.temperature != 1


@pytest.mark.parametrize(
    "stop", [Stopper(epoch=UNTIL), Stopper(step=3 * UNTIL + 1), Stopper(step=3 * EPOCHS - 1)], ids=vars
)
def test_a_resumed_training_has_them_join_all_the_same(
    bundle: Bundle, images: ImageSet, tmp_path: Path, whole: Adapted, stop: Stopper
) -> None:
    assert whole.steps == 3 * EPOCHS
    resumed = interrupted_then_resumed(bundle, images, tmp_path / "stopped.ksm", settings(**JOINING), stop)
    assert resumed.pack_path.read_bytes() == whole.pack_path.read_bytes()
    assert resumed.history == whole.history


@pytest.mark.parametrize(
    "changes",
    [
        {"statistics": "batch"},
        {"balanced": True, "moment_bits": 8},
        {"train_scale": 0.5, "whole_at": 0.5, "views": 2, "layers": "dw.."},
    ],
    ids=str,
)
def test_that_holds_for_other_kinds_of_training(
    bundle: Bundle, images: ImageSet, tmp_path: Path, changes: dict[str, Any]
) -> None:
    chosen = settings(**JOINING, **changes)
    whole = adapt(bundle, images, tmp_path / "whole.ksm", chosen)
    assert whole.judged_epoch in (UNTIL, UNTIL + 1)
    assert whole.best_epoch == EPOCHS
    stop = Stopper(step=whole.steps - 1)
    resumed = interrupted_then_resumed(bundle, images, tmp_path / "stopped.ksm", chosen, stop)
    assert resumed.pack_path.read_bytes() == whole.pack_path.read_bytes()


def test_ctrl_c_while_they_are_asked_for_the_last_time_loses_nothing(
    bundle: Bundle, images: ImageSet, tmp_path: Path, whole: Adapted, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pressed(*given: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(job, "calibrate", pressed)
        with pytest.raises(Interrupted):
            adapt(bundle, images, tmp_path / "stopped.ksm", settings(**JOINING))
    resumed = adapt(bundle, images, tmp_path / "stopped.ksm", settings(**JOINING), resume=True)
    assert resumed.pack_path.read_bytes() == whole.pack_path.read_bytes()
    assert resumed.history == whole.history


def test_of_many_epochs_some_are_told_of_and_the_last_leaves_the_pack(
    bundle: Bundle, images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "JUDGED", 4)
    watcher = Watcher()
    found = adapt(bundle, images, tmp_path / "a.ksm", settings(**{**JOINING, "epochs": 8}), observer=watcher)
    assert [record["epoch"] for record in watcher.records] == [2, 4, 6, 8]
    assert [record["epoch"] for record in found.history if "validation_accuracy" in record] == [2, 4, 6]
    assert (found.judged_epoch, found.best_epoch) == (6, 8)  # the first judged one behind ceil(0.6 * 8) = 5


def test_they_stay_apart_where_they_would_choose_an_earlier_epoch(
    bundle: Bundle, images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "as_good", lambda accuracy, best, images, epochs: epochs == 1)
    found = adapt(bundle, images, tmp_path / "a.ksm", settings(**JOINING))
    assert found.best_epoch == found.judged_epoch == 1
    assert all("validation_accuracy" in record for record in found.history)


def test_they_join_as_soon_as_the_epoch_just_ended_is_the_one_to_choose(
    bundle: Bundle, images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "as_good", lambda accuracy, best, images, epochs: epochs in (1, 5))
    found = adapt(bundle, images, tmp_path / "a.ksm", settings(**JOINING))
    assert (found.judged_epoch, found.best_epoch) == (5, EPOCHS)


@pytest.mark.parametrize("changes", [{"validation": 0.0}, {"epochs": 1}, {"join_at": 1.0}], ids=str)
def test_there_may_be_none_to_join(
    bundle: Bundle, images: ImageSet, tmp_path: Path, changes: dict[str, Any], seen: dict[int, list[int]]
) -> None:
    found = adapt(bundle, images, tmp_path / "a.ksm", settings(**{**JOINING, **changes}))
    train, _ = stratified_split([item.label for item in images.train], changes.get("validation", 0.5), 0)
    assert set().union(*seen.values()) == set(range(len(train)))
    assert found.judged_epoch == (None if "validation" in changes else found.best_epoch)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The indices of the images whose features were read; those must have been written."""
    found: set[int] = set()
    features = Views.features

    def noted(self: Views, view: int, indices: np.ndarray) -> np.ndarray:
        found.update(indices.tolist())
        values = features(self, view, indices)
        assert values.reshape(len(indices), -1).any(1).all()  # what was never written reads as zeros
        return values

    monkeypatch.setattr(Views, "features", noted)
    return found


def test_views_that_are_kept_are_of_them_too(bundle: Bundle, images: ImageSet, tmp_path: Path, asked: set[int]) -> None:
    adapt(bundle, images, tmp_path / "a.ksm", settings(**JOINING, views=2, layers="project.."))
    assert len(asked) > len(images.train) * 0.75
    assert max(asked) > len(images.train) // 2


@pytest.mark.parametrize(
    ("join_at", "while_small", "behind"),
    [pytest.param(0.4, 1.0, 1.0, id="while small"), pytest.param(0.8, 0.5, 1.0, id="behind"),
     pytest.param(1.0, 0.5, 0.5, id="never")],
)  # fmt: skip
def test_a_view_is_kept_of_what_its_epochs_may_learn_from(
    bundle: Bundle,
    images: ImageSet,
    tmp_path: Path,
    seen: dict[int, list[int]],
    asked: set[int],
    join_at: float,
    while_small: float,
    behind: float,
) -> None:
    """Images are small until the fifth of six epochs is over; `seen` has what was put through the front."""
    changes = {**JOINING, "join_at": join_at, "train_scale": 0.5, "whole_at": 0.8, "views": 1, "layers": "dw.."}
    adapt(bundle, images, tmp_path / "a.ksm", settings(**changes))
    shares = [len(indices) / len(images.train) for _, indices in sorted(seen.items())]
    assert shares == [while_small, behind]
    assert asked <= {*range(round(behind * len(images.train)))}
