"""`ksm-edge adapt`, from arguments to what is printed; the journey itself is tested in tests/adapt."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import saved_tiny_bundle, tiny_pack

from ksm_edge import native
from ksm_edge.adapt.journey import checkpoint_path
from ksm_edge.cli.adapt_options import settings_of
from ksm_edge.cli.main import build_parser, main
from ksm_edge.device import Device
from ksm_edge.errors import UsageError
from ksm_edge.limits import run_limited
from ksm_edge.pack.container import read_container
from ksm_edge.pack.files import load_pack, save_pack
from ksm_edge.pack.metadata import read_metadata
from ksm_edge.runtimes import trial
from ksm_edge.runtimes.trial import Trial
from ksm_edge.training.settings import FAST, SMALL, Settings

KEYS = {
    "device", "emulated", "backbone", "task", "classes", "steps", "epochs", "validation_accuracy", "pack_path",
    "pack_bytes", "peak_rss_bytes", "step_ms_p50", "images_per_second", "wall_seconds",
}  # fmt: skip


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_tiny_bundle(tmp_path_factory.mktemp("backbone") / "bundle").path


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten images of each of two colours, and one that is none."""
    folder = tmp_path_factory.mktemp("data") / "colours"
    rng = np.random.default_rng(0)
    for channel, name in enumerate(("green", "red")):
        (folder / name).mkdir(parents=True)
        for i in range(10):
            pixels = rng.integers(0, 120, (20, 20, 3), np.uint8)
            pixels[:, :, 1 - channel] += 100
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    (folder / "red" / "broken.png").write_bytes(b"none")
    return folder


def call(photos: Path, bundle: Path, out: Path, *more: object) -> list[str]:
    quick = ("--epochs", 2, "--batch", 4, "--validation", 0.2, "--threads", 1)
    return [str(x) for x in ("adapt", photos, "--bundle", bundle, "--out", out, *quick, *more)]


def test_tuning_says_what_was_measured(
    photos: Path, bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(call(photos, bundle, tmp_path / "a.ksm", "--json", "--tune")) == 0
    stdout, stderr = capfd.readouterr()
    assert re.search(r"^Forms +.*% of the usual time \(a step by the usual forms \d+ ms, ", stderr, re.MULTILINE)
    assert json.loads(stdout)["plan"].keys() >= {"micro_batch", "workers", "own", "widened", "tile_bytes"}


def test_json_is_one_object_on_stdout_with_every_key(
    photos: Path, bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.ksm"
    assert main(call(photos, bundle, out, "--json", "--device", "raspberry-pi-4")) == 0
    stdout, stderr = capfd.readouterr()  # of the process too that runs under the board's limit
    report = json.loads(stdout)
    assert report.keys() >= KEYS
    assert report["enforced"]["threads"] == 1
    assert "watchdog on resident memory" in report["enforced"]["memory"]
    assert report["not_enforced"] == ["clock", "memory bandwidth", "storage speed"]
    assert (report["device"], report["emulated"]) == ("raspberry-pi-4", True)
    assert (report["backbone"], report["task"], report["classes"]) == ("tiny", "colours", ["green", "red"])
    assert (report["steps"], report["epochs"]) == (8, 2)
    assert 0 <= report["validation_accuracy"] <= 1
    assert report["pack_path"] == str(out)
    assert report["pack_bytes"] == out.stat().st_size
    assert report["peak_rss_bytes"] > 2**20
    assert min(report[name] for name in ("step_ms_p50", "images_per_second", "wall_seconds")) > 0
    assert [skip["image"] for skip in report["skipped"]] == ["red/broken.png"]
    assert len(report["history"]) == 2
    # Progress is on stderr: what runs, on what, the plan, what was left out, every epoch.
    for part in ("EMULATED", "tiny", "16 to learn from, 4 held out", "8 steps of 4 images", "expected peak memory",
                 "red/broken.png", "Epoch 2/2", "loss", "img"):  # fmt: skip
        assert part in stderr, part


def test_text_ends_in_the_next_command(
    photos: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a pack.ksm"  # a name the shell would split
    assert main(call(photos, bundle, out)) == 0
    stdout = capsys.readouterr().out
    assert f"Task pack  {out}" in stdout
    assert re.search(r"^Accuracy .*% on held-out images \(epoch [12]\)$", stdout, re.MULTILINE)
    (following,) = [line.removeprefix("Next ").strip() for line in stdout.splitlines() if line.startswith("Next ")]
    assert shlex.split(following)[0] == "ksm-edge"
    assert main([*shlex.split(following)[1:], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n"] == 20


def test_it_is_said_until_when_images_are_held_out(
    photos: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, joining = tmp_path / "a.ksm", ("--epochs", 4, "--join-at", 0.5, "--views", 2, "--layers", "project..")
    assert main(call(photos, bundle, out, *joining)) == 0
    stdout, stderr = capsys.readouterr()
    assert "16 to learn from, 4 held out for choosing until epoch 2 or later, 2 classes" in stderr
    assert "From here on 4 held-out images are learned from as well" in stderr
    assert len(re.findall(r"Epoch ./4: [^\r\n]* on held-out images", stderr)) == 2
    assert re.search(r"^Accuracy .*% on held-out images \(epoch 2, then learned from as well\)$", stdout, re.MULTILINE)
    assert main(["inspect", str(out), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)["record"]
    assert (record["judged_epoch"], record["epoch"]) == (2, 4)


def test_what_was_chosen_goes_into_the_pack(photos: Path, bundle: Path, tmp_path: Path) -> None:
    more = ("--granularity", "group:2", "--binary", "--statistics", "batch", "--seed", 3, "--flip", "--balanced",
            "--score-rate", 0.001, "--label-smoothing", 0, "--train-scale", 0.5, "--crop-scale", 0.8)  # fmt: skip
    assert main(call(photos, bundle, tmp_path / "a.ksm", *more)) == 0
    pack = load_pack(tmp_path / "a.ksm")
    assert (pack.granularity, pack.soft, pack.statistics) == ("group:2", False, "batch")
    chosen = pack.record["settings"]
    assert (chosen["seed"], chosen["flip"], chosen["balanced"], chosen["epochs"]) == (3, True, True, 2)
    assert (chosen["score_rate"], chosen["label_smoothing"], chosen["head_rate"]) == (0.001, 0, 5e-4)
    assert (chosen["train_scale"], chosen["crop_scale"]) == (0.5, 0.8)
    assert (pack.record["device"], pack.record["emulated"]) == ("host", False)


def test_what_masks_may_take_is_said_in_one_way(
    photos: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["--thin", 0.5], ["--small"]):
        assert main(call(photos, bundle, tmp_path / "a.ksm", "--mask-bits", 0.1, *words)) == 2
        assert "--mask-bits and --thin" in capsys.readouterr().err
    assert main(call(photos, bundle, tmp_path / "a.ksm", "--mask-bits", 0, "--score-rate", 0.1)) == 0
    pack = load_pack(tmp_path / "a.ksm")
    assert all(state.mask is None for state in pack.layers.values())  # without a bit for them there are none
    assert any(state.gamma_delta.any() for state in pack.layers.values())


def test_few_images_are_shown_more_often_unless_told_otherwise() -> None:
    for words, images, epochs in (("adapt DATA", 100, 96), ("adapt DATA --epochs 3", 100, 3), ("adapt", 100, 6)):
        args = build_parser().parse_args(words.split())
        assert settings_of(args, Device.load("host"), images).epochs == epochs


def test_where_crops_begin_is_refused_where_they_do_not_narrow() -> None:
    def chosen(*words: str) -> Settings:
        args = build_parser().parse_args(["adapt", "DATA", "--crop-start", "0.7", *words])
        return settings_of(args, Device.load("host"), 100)

    for words in ([], ["--fast"], ["--views", "2"]):
        assert chosen(*words).crop_start == 0.7
    for words in (["--crop-scale", "0.5"], ["--train-scale", "0.5"]):
        with pytest.raises(UsageError, match="--crop-start says where crops begin to narrow"):
            chosen(*words)


@pytest.mark.parametrize(
    ("halves", "statistics", "said"),
    [
        ("avx1024_bf16", "frozen", ", products in half precision;"),
        ("avx1024_bf16", "batch", ", products in float32, as statistics are the batch's own;"),
        (None, "frozen", ", products in float32, as none are faster here;"),
    ],
)
def test_the_plan_says_how_matrices_are_multiplied(
    photos: Path, bundle: Path, tmp_path: Path, halves: str | None, statistics: str, said: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if native.operators is None:
        pytest.skip("installed without a C compiler")
    monkeypatch.setattr(native, "halves", lambda: halves)
    monkeypatch.setattr(trial, "trial", lambda: Trial(0.0, 0.0))
    assert main(call(photos, bundle, tmp_path / "a.ksm", "--product-bits", 16, "--statistics", statistics)) == 0
    assert said in capsys.readouterr().err
    assert load_pack(tmp_path / "a.ksm").record["settings"]["product_bits"] == 16


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (Trial(0.25, 0.25), "Operators standard ones, which take longer. This project's own, as they were compiled"),
        (Trial(0.0, 0.25), ", products in float32, as others are wrong here: gradients differ by 0.25 of the largest;"),
    ],
)
def test_operators_that_are_wrong_here_are_left_out_with_a_word(
    photos: Path, bundle: Path, tmp_path: Path, found: Trial, said: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if native.operators is None:
        pytest.skip("installed without a C compiler")
    monkeypatch.setattr(native, "halves", lambda: "avx1024_bf16")
    for name in ("trial", "known"):
        monkeypatch.setattr(trial, name, lambda: found)
    assert main(call(photos, bundle, tmp_path / "a.ksm", "--product-bits", 16)) == 0
    assert said in capsys.readouterr().err


def test_that_a_pack_is_replaced_is_said_where_it_will_be(
    photos: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, said = tmp_path / "a.ksm", "is there and will be replaced"
    out.write_bytes(b"an older pack")
    checkpoint_path(out).write_bytes(b"an interrupted training")
    assert main(call(photos, bundle, out)) == 2
    assert said not in capsys.readouterr().err
    assert main(call(photos, bundle, out, "--fresh")) == 0
    assert said in capsys.readouterr().err
    assert load_pack(out).task == "colours"
    assert main(call(photos, bundle, tmp_path / "b.ksm")) == 0
    assert said not in capsys.readouterr().err


def test_small_is_a_set_of_defaults_that_options_still_change(photos: Path, bundle: Path, tmp_path: Path) -> None:
    assert main(call(photos, bundle, tmp_path / "a.ksm", "--small", "--norm-bits", 6)) == 0
    chosen = load_pack(tmp_path / "a.ksm").record["settings"]
    assert {name: chosen[name] for name in SMALL} == SMALL | {"norm_bits": 6}
    text, _ = read_container((tmp_path / "a.ksm").read_bytes())
    assert read_metadata(text).bits == {"scale": 1, "norm": 6, "head": 3}


def test_fast_is_a_set_of_defaults_that_options_still_change(
    photos: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(call(photos, bundle, tmp_path / "a.ksm", "--fast", "--views", 1, "--json")) == 0
    chosen = load_pack(tmp_path / "a.ksm").record["settings"]
    assert {name: chosen[name] for name in FAST} == FAST | {"views": 1}
    stdout, stderr = capsys.readouterr()
    assert json.loads(stdout)["views_seconds"] > 0
    assert "Views     1 of each image" in stderr


def test_which_epochs_are_in_images_of_what_size_is_said(
    photos: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--train-scale", 0.5, "--whole-at", 0.5, "--layers", "project..", "--views", 3)
    assert main(call(photos, bundle, tmp_path / "a.ksm", *words)) == 0
    chosen = load_pack(tmp_path / "a.ksm").record["settings"]
    assert (chosen["train_scale"], chosen["whole_at"]) == (0.5, 0.5)
    stderr = capsys.readouterr().err
    assert "images of 8 pixels, from epoch 2 on of 16, " in stderr
    assert "Views     1 and 1 of each image" in stderr


def test_when_images_are_whole_is_asked_of_smaller_ones_alone(
    photos: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(call(photos, bundle, tmp_path / "a.ksm", "--whole-at", 0.5)) == 2
    assert "--whole-at says when images of --train-scale end" in capsys.readouterr().err


def test_batch_comes_from_the_device_unless_given(photos: Path, bundle: Path, tmp_path: Path) -> None:
    arguments = call(photos, bundle, tmp_path / "a.ksm", "--device", "jetson-nano", "--epochs", 1)
    at = arguments.index("--batch")
    assert main(arguments[:at] + arguments[at + 2 :]) == 0
    # No more images in a batch than there are to learn from.
    assert load_pack(tmp_path / "a.ksm").record["settings"]["batch"] == min(Device.load("jetson-nano").batch, 16)


def test_an_emulated_board_that_has_too_little_memory_stops_the_command(
    photos: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ksm_edge.cli.limited.run_limited", lambda command, budget: run_limited(command, 30 << 20))
    assert main(call(photos, bundle, tmp_path / "a.ksm", "--device", "raspberry-pi-4")) == 5
    error = capfd.readouterr().err
    assert re.search(r"stopped, as it took more than Raspberry Pi 4 .* has: 768 MiB, held by a .*watchdog", error)
    assert not (tmp_path / "a.ksm").exists()


def test_an_emulated_board_without_room_for_compiling_is_told_how_much_that_takes(
    photos: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KSM_EDGE_CACHE", str(tmp_path / "empty"))
    given = "--device", "raspberry-pi-4", "--memory-budget", "64MiB"
    assert main(call(photos, bundle, tmp_path / "a.ksm", *given)) == 5
    error = capfd.readouterr().err
    assert re.search(r"compiling the graphs of tiny.*needs about \d+ MiB, and there are 64;", error)
    assert "stopped" not in error


REFUSED = {
    "no such data": (2, ["adapt", "absent"], "absent"),
    "no such bundle": (2, ["adapt", "PHOTOS", "--bundle", "absent"], "absent"),
    "no such device": (2, ["adapt", "PHOTOS", "--bundle", "BUNDLE", "--device", "toaster"], "toaster"),
    "no such granularity": (2, ["adapt", "PHOTOS", "--bundle", "BUNDLE", "--granularity", "pixel"], "kernel, group:N"),
    "rate out of range": (2, ["adapt", "PHOTOS", "--bundle", "BUNDLE", "--head-rate", "7"], "head_rate"),
    "too few bits": (2, ["adapt", "PHOTOS", "--bundle", "BUNDLE", "--norm-bits", "1"], "norm_bits 1: must be 2 to 8"),
    "negative seed": (2, ["adapt", "PHOTOS", "--bundle", "BUNDLE", "--seed", "-1"], "seed -1"),
    "masks of a head": (
        2,
        ["adapt", "PHOTOS", "--bundle", "BUNDLE", "--method", "head", "--binary", "--amplify", "--mask-bits", "1"],
        "--method head learns no masks: leave out --binary, --amplify, --mask-bits",
    ),
    "binary masks that amplify": (
        2,
        ["adapt", "PHOTOS", "--bundle", "BUNDLE", "--binary", "--amplify"],
        "leave out one",
    ),
    "no name for the pack": (2, ["adapt", "PHOTOS", "--bundle", "BUNDLE", "--out", ""], "is a folder"),
    "views of nothing": (2, ["adapt", "PHOTOS", "--bundle", "BUNDLE", "--views", "2"], "give --layers NAME.."),
    "nothing to resume": (2, ["adapt", "PHOTOS", "--bundle", "BUNDLE", "--resume"], "leave out --resume"),
    "nowhere to write": (2, ["adapt", "PHOTOS", "--bundle", "BUNDLE", "--out", "absent/a.ksm"], "no folder absent"),
    "budget too small": (5, ["adapt", "PHOTOS", "--bundle", "BUNDLE", "--memory-budget", "1MiB"], "--memory-budget"),
    "no budget at all": (5, ["adapt", "PHOTOS", "--bundle", "BUNDLE", "--memory-budget", "0"], "--memory-budget"),
    "a unit forgotten": (5, ["adapt", "PHOTOS", "--bundle", "BUNDLE", "--memory-budget", "256"], "budget is 256 bytes"),
}


@pytest.mark.parametrize(("code", "arguments", "part"), REFUSED.values(), ids=REFUSED)
def test_a_call_that_cannot_be_met_has_its_exit_code_and_says_why(
    code: int, arguments: list[str], part: str, photos: Path, bundle: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    given = {"PHOTOS": str(photos), "BUNDLE": str(bundle)}
    found = main([given.get(word, word) for word in arguments])
    stdout, stderr = capsys.readouterr()
    if arguments[2:4] == ["--bundle", "absent"]:
        assert found in (2, 3)  # a bundle that is not there: a call that is off, or a file that cannot be used
    else:
        assert found == code
    assert stdout == ""
    assert part in stderr[stderr.index("ksm-edge adapt: ") :]
    assert not list(tmp_path.glob("*.ksm"))


def test_a_damaged_bundle_is_3(photos: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    weights = bytearray((copy / "weights.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "weights.safetensors").write_bytes(weights)
    assert main(call(photos, copy, tmp_path / "a.ksm")) == 3
    assert "weights.safetensors" in capsys.readouterr().err


def test_a_pack_of_another_backbone_is_3_and_both_digests_are_named(
    photos: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_pack(tiny_pack(changes={"backbone": "f" * 64}), tmp_path / "a.ksm")
    assert main(["eval", str(tmp_path / "a.ksm"), str(photos), "--bundle", str(bundle)]) == 3
    stderr = capsys.readouterr().err
    assert "f" * 64 in stderr
    assert json.loads((bundle / "manifest.json").read_text())["backbone_digest"] in stderr


@pytest.mark.parametrize(
    ("number", "background"),
    [(signal.SIGINT, False), (signal.SIGTERM, False), (signal.SIGHUP, False), (signal.SIGTERM, True)],
)
def test_being_told_to_stop_leaves_a_checkpoint_and_says_how_to_resume(
    photos: Path, bundle: Path, tmp_path: Path, number: signal.Signals, background: bool
) -> None:
    """A true signal to a true process, resumed by the very command it prints."""
    out = tmp_path / "a b.ksm"  # a name the shell would split
    arguments = call(photos, bundle, out, "--epochs", 4800)  # of which every hundredth is judged
    source = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
    code = "from ksm_edge.cli.main import entry; entry()"
    if background:  # as a script's jobs are
        code = f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); {code}"
    with open(tmp_path / "stderr", "wb") as stderr:
        child = subprocess.Popen(
            [sys.executable, "-c", code, *arguments], stderr=stderr, stdout=subprocess.DEVNULL, env=environment
        )
        try:
            deadline = time.monotonic() + 100
            while "Epoch 100/" not in (tmp_path / "stderr").read_text(errors="replace"):
                assert child.poll() is None, (tmp_path / "stderr").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.05)
            child.send_signal(number)
            assert child.wait(60) == 130
        finally:
            child.kill()
            child.wait()
    said = (tmp_path / "stderr").read_text()
    assert "Traceback" not in said
    assert "Interrupted. Everything is in" in said
    checkpoint = tmp_path / "a b.ksm.checkpoint"
    assert checkpoint.exists()
    assert not out.exists()
    command = shlex.split(said.splitlines()[-1])
    assert command == ["ksm-edge", *arguments, "--resume"]


def test_the_command_to_resume_is_of_the_call_and_not_of_the_process(
    photos: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`main` may be called by a program of another name."""
    from ksm_edge.cli.progress import ProgressBar

    def interrupted(self: ProgressBar, *args: object) -> None:
        raise KeyboardInterrupt

    arguments = call(photos, bundle, tmp_path / "a.ksm")
    with monkeypatch.context() as patch:
        patch.setattr(ProgressBar, "epoch", interrupted)
        assert main(arguments) == 130
    command = shlex.split(capsys.readouterr().err.splitlines()[-1])
    assert command == ["ksm-edge", *arguments, "--resume"]
    assert main(command[1:]) == 0
    assert load_pack(tmp_path / "a.ksm").record["steps"] == 8
