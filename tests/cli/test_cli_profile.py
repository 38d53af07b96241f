"""`ksm-edge profile`, from arguments to what is printed."""

from __future__ import annotations

import json
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
    assert rows["a.ksm: latency_ms"]["ratio"] == 1
    assert main(["profile", "--compare", str(out), str(out)]) == 0
    assert "95% interval" in capsys.readouterr().out


def test_an_emulated_board_is_said_to_be_one(bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "emulated.json"
    assert profile(bundle, "--quick", "--device", "raspberry-pi-zero-2w", "--out", out, "--steps", 0) == 0
    stdout = capfd.readouterr().out
    assert "EMULATED on this machine" in stdout
    assert "not enforced: clock, memory bandwidth, storage speed" in stdout
    result = json.loads(out.read_text())
    assert result["emulated"]
    assert "watchdog" in result["enforced"]["memory"]


def test_predictions_are_one_table_that_says_what_it_is(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    boards = ("raspberry-pi-5", "jetson-nano")
    assert profile(bundle, "--predict", *boards, "--images", 20) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("PREDICTED, not measured: tiny, 16 px; learning 20 images x 8 epochs")
    assert "ONNX Runtime's own CPU kernels" in lines[1]
    assert [line.split()[0] for line in lines[3:5]] == list(boards)
    assert any("jetson-nano: stock wheels do not run" in line for line in lines)
    assert profile(bundle, "--predict", *boards, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["predicted"]
    assert [one["device"] for one in report["devices"]] == list(boards)
    assert all(one["fits"] and one["step_ms"] > 0 for one in report["devices"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--predict", "toaster"), "'toaster' is not known"),
        (("--predict", "jetson", "--kernels", "x"), "no numbers of"),
    ],
)
def test_what_is_not_known_is_a_usage_error(
    bundle: Path, words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert profile(bundle, *words) == 2
    assert message in capsys.readouterr().err
