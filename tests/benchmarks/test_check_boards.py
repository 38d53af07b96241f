"""Measurements of boards that cannot be believed are refused, each for its own reason."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

GOOD: dict[str, Any] = {
    "kind": "ksm-edge profile",
    "version": 1,
    "device": "raspberry-pi-5",
    "emulated": False,
    "machine": {"model": "Raspberry Pi 5 Model B Rev 1.0"},
    "warnings": [],
    "inference": {"plain backbone": {"latency_ms": [[1.0] * 100] * 5}},
    "adaptation": {"update_ms": [1.0] * 10},
}


def changed(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    result = copy.deepcopy(GOOD)
    change(result)
    return result


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
        (
            lambda result: result["inference"]["plain backbone"]["latency_ms"].pop(),
            "400 runs in 4 processes are too few",
        ),
        (lambda result: result.pop("adaptation"), "fewer than 10 optimizer steps"),
        (lambda result: result.update(kind="x"), "is no profile result"),
    ],
)
def test_what_cannot_be_believed_is_refused(
    load: Any, tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    (fault,) = faults(load, tmp_path, changed(change))
    assert message in fault


def test_a_file_is_named_after_its_board(load: Any, tmp_path: Path) -> None:
    assert faults(load, tmp_path, GOOD, "mine") == ["name the file after its board: raspberry-pi-5....json"]
