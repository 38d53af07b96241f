"""Profile results as files, and two of them side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ksm_edge.atomic import atomic_write
from ksm_edge.errors import DamagedFileError, UnsupportedVersionError, UsageError
from ksm_edge.profiler.child import STEP_PARTS
from ksm_edge.profiler.profile import FORMAT_VERSION, KIND

RESAMPLES = 2000
CONFIDENCE = 0.95
SAME_WORK = ("backbone", "size", "threads", "batch")


def save_profile(result: Mapping[str, Any], path: Path) -> None:
    """As JSON, whole or not at all."""
    with atomic_write(path) as file:
        file.write(json.dumps(result, indent=1).encode() + b"\n")


def load_profile(path: Path) -> dict[str, Any]:
    """Raises UsageError, DamagedFileError or UnsupportedVersionError where that is no result of this release."""
    try:
        result = json.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DamagedFileError(f"{path} is no JSON: {error}") from error
    if not isinstance(result, dict) or result.get("kind") != KIND:
        raise DamagedFileError(f"{path} is no profile result: write one with ksm-edge profile --out")
    if result["version"] != FORMAT_VERSION:
        raise UnsupportedVersionError(f"{path} has version {result['version']}, this release reads {FORMAT_VERSION}")
    return result


def compare_profiles(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Of each figure that both have: both medians, second / first, and the 95 % confidence interval of that ratio.

    Raises UsageError where the two did different work.
    """
    for name in SAME_WORK:
        if first["work"][name] != second["work"][name]:
            raise UsageError(
                f"these results are of different work: {name} {first['work'][name]} and {second['work'][name]}; "
                "measure both with the same bundle and options"
            )
    rows = {}
    for name in first["inference"].keys() & second["inference"].keys():
        if first["work"]["packs"].get(name) != second["work"]["packs"].get(name):
            raise UsageError(f"these results are of different work: {name} is not the same pack in both")
        a, b = first["inference"][name], second["inference"][name]
        rows[f"{name}: latency_ms"] = _ratio(_processes(a["latency_ms"]), _processes(b["latency_ms"]))
        for part in a["cold"]:
            rows[f"{name}: {part}"] = _ratio(_single(a["cold"][part]), _single(b["cold"][part]))
        rows[f"{name}: peak_rss_bytes"] = _ratio(_single(a["peak_rss_bytes"]), _single(b["peak_rss_bytes"]))
    if "adaptation" in first and "adaptation" in second:
        for part in STEP_PARTS:
            a, b = first["adaptation"][part], second["adaptation"][part]
            rows[f"adaptation: {part}"] = _ratio(_single(a), _single(b))
    return {
        "rows": dict(sorted(rows.items())),
        "confidence": CONFIDENCE,
        "emulated": [first["emulated"], second["emulated"]],
        "machines": [first["machine"]["cpu"], second["machine"]["cpu"]],
        "warnings": [*first["warnings"], *second["warnings"]],
    }


Groups = Sequence[np.ndarray]  # values of one process each, which are alike


def _processes(values: Sequence[Sequence[float]]) -> Groups:
    return [np.array(each) for each in values]


def _single(values: Sequence[float]) -> Groups:
    return [np.array([value]) for value in values]


def _ratio(first: Groups, second: Groups) -> dict[str, Any]:
    """By the bootstrap, over processes first: what one process measures is alike, and differs from the next one's."""
    medians = [float(np.median(np.concatenate(groups))) for groups in (first, second)]
    found: dict[str, Any] = {"first": medians[0], "second": medians[1], "ratio": _divided(medians[1], medians[0])}
    if min(len(first), len(second)) > 1 and medians[0]:
        rng = np.random.default_rng(0)
        drawn = [_resampled(second, rng) / _resampled(first, rng) for _ in range(RESAMPLES)]
        tail = 50 * (1 - CONFIDENCE)
        found["interval"] = [float(np.percentile(drawn, q)) for q in (tail, 100 - tail)]
    return found


def _resampled(groups: Groups, rng: np.random.Generator) -> float:
    chosen = rng.integers(0, len(groups), len(groups))
    return float(np.median(np.concatenate([rng.choice(groups[i], len(groups[i])) for i in chosen])))


def _divided(a: float, b: float) -> float | None:
    return a / b if b else None
