"""Profile results as files, and two of them side by side."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ksm_edge.atomic import atomic_write
from ksm_edge.errors import DamagedFileError, UnsupportedVersionError, UsageError
from ksm_edge.profiler.child import COLD_PARTS, STEP_PARTS
from ksm_edge.profiler.profile import FORMAT_VERSION, KIND, PLAIN

CONFIDENCE = 0.95
FEWEST = 3  # processes of which a confidence interval is worth something
# Student's t, two-sided, by degrees of freedom from 1 on; from 30 on nearly that of the normal distribution.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
       2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)  # fmt: skip
SAME_WORK = ("backbone", "size", "threads", "batch")
# What a file must have, and of which type; of each inference and of adaptation further down.
FIELDS: dict[str, Any] = {
    "work": {"backbone": str, "recipe": str, "size": int, "threads": int, "batch": int, "packs": dict},
    "machine": {"cpu": str, "model": (str, type(None))},
    "emulated": bool,
    "before": {"time": str, "load_average": list, "busy_cores": (int, float)},
    "after": {"time": str, "load_average": list, "busy_cores": (int, float)},
    "inference": dict,
    "summary": dict,
    "warnings": list,
}
SIZES = ("baseline_bytes", "peak_rss_bytes", "rss_bytes", "pss_bytes")


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
    if result.get("version") != FORMAT_VERSION:
        raise UnsupportedVersionError(
            f"{path} has version {result.get('version')}, this release reads {FORMAT_VERSION}"
        )
    for fault in _faults(result):
        raise DamagedFileError(f"{path} is damaged: {fault}")
    return result


def _faults(result: Mapping[str, Any]) -> Iterator[str]:
    yield from _missing(result, FIELDS, "")
    if not isinstance(result.get("inference"), dict) or PLAIN not in result["inference"]:
        yield f"there is no inference of the {PLAIN}"
        return
    for name, raw in result["inference"].items():
        yield from _missing(
            raw, {**dict.fromkeys((*SIZES, "latency_ms", "cpu_share"), list), "cold": dict}, f"{name}: "
        )
        cold = raw["cold"] if isinstance(raw, dict) and isinstance(raw.get("cold"), dict) else {}
        yield from _missing(cold, dict.fromkeys(COLD_PARTS, list), f"{name}: cold ")
        values = raw.get("latency_ms") if isinstance(raw, dict) else None
        if not isinstance(values, list) or not values or not all(_are_times(part) for part in values):
            yield f"{name}: latency_ms are no times"
    if "adaptation" in result:
        raw = result["adaptation"]
        yield from _missing(
            raw, dict.fromkeys((*STEP_PARTS, "peak_rss_bytes", "expected_peak_bytes"), list), "adaptation: "
        )
        for part in STEP_PARTS:
            if not isinstance(raw, dict) or not all(_are_times(values) for values in raw.get(part) or [None]):
                yield f"adaptation: {part} are no times"


def _missing(table: Any, fields: Mapping[str, Any], where: str) -> Iterator[str]:
    if not isinstance(table, dict):
        yield f"{where or 'it '}is no table"
        return
    for name, kind in fields.items():
        if isinstance(kind, dict):
            yield from _missing(table.get(name), kind, f"{where}{name}: ")
        elif not isinstance(table.get(name), kind):
            yield f"{where}{name} is missing or of another type"


def _are_times(values: Any) -> bool:
    """A list of milliseconds."""
    return (
        isinstance(values, list)
        and bool(values)
        and all(isinstance(v, (int, float)) and math.isfinite(v) and v > 0 for v in values)
    )


def compare_profiles(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Of each figure that both have: both values, second / first, and the 95 % confidence interval of that ratio.

    A value is the geometric mean over processes of each one's median. Raises UsageError where the two did different
    work.
    """
    for name in SAME_WORK:
        if first["work"][name] != second["work"][name]:
            raise UsageError(
                f"these results are of different work: {name} {first['work'][name]} and {second['work'][name]}; "
                "measure both with the same bundle and options"
            )
    rows = {}
    for name in first["inference"]:
        if name not in second["inference"]:
            continue
        if first["work"]["packs"].get(name) != second["work"]["packs"].get(name):
            raise UsageError(f"these results are of different work: {name} is not the same pack in both")
        a, b = first["inference"][name], second["inference"][name]
        rows[f"{name}: latency_ms"] = _ratio(*(list(map(statistics.median, raw["latency_ms"])) for raw in (a, b)))
        for part in COLD_PARTS:
            if name != PLAIN or part != "decode_ms":  # without a pack there is nothing to decode
                rows[f"{name}: {part}"] = _ratio(a["cold"][part], b["cold"][part])
        rows[f"{name}: peak_rss_bytes"] = _ratio(a["peak_rss_bytes"], b["peak_rss_bytes"])
    if "adaptation" in first and "adaptation" in second:
        a, b = first["adaptation"], second["adaptation"]
        for part in STEP_PARTS:
            rows[f"adaptation: {part}"] = _ratio(*(list(map(statistics.median, raw[part])) for raw in (a, b)))
        rows["adaptation: peak_rss_bytes"] = _ratio(a["peak_rss_bytes"], b["peak_rss_bytes"])
    return {"rows": rows, "confidence": CONFIDENCE, "of": [_source(result) for result in (first, second)]}


def _source(result: Mapping[str, Any]) -> dict[str, Any]:
    fields = {name: result.get(name) for name in ("device", "emulated", "warnings")}
    return {**fields, "cpu": result["machine"]["cpu"], "time": result["after"]["time"]}


def _ratio(first: Sequence[float], second: Sequence[float]) -> dict[str, Any]:
    """One value a process: what one process measures is alike, and differs from what the next one does.

    The interval is Welch's, on logarithms, with the fewer of both degrees of freedom, which is on the safe side.
    """
    logs = [[math.log(max(value, 1e-9)) for value in values] for values in (first, second)]
    means = [statistics.fmean(values) for values in logs]
    found: dict[str, Any] = {"first": math.exp(means[0]), "second": math.exp(means[1])}
    found["ratio"] = math.exp(means[1] - means[0])
    if min(len(first), len(second)) >= FEWEST:
        error = math.sqrt(sum(statistics.variance(values) / len(values) for values in logs))
        freedom = min(len(first), len(second)) - 1
        reach = T95[min(freedom, len(T95)) - 1] * error
        found["interval"] = [math.exp(means[1] - means[0] - reach), math.exp(means[1] - means[0] + reach)]
    return found
