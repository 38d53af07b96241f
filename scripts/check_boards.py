"""Refuse measurements of boards that cannot be believed: benchmarks/boards/*.json, or the files that are named.

    python scripts/check_boards.py

Exit status 1 where a file was emulated, measured under a warning, with few repetitions, or is no profile result.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BOARDS = ROOT / "benchmarks" / "boards"
LEAST_RUNS, LEAST_PROCESSES, LEAST_STEPS = 500, 5, 10
sys.path.insert(0, str(ROOT))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="(default: all in benchmarks/boards)")
    refused = 0
    for path in parser.parse_args().files or sorted(BOARDS.glob("*.json")):
        for fault in faults_of(path):
            print(f"{path}: {fault}")
            refused += 1
    return 1 if refused else 0


def faults_of(path: Path) -> list[str]:
    """Why this file is no measurement of a board; empty where it is one."""
    from ksm_edge.errors import KsmEdgeError
    from ksm_edge.profiler.files import load_profile

    try:
        result = load_profile(path)
    except KsmEdgeError as error:
        return [str(error)]
    return [*_where(result, path.stem), *_how(result), *_told(result)]


def _where(result: dict[str, Any], name: str) -> list[str]:
    from ksm_edge.device import HOST, Device, device_names

    device, model = result.get("device"), result["machine"]["model"]
    if result["emulated"]:
        return [f"emulated: {device} was not the machine that measured"]
    if model is None:
        return ["the machine that measured names no board: it has no device tree"]
    if device == HOST or device not in device_names():
        return [f"no profile in devices/ knows {model!r}: add one, then measure again"]
    board = Device.load(device)
    fits = board.is_called(model)
    found = [] if fits else [f"says it is {device}, but the machine calls itself {model!r}"]
    return found if name.startswith(device) else [*found, f"name the file after its board: {device}....json"]


def _how(result: dict[str, Any]) -> list[str]:
    found = [f"measured under a warning: {warning}" for warning in result["warnings"]]
    for name, raw in result["inference"].items():
        runs, processes = sum(map(len, raw["latency_ms"])), len(raw["latency_ms"])
        if runs < LEAST_RUNS or processes < LEAST_PROCESSES:
            found.append(
                f"{name}: {runs} runs in {processes} processes are too few: "
                f"at least {LEAST_RUNS} in {LEAST_PROCESSES}, which profile does without --quick"
            )
    if sum(map(len, result.get("adaptation", {}).get("update_ms", ()))) < LEAST_STEPS:
        found.append(f"fewer than {LEAST_STEPS} optimizer steps: adaptation is part of it")
    return found


def _told(result: dict[str, Any]) -> list[str]:
    """What the raw values say must be what the file says of them."""
    from ksm_edge.profiler.profile import summary, warnings_of

    found = [] if summary(result) == result["summary"] else ["its summary is not that of its raw values"]
    hidden = set(warnings_of(result)) - set(result["warnings"])
    return [*found, *(f"measured under a warning, which was taken out: {warning}" for warning in sorted(hidden))]


if __name__ == "__main__":
    sys.exit(main())
