"""Going on from a pack: more images, more classes, and nothing that the pack had is lost."""

from __future__ import annotations

import gc
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import saved_tiny_bundle

from ksm_edge.adapt.descent import Descent
from ksm_edge.adapt.interrupt import interrupt_held_back
from ksm_edge.adapt.journey import Interrupted, adapt, checkpoint_path, prepared
from ksm_edge.adapt.observer import Observer
from ksm_edge.bundle.layers import Bundle
from ksm_edge.cli.main import main
from ksm_edge.data.image_set import open_image_set
from ksm_edge.errors import DataError, UsageError, WrongBackboneError
from ksm_edge.fuse import fuse
from ksm_edge.mask import SoftMask
from ksm_edge.pack.files import load_pack, save_pack
from ksm_edge.pack.record import Pack
from ksm_edge.training.packing import to_pack
from ksm_edge.training.settings import Settings
from ksm_edge.training.start import start_from

SETTINGS = Settings(
    epochs=4,
    batch=8,
    score_rate=2e-3,
    norm_rate=1e-2,
    scaled_rates=False,
    thin=0.5,
    thin_at=2 / 3,  # of eight steps: masks that are cut by then
    head_rate=5e-2,
    warmup=0.05,
    label_smoothing=0.0,
    validation=0.2,
    crop_scale=0.35,  # with the default's three steps come out one unit of their 16 bits higher: 1.06e-6 in a bias
    amplify=True,
    scale_bits=7,
    norm_bits=8,
    head_bits=8,
)
COLOURS = ("blue", "green", "red")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return saved_tiny_bundle(tmp_path_factory.mktemp("backbone") / "bundle")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`two`: ten images of each of two colours; `three`: of three; `other`: without the second of the two."""
    root = tmp_path_factory.mktemp("data")
    for name, colours in (("two", COLOURS[1:]), ("three", COLOURS), ("other", ("blue", "red"))):
        rng = np.random.default_rng(0)
        for colour in colours:
            (root / name / colour).mkdir(parents=True)
            for index in range(10):
                pixels = rng.integers(0, 120, (20, 20, 3), np.uint8)
                pixels[:, :, 2 - COLOURS.index(colour)] += 100
                Image.fromarray(pixels).save(root / name / colour / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def parent(bundle: Bundle, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packs") / "two.ksm"
    adapt(bundle, open_image_set(folder / "two"), out, SETTINGS)
    return out


def begun(bundle: Bundle, folder: Path, tmp_path: Path, pack: Pack, settings: Settings = SETTINGS) -> Pack:
    """What a trainer that started from the pack would write before its first step."""
    images = open_image_set(folder)
    with prepared(bundle, images, tmp_path / "checkpoint", settings) as job:
        start_from(job.trainer, pack, images.classes)
        return to_pack(job.trainer, "begun", images.classes)


def test_before_its_first_step_a_child_is_its_parent(
    bundle: Bundle, folder: Path, parent: Path, tmp_path: Path
) -> None:
    pack = load_pack(parent)
    assert any(state.mask is not None for state in pack.layers.values())
    child = begun(bundle, folder / "two", tmp_path, pack)
    before, after = fuse(bundle, pack), fuse(bundle, child)
    for name in before:
        np.testing.assert_allclose(after[name], before[name], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(child.head_weight, pack.head_weight, rtol=1e-5)


def test_a_child_amplifies_as_its_parent_does_where_nothing_else_is_said(
    bundle: Bundle, folder: Path, parent: Path, tmp_path: Path
) -> None:
    """By itself a training with a share to thin by amplifies nothing."""
    images, unsaid = open_image_set(folder / "two"), replace(SETTINGS, amplify=None)
    alone, child = tmp_path / "alone.ksm", tmp_path / "child.ksm"
    adapt(bundle, images, alone, unsaid)
    adapt(bundle, images, child, unsaid, parent=parent)
    packs = load_pack(alone), load_pack(parent), load_pack(child)
    assert [pack.amplifies for pack in packs] == [pack.record["amplify"] for pack in packs] == [False, True, True]


def test_a_child_has_no_fewer_bits_for_batch_norm_than_its_parent(
    bundle: Bundle, folder: Path, parent: Path, tmp_path: Path
) -> None:
    """A parent of batch statistics has eight, and a grandchild's parent is of frozen ones."""
    images, few = open_image_set(folder / "two"), replace(SETTINGS, norm_bits=4, epochs=1)
    batch, child = tmp_path / "batch.ksm", tmp_path / "child.ksm"
    adapt(bundle, images, batch, replace(few, statistics="batch"))
    still = replace(few, score_rate=0, norm_rate=0, head_rate=0)
    adapt(bundle, images, child, still, parent=batch)
    grandchild = adapt(bundle, images, tmp_path / "grandchild.ksm", still, parent=child).pack_path
    weights = [fuse(bundle, load_pack(path)) for path in (batch, child, grandchild)]
    for name, array in weights[0].items():
        np.testing.assert_allclose(weights[1][name], array, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(weights[2][name], array, rtol=1e-4, atol=1e-5)


def test_rows_of_the_head_follow_their_classes_and_a_new_class_has_one_of_its_own(
    bundle: Bundle, folder: Path, parent: Path, tmp_path: Path
) -> None:
    pack, child = load_pack(parent), begun(bundle, folder / "three", tmp_path, load_pack(parent))
    assert child.classes == ("blue", "green", "red")
    np.testing.assert_allclose(child.head_weight[1:], pack.head_weight, rtol=1e-5)
    np.testing.assert_allclose(child.head_bias[1:], pack.head_bias, rtol=1e-5)
    assert not child.head_weight[0].any()  # as ever: see Trainer


def test_a_child_names_its_parent_and_knows_the_new_class(
    bundle: Bundle, folder: Path, parent: Path, tmp_path: Path
) -> None:
    out = tmp_path / "three.ksm"
    assert adapt(bundle, open_image_set(folder / "three"), out, SETTINGS, parent=parent).validation_accuracy > 0.6
    pack = load_pack(out)
    assert pack.classes == COLOURS
    digest = hashlib.sha256(parent.read_bytes()).hexdigest()
    assert pack.record["parent"] == {"task": "two", "sha256": digest, "may_have_seen": True}  # its fourth epoch saw all
    assert "parent" not in load_pack(parent).record


@pytest.mark.parametrize(
    ("record", "seen"),
    [
        ({"epoch": 8, "judged_epoch": 6}, True),
        ({"epoch": 8, "judged_epoch": None}, True),  # nothing was held out
        ({"epoch": 8, "judged_epoch": 8}, False),
        ({"epoch": 8}, False),  # of before images joined
        ({"epoch": 8, "judged_epoch": 8, "parent": {"may_have_seen": True}}, True),
        ({"epoch": 8, "judged_epoch": 8, "parent": {"may_have_seen": False}}, False),
        ({"epoch": 8, "judged_epoch": 8, "parent": "somebody"}, False),
    ],
    ids=str,
)
def test_a_parent_that_has_learned_from_all_its_images_may_have_seen_what_a_child_holds_out(
    parent: Path, record: dict, seen: bool
) -> None:
    assert Descent.of(replace(load_pack(parent), record=record), b"").may_have_seen == seen


def test_a_class_without_images_is_refused(bundle: Bundle, folder: Path, parent: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"two\.ksm knows classes that there are no images of: green"):
        adapt(bundle, open_image_set(folder / "other"), tmp_path / "x.ksm", SETTINGS, parent=parent)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"granularity": "group:3"}, "soft kernel masks, asked for are soft group:3 ones: give --granularity kernel"),
        ({"soft": False, "amplify": False}, "asked for are binary kernel ones: .* kernel, and leave out --binary"),
        ({"amplify": False}, "amplifies kernels: leave out --no-amplify"),
        ({"statistics": "batch"}, "leave out --statistics batch"),
        ({"layers": "plain"}, "changes layer .* which is not to be learned"),
        ({"masked": "plain"}, "changes layer .* which is not to be learned"),
        ({"method": "head"}, "changes layer .* which is not to be learned"),
    ],
)
def test_settings_that_would_lose_something_are_refused(
    bundle: Bundle, folder: Path, parent: Path, tmp_path: Path, changes: dict, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        begun(bundle, folder / "two", tmp_path, load_pack(parent), replace(SETTINGS, **changes))


def test_a_parent_of_another_backbone_is_refused(bundle: Bundle, folder: Path, parent: Path, tmp_path: Path) -> None:
    save_pack(replace(load_pack(parent), backbone="f" * 64), tmp_path / "other.ksm")
    with pytest.raises(WrongBackboneError):
        adapt(bundle, open_image_set(folder / "two"), tmp_path / "x.ksm", SETTINGS, parent=tmp_path / "other.ksm")


def test_a_child_that_was_interrupted_goes_on_bit_for_bit_and_only_as_that_parents(
    bundle: Bundle, folder: Path, parent: Path, tmp_path: Path
) -> None:
    class Impatient(Observer):
        def epoch(self, record: dict, epochs: int) -> None:
            if record["epoch"] == 2:
                with interrupt_held_back():
                    raise KeyboardInterrupt

    images, out, straight = open_image_set(folder / "three"), tmp_path / "x.ksm", tmp_path / "straight.ksm"
    adapt(bundle, images, straight, SETTINGS, parent=parent)
    with pytest.raises(Interrupted):
        adapt(bundle, images, out, SETTINGS, parent=parent, observer=Impatient())
    with pytest.raises(UsageError, match="belongs to another training: its parent is"):
        adapt(bundle, images, out, SETTINGS, resume=True)
    assert checkpoint_path(out).exists()
    adapt(bundle, images, out, SETTINGS, resume=True, parent=parent)
    assert load_pack(out).fused_digest == load_pack(straight).fused_digest


def test_the_command_line_goes_on_from_a_pack(
    bundle: Bundle, folder: Path, parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["adapt", folder / "three", "--bundle", bundle.path, "--out", tmp_path / "x.ksm", "--epochs", 1]
    assert main([*map(str, words), "--from", str(parent), "--batch", "8", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["classes"], report["parent_may_have_seen"]) == (list(COLOURS), True)
    assert main([*map(str, words), "--from", str(parent), "--batch", "8"]) == 0
    assert "on held-out images (epoch 1; its parent may have learned from them)" in capsys.readouterr().out
    assert load_pack(tmp_path / "x.ksm").record["parent"]["task"] == "two"


def test_no_mask_stays_in_memory_while_a_child_learns(
    bundle: Bundle, folder: Path, parent: Path, tmp_path: Path
) -> None:
    """Neither the parent's nor those of its own layers."""

    def masks() -> int:
        gc.collect()
        return sum(type(each) is SoftMask for each in gc.get_objects())

    before = masks()
    images = open_image_set(folder / "two")
    with prepared(bundle, images, checkpoint_path(tmp_path / "two.ksm"), SETTINGS, parent=parent) as job:
        assert any(layer.cut for layer in job.trainer.layers.values())
        assert masks() == before
