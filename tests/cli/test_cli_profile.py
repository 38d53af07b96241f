"""`ksm-edge profile`, from arguments to what is printed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import saved_tiny_bundle, tiny_pack

from ksm_edge.cli.main import main
from ksm_edge.pack.files import save_pack


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    saved = saved_tiny_bundle(folder / "bundle")
    save_pack(tiny_pack(changes={"backbone": saved.digest}), folder / "a.ksm")
    return folder / "bundle"


def profile(bundle: Path, *more: object) -> int:
    return main([str(word) for word in ("profile", "--bundle", bundle, "--threads", 1, "--batch", 4, *more)])


def test_a_quick_look_tells_time_and_memory(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "here.json"
    assert profile(bundle, bundle.parent / "a.ksm", "--quick", "--out", out) == 0
    stdout, stderr = capsys.readouterr()
    for part in (
        "inference, ms",
        "plain backbone",
        "a.ksm",
        "peak RSS",
        "PSS",
        "Adaptation",
        "forward",
        "update",
        "Operators",
    ):
        assert part in stdout, part
    assert "measuring inference: a.ksm" in stderr
    assert main(["profile", "--compare", str(out), str(out), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert rows["a.ksm: latency_ms"]["ratio"] == pytest.approx(1)
    assert main(["profile", "--compare", str(out), str(out)]) == 0
    stdout = capsys.readouterr().out
    assert "95% interval" in stdout
    assert stdout.startswith("first   host; ")


def test_an_emulated_board_is_said_to_be_one(bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "emulated.json"
    assert profile(bundle, "--quick", "--device", "raspberry-pi-zero-2w", "--out", out, "--steps", 0) == 0
    stdout = capfd.readouterr().out
    assert "EMULATED on this machine" in stdout
    assert "not enforced: clock, memory bandwidth, storage speed" in stdout
    result = json.loads(out.read_text())
    assert main(["profile", "--compare", str(out), str(out)]) == 0
    assert "raspberry-pi-zero-2w (EMULATED" in capfd.readouterr().out
    assert result["emulated"]
    assert "watchdog" in result["enforced"]["memory"]


def test_predictions_are_one_table_that_says_what_it_is(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    boards = ("raspberry-pi-5", "jetson-nano")
    assert profile(bundle, "--predict", *boards, "--images", 20) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("PREDICTED, not measured: tiny, 16 px; learning 20 images x 240 epochs")
    assert "ONNX Runtime's own CPU kernels" in lines[1]
    assert [line.split()[0] for line in lines[3:5]] == list(boards)
    assert any("jetson-nano: stock wheels do not run" in line for line in lines)
    assert profile(bundle, "--predict", *boards, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["predicted"]
    assert [one["device"] for one in report["devices"]] == list(boards)
    assert all(one["fits"] and one["step_ms"] > 0 for one in report["devices"])


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--predict", "toaster"), 2, "'toaster' is not known"),
        (("--predict", "jetson", "--device", "jetson"), 2, "measure nothing"),
        (("--compare", "a.json", "b.json", "--out", "c.json"), 2, "measure nothing"),
        (("--compare", "absent.json", "b.json"), 2, "absent.json cannot be read"),
        (("--out", "/nowhere/at/all.json"), 2, "cannot be written"),
        (("--plot", "/dev/null/plots"), 2, "cannot be written"),
        (("--memory-budget", "1MiB"), 5, "the budget is 1 MiB"),
        (("--memory-budget", "0"), 5, "the budget is 0 bytes"),
        (("--images", "20"), 2, "are of --predict"),
    ],
)
def test_what_cannot_be_is_said_at_once(
    bundle: Path, words: tuple[str, ...], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert profile(bundle, *words) == code
    stdout, stderr = capsys.readouterr()
    assert message in stderr
    assert "measuring" not in stdout + stderr


@pytest.mark.parametrize(
    "words", [("--steps", "-1"), ("--kernels", "tflite"), ("--runs", "0"), ("--threads", "100000")]
)
def test_options_out_of_range_are_refused_by_the_parser(bundle: Path, words: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as caught:
        profile(bundle, *words)
    assert caught.value.code == 2


def test_predictions_keep_to_the_budget_that_is_given(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert profile(bundle, "--predict", "raspberry-pi-5", "--memory-budget", "50MiB") == 0
    assert "over / 50" in capsys.readouterr().out
    assert profile(bundle, "--predict", "raspberry-pi-5", "--kernels", "ncnn") == 0
    assert "not known" in capsys.readouterr().out


def test_ctrl_c_is_interrupted_and_no_failure(bundle: Path) -> None:
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"  # the shell may have it ignored
        "from ksm_edge.cli.main import entry; entry()"
    )
    words = ["profile", "--bundle", str(bundle), "--runs", "1000000", "--processes", "1", "--threads", "1"]
    child = subprocess.Popen([sys.executable, "-c", code, *words], stderr=subprocess.PIPE, text=True)
    try:
        assert child.stderr is not None
        assert "measuring" in child.stderr.readline()
        time.sleep(2)
        child.send_signal(signal.SIGINT)
        assert child.wait(60) == 130
        assert "Traceback" not in child.stderr.read()
    finally:
        child.kill()
        child.communicate()
