"""`inspect`, `eval` and `predict`, from arguments to what is printed."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from tiny import saved_tiny_bundle, tiny_pack

from ksm_edge.app.app import App
from ksm_edge.app.images import opened as opened_as_ever
from ksm_edge.cli import eval as eval_verb
from ksm_edge.cli import inspect, predict
from ksm_edge.errors import DamagedFileError, DataError, UsageError, WrongBackboneError
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
    assert "kept share, weight shape" in out


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


def test_inspect_tells_what_is_amplified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_pack(tiny_pack(cut=0.5, amplify=True), path := tmp_path / "a.ksm")
    assert call(inspect, path, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    masks = [state.mask for state in load_pack(path).layers.values() if state.mask is not None]
    amplified = sum(int((mask.values > 1).sum()) for mask in masks)
    assert 0 < amplified < sum(mask.cut.size for mask in masks)
    assert sum(layer["amplified"] for layer in report["layers"]) == amplified
    assert call(inspect, path, "-v") == 0
    out = capsys.readouterr().out
    assert f"{report['kernels']:,} kernels, {amplified / report['kernels']:.2%} amplified" in out
    assert "kept share, amplified share, weight shape" in out
    stem = report["layers"][0]
    assert f"{stem['kept'] / stem['scores']:>8.2%}{stem['amplified'] / stem['scores']:>8.2%}  8x3x3x3" in out


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


def test_eval_tells_how_far_probabilities_are_off_and_what_is_unknown(
    bundle: Path, pack: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = {"calibration": {"temperature": 1.0, "threshold": 1.0}}
    save_pack(replace(load_pack(pack), record=record), tmp_path / "strict.ksm")
    words = [photos, "--bundle", bundle, "--foreign", photos / "test/class 0", "--json"]
    (tmp_path / "foreign/x").mkdir(parents=True)
    Image.new("RGB", (20, 20), "grey").save(tmp_path / "foreign/x/1.png")
    words[words.index(photos / "test/class 0")] = tmp_path / "foreign"
    for path, unknown in ((pack, 0.0), (tmp_path / "strict.ksm", 1.0)):
        assert call(eval_verb, path, *words) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["foreign_unknown"] == unknown
        assert report["known"] == 1 - unknown
        assert 0 <= report["calibration_error"] <= 1
    assert call(eval_verb, pack, *words[:-1]) == 0
    without = capsys.readouterr().out
    assert "the pack has no threshold below which an image is unknown" in without
    assert "0.0% of the foreign images are called unknown" in without
    assert call(eval_verb, tmp_path / "strict.ksm", *words[:-1]) == 0
    assert "100.0% of the foreign images are called unknown" in capsys.readouterr().out
    assert call(predict, tmp_path / "strict.ksm", photos / "test/class 0", "--bundle", bundle) == 0
    assert capsys.readouterr().out.count("unknown; perhaps class") == 3


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines()


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_predict_goes_on_in_a_file_where_it_was_stopped(
    bundle: Path, pack: Path, photos: Path, tmp_path: Path, suffix: str
) -> None:
    out, straight = tmp_path / f"answers.{suffix}", tmp_path / f"straight.{suffix}"
    folder = photos / "test"
    assert call(predict, pack, folder, "--bundle", bundle, "--out", straight) == 0
    assert call(predict, pack, folder / "class 0", "--bundle", bundle, "--out", out) == 0
    with open(out, "ab") as file:
        file.write(b'{"image": "half a li')  # a power cut
    assert call(predict, pack, folder, "--bundle", bundle, "--out", out) == 0
    assert out.read_bytes() == straight.read_bytes()
    heads = suffix == "csv"
    assert len(lines_of(out)) == 6 + heads
    assert sum("broken.png" in line for line in lines_of(out)) == 1
    if heads:
        assert lines_of(out)[0] == "image,label,probability,known,error,pack"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("a.txt", None, "written as .csv or .jsonl"), ("a.csv", "x,y\n", "holds no answers: its columns are x, y"),
     ("a.jsonl", "[]\n", "holds no answers")],
)  # fmt: skip
def test_predict_refuses_a_file_of_something_else(
    bundle: Path, pack: Path, photos: Path, tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    out = tmp_path / name
    if content is not None:
        out.write_text(content)
    with pytest.raises(UsageError, match=message):
        call(predict, pack, photos / "test", "--bundle", bundle, "--out", out)
    assert content is None or out.read_text() == content


def test_predict_watches_a_folder_until_it_is_interrupted(bundle: Path, pack: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "camera", tmp_path / "answers.jsonl"
    folder.mkdir()
    words = [pack, folder, "--bundle", bundle, "--out", out, "--watch", "--threads", 1]
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"  # the shell may have it ignored
        "from ksm_edge.cli.main import entry; entry()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, "predict", *map(str, words)], stderr=subprocess.PIPE, text=True
    )
    try:
        assert child.stderr is not None
        assert "watching" in child.stderr.readline()
        for index in range(2):
            pixels = np.random.default_rng(index).integers(0, 255, (20, 20, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{index}.png")
            deadline = time.monotonic() + 60
            while not (out.exists() and len(lines_of(out)) == index + 1):
                assert time.monotonic() < deadline
                assert child.poll() is None
                time.sleep(0.05)
        child.send_signal(signal.SIGINT)
        assert child.wait(60) == 0
    finally:
        child.kill()
        child.communicate()
    assert [json.loads(line)["image"] for line in lines_of(out)] == [str(folder / f"{index}.png") for index in range(2)]


def save_pixels(path: Path, seed: int = 0) -> bytes:
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 20, 3), np.uint8)).save(path)
    return path.read_bytes()


def test_watching_takes_files_as_they_come(
    bundle: Path, pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half written, taken away before their turn, and with times of a clock that was wrong."""
    (folder := tmp_path / "camera").mkdir()
    whole = save_pixels(folder / "slow.png")
    (folder / "slow.png").write_bytes(whole[:300])
    for name in ("gone.png", "lost.png"):
        save_pixels(folder / name, seed=1)
    save_pixels(folder / "future.png", seed=2)
    later = time.time() + 1e8
    os.utime(folder / "future.png", (later, later))

    def opened(path: Path, contract: object) -> Image.Image:
        (folder / "lost.png").unlink(missing_ok=True)
        return opened_as_ever(path, contract)  # type: ignore[arg-type]

    looks = iter(
        [
            (folder / "gone.png").unlink,
            lambda: None,
            lambda: (folder / "slow.png").write_bytes(whole),
            lambda: None,
            lambda: None,
        ]
    )

    def between_looks(seconds: float) -> None:
        try:
            next(looks)()
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr("ksm_edge.app.images.opened", opened)
    monkeypatch.setattr(predict, "sleep", between_looks)
    assert call(predict, pack, folder, "--bundle", bundle, "--watch", "--threads", 1) == 0
    said = [line.partition(": ") for line in capsys.readouterr().out.splitlines()]
    assert [(kind if kind == "not read" else Path(kind).name) for kind, _, _ in said] == [
        "future.png",
        "not read",
        "slow.png",
    ]
    assert "slow.png" in said[1][2]


def test_a_folder_that_cannot_be_listed_for_once_is_as_it_was(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_pixels(tmp_path / name / "1.png")
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]
    before = predict._there(folders, {})
    (tmp_path / "a").rename(tmp_path / "away")
    assert predict._there(folders, before) == before
    (tmp_path / "b/1.png").unlink()
    assert list(predict._there(folders, before)) == [tmp_path / "a/1.png"]


def test_predict_fails_where_no_image_could_be_read(
    bundle: Path, pack: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (pack, photos / "test/class 1/broken.png", "--bundle", bundle, "--out", tmp_path / "a.csv")
    for _ in range(2):
        assert call(predict, *words) == 1
        assert "1 image(s) could not be read" in capsys.readouterr().err
    assert len(lines_of(tmp_path / "a.csv")) == 2


def test_names_that_no_terminal_can_show_are_printed_all_the_same(bundle: Path, pack: Path, tmp_path: Path) -> None:
    (folder := tmp_path / "photos").mkdir()
    save_pixels(folder / "a.png")
    name = os.fsencode(folder) + b"/caf\xe9 \xd0\x9f.png"
    try:
        os.rename(folder / "a.png", name)
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    command = [sys.executable, "-m", "ksm_edge", "predict", pack, folder, "--bundle", bundle]
    for encoding in ("utf-8:strict", "ascii:strict"):
        environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(Path(__file__).parents[2])}
        done = subprocess.run([*map(str, command)], env=environment, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        assert rb"caf\udce9" in done.stdout


def test_predict_says_what_watching_needs(bundle: Path, pack: Path, photos: Path) -> None:
    with pytest.raises(DataError, match="--watch takes folders"):
        call(predict, pack, photos / "test/class 0/0.png", "--bundle", bundle, "--watch")
    with pytest.raises(UsageError, match=r"write --out FILE\.jsonl"):
        call(predict, pack, photos, "--bundle", bundle, "--watch", "--json")


@pytest.mark.parametrize("verb", [eval_verb, predict])
def test_a_pack_of_another_backbone_is_refused(verb: ModuleType, bundle: Path, photos: Path, tmp_path: Path) -> None:
    save_pack(tiny_pack(), tmp_path / "other.ksm")
    with pytest.raises(WrongBackboneError):
        call(verb, tmp_path / "other.ksm", photos, "--bundle", bundle)
