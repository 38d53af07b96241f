"""Measurements of boards that cannot be believed are refused, each for its own reason."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ksm_edge.profiler.profile import FORMAT_VERSION, summary

STATE = {"time": "now", "load_average": [0.1, 0.1, 0.1], "busy_cores": 0.0}
INFERENCE = {
    **{name: [100 << 20] * 5 for name in ("baseline_bytes", "peak_rss_bytes", "rss_bytes", "pss_bytes")},
    "latency_ms": [[1.0] * 100] * 5,
    "cpu_share": [1.0] * 5,
    "cold": {name: [1.0] * 5 for name in ("read_ms", "decode_ms", "fuse_ms", "session_ms", "first_run_ms")},
}
STEPS = {
    **{name: [[1.0, 2.0]] * 5 for name in ("data_ms", "forward_ms", "gradient_ms", "update_ms")},
    **{name: [1] * 5 for name in ("baseline_bytes", "peak_rss_bytes", "expected_peak_bytes", "activation_bytes")},
    "micro_batch": [1] * 5,
    "workers": [1] * 5,
}
GOOD: dict[str, Any] = {
    "kind": "ksm-edge profile",
    "version": FORMAT_VERSION,
    "device": "raspberry-pi-5",
    "emulated": False,
    "work": {"backbone": "b", "recipe": "r", "size": 224, "threads": 4, "batch": 16, "packs": {}},
    "machine": {"cpu": "c", "model": "Raspberry Pi 5 Model B Rev 1.0"},
    "before": STATE,
    "after": STATE,
    "warnings": [],
    "inference": {"plain backbone": INFERENCE},
    "adaptation": STEPS,
}
GOOD["summary"] = summary(GOOD)


def changed(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    result = copy.deepcopy(GOOD)
    change(result)
    return result


def fewer_runs(result: dict[str, Any]) -> None:
    result["inference"]["plain backbone"]["latency_ms"].pop()
    result["summary"] = summary(result)


def without_steps(result: dict[str, Any]) -> None:
    del result["adaptation"]
    result["summary"] = summary(result)


def faults(load: Any, folder: Path, result: dict[str, Any], name: str = "raspberry-pi-5") -> list[str]:
    path = folder / f"{name}.json"
    path.write_text(json.dumps(result))
    return list(load("check_boards").faults_of(path))


def test_a_measurement_of_a_board_is_taken(load: Any, tmp_path: Path) -> None:
    assert faults(load, tmp_path, GOOD) == []
    assert faults(load, tmp_path, GOOD, "raspberry-pi-5-of-somebody") == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda result: result.update(emulated=True), "emulated: raspberry-pi-5 was not the machine"),
        (lambda result: result["machine"].update(model=None), "names no board"),
        (
            lambda result: result["machine"].update(model="Raspberry Pi 4 Model B"),
            "calls itself 'Raspberry Pi 4 Model B'",
        ),
        (lambda result: result.update(device="host"), "no profile in devices/ knows"),
        (lambda result: result["warnings"].append("busy"), "measured under a warning: busy"),
        (fewer_runs, "400 runs in 4 processes are too few"),
        (without_steps, "fewer than 10 optimizer steps"),
        (lambda result: result.update(kind="x"), "is no profile result"),
        (lambda result: result.update(inference={}), "no inference of the plain backbone"),
        (
            lambda result: result["summary"]["inference"]["plain backbone"].update(p50_ms=0.001),
            "its summary is not that",
        ),
        (lambda result: result["before"].update(busy_cores=3.0), "a warning, which was taken out: 3.0 of"),
    ],
)
def test_what_cannot_be_believed_is_refused(
    load: Any, tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    (fault,) = faults(load, tmp_path, changed(change))
    assert message in fault


def test_a_file_is_named_after_its_board(load: Any, tmp_path: Path) -> None:
    assert faults(load, tmp_path, GOOD, "mine") == ["name the file after its board: raspberry-pi-5....json"]
