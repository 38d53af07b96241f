"""`inspect`, `eval` and `predict`, from arguments to what is printed."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from tiny import saved_tiny_bundle, tiny_pack

from ksm_edge.app.app import App
from ksm_edge.cli import eval as eval_verb
from ksm_edge.cli import inspect, predict
from ksm_edge.errors import DamagedFileError, DataError, WrongBackboneError
from ksm_edge.pack.files import load_pack, save_pack


def call(verb: ModuleType, *arguments: object) -> int:
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    return verb.run(parser.parse_args([str(argument) for argument in arguments]))


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    saved_tiny_bundle(tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def pack(bundle: Path, tmp_path: Path) -> Path:
    digest = json.loads((bundle / "manifest.json").read_text())["backbone_digest"]
    save_pack(tiny_pack(cut=0.3, changes={"backbone": digest}), tmp_path / "a.ksm")
    return tmp_path / "a.ksm"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two of each class in train/, and in test/ 3 of class 0, 2 of class 1 and one that is damaged."""
    rng = np.random.default_rng(0)
    for part, counts in (("train", (2, 2, 2)), ("test", (3, 2, 0))):
        for label, count in enumerate(counts):
            folder = tmp_path / "photos" / part / f"class {label}"
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 255, (24, 20, 3), np.uint8)).save(folder / f"{i}.png")
    (tmp_path / "photos/test/class 1/broken.png").write_bytes(b"no image")
    return tmp_path / "photos"


def test_inspect_tells_what_a_pack_holds(pack: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(inspect, pack, "-v") == 0
    out = capsys.readouterr().out
    for part in ("task 'tiny kernel'", "class 0, class 1", "tiny, digest", "granularity kernel", "steps: 7", "8x3x3x3"):
        assert part in out


def test_inspect_json_adds_up(pack: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(inspect, pack, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["classes"] == ["class 0", "class 1", "class 2"]
    assert report["pack_bytes"] == pack.stat().st_size == sum(report["part_bytes"].values())
    assert report["kernels"] == 8 * 3 + 8 + 8 * 8 + 6 * 4 + 10 * 6
    kept = sum(state.mask.keep.sum() if state.mask else 24 for state in load_pack(pack).layers.values())
    assert report["kept_share"] == pytest.approx(kept / report["kernels"])
    assert report["record"] == {"steps": 7, "validation_accuracy": 0.5}


def test_inspect_tells_bits_per_kernel(pack: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(inspect, pack, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    keep_bytes, scale_bytes = (report["part_bytes"][part] for part in ("keep_bits", "scales"))
    assert keep_bytes > 0
    assert scale_bytes > 0
    assert report["keep_bits_per_kernel"] == 8 * keep_bytes / report["kernels"]
    assert report["bits_per_kernel"] == 8 * (keep_bytes + scale_bytes) / report["kernels"]
    assert call(inspect, pack) == 0
    expected = f"{report['bits_per_kernel']:.3f} bits per kernel, {report['keep_bits_per_kernel']:.3f} of them for keep"
    assert expected in capsys.readouterr().out


def test_inspect_needs_no_runtime(pack: Path) -> None:
    code = (
        "import argparse, sys\nfrom ksm_edge.cli import inspect\n"
        f"args = argparse.Namespace(packs=[{str(pack)!r}], verbose=True, json=False)\n"
        "inspect.run(args)\nassert not {'onnx', 'onnxruntime'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_inspect_of_several_packs_gives_one_object(pack: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(inspect, pack, pack, "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["packs"]) == 2


def test_inspect_refuses_a_damaged_pack(pack: Path) -> None:
    pack.write_bytes(pack.read_bytes()[:-1])
    with pytest.raises(DamagedFileError, match=r"a\.ksm"):
        call(inspect, pack)


def test_eval_measures_the_test_split_and_names_what_it_skips(
    bundle: Path, pack: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(eval_verb, pack, photos, "--bundle", bundle, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    with App(bundle, 1) as app:
        app.load(pack)
        right = {
            name: [app.predict(path)[0].label == name for path in sorted((photos / "test" / name).glob("[0-9].png"))]
            for name in ("class 0", "class 1")
        }
    assert report["n"] == 5
    assert report["split"] == "test"
    assert report["per_class"] == {name: sum(answers) / len(answers) for name, answers in right.items()}
    assert report["accuracy"] == pytest.approx(sum(map(sum, right.values())) / 5)
    assert [skip["image"] for skip in report["skipped"]] == ["test/class 1/broken.png"]


def test_eval_without_a_test_split_takes_all_images_and_says_so(
    bundle: Path, pack: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(eval_verb, pack, photos / "train", "--bundle", bundle) == 0
    out = capsys.readouterr().out
    assert "all its images, as it has no test/" in out
    assert "of 6 images" in out
    assert call(eval_verb, pack, photos / "train", "--bundle", bundle, "--json") == 0
    assert json.loads(capsys.readouterr().out)["split"] == "all"


def test_eval_refuses_classes_that_the_pack_does_not_know(bundle: Path, pack: Path, photos: Path) -> None:
    (photos / "train/class 2").rename(photos / "train/cats")
    with pytest.raises(DataError, match="does not know: cats; the pack's are class 0, class 1, class 2"):
        call(eval_verb, pack, photos / "train", "--bundle", bundle)


def test_eval_of_nothing_readable_is_an_error(bundle: Path, pack: Path, photos: Path) -> None:
    for image in photos.rglob("*.png"):
        image.write_bytes(b"")
    with pytest.raises(DataError, match="none of 6 images can be read"):
        call(eval_verb, pack, photos, "--bundle", bundle)


def test_predict_lists_images_and_folders_in_order(
    bundle: Path, pack: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    single = photos / "train/class 2/1.png"
    assert call(predict, pack, single, photos / "test", "--bundle", bundle, "--top", 2, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    listed = report["predictions"]
    assert report["task"] == "tiny kernel"
    assert [Path(entry["image"]) for entry in listed] == [single, *sorted((photos / "test").rglob("*.png"))]
    assert ["error" in entry for entry in listed] == [False] * 6 + [True]
    assert all(len(entry["top"]) == 2 for entry in listed[:-1])
    assert listed[0]["top"][0]["probability"] >= listed[0]["top"][1]["probability"]


def test_predict_prints_a_line_an_image(
    bundle: Path, pack: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(predict, pack, photos / "test/class 1", "--bundle", bundle) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert "0.png: class " in lines[0]
    assert lines[2].startswith("not read: ")
    assert "broken.png" in lines[2]


def test_predict_fails_only_if_no_image_could_be_read(bundle: Path, pack: Path, photos: Path) -> None:
    assert call(predict, pack, photos / "test/class 1/broken.png", "--bundle", bundle) == 1


@pytest.mark.parametrize("verb", [eval_verb, predict])
def test_a_pack_of_another_backbone_is_refused(verb: ModuleType, bundle: Path, photos: Path, tmp_path: Path) -> None:
    save_pack(tiny_pack(), tmp_path / "other.ksm")
    with pytest.raises(WrongBackboneError):
        call(verb, tmp_path / "other.ksm", photos, "--bundle", bundle)
