"""Measure a backbone, and tasks on it, on this machine: inference and adaptation, time and memory, raw values kept."""

from __future__ import annotations

import hashlib
import json
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ksm_edge.bundle.layers import Bundle
from ksm_edge.child import module_command
from ksm_edge.errors import KsmEdgeError, UsageError
from ksm_edge.limits import run_limited
from ksm_edge.pack.files import load_pack_and_bytes, require_backbone
from ksm_edge.profiler import telemetry
from ksm_edge.profiler.child import STEP_PARTS
from ksm_edge.training.planner import Plan, make_plan
from ksm_edge.training.settings import Settings

FORMAT_VERSION = 2
KIND = "ksm-edge profile"
UNSTABLE = 1.5  # p95 over p50 of a quiet machine is below
PLAIN = "plain backbone"
CLASSES = 10  # of the task that adaptation is timed on


def measure_profile(
    bundle: Bundle,
    packs: Sequence[Path] = (),
    *,
    threads: int = 1,
    runs: int = 200,
    processes: int = 5,
    batch: int = 16,
    steps: int = 10,
    budget_bytes: int | None = None,
    provenance: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """A result to write with `save_profile`: of the plain backbone and each pack, and of optimizer steps.

    `runs`: timed inferences in all, over `processes` fresh ones, each of which is also one cold start; `steps` in all,
    of `batch` images, 0 for none. `budget_bytes` is what adaptation is planned within. Raises BudgetError where it does
    not fit, UsageError for two packs of one name, and what a pack that does not fit the bundle raises.
    """
    tell = progress or (lambda text: None)
    _require_names(packs)
    digests = {pack.name: _digest(pack, bundle) for pack in packs}
    plan: Plan | None = None
    if steps:  # found out now rather than when everything else has been measured
        plan = make_plan(bundle, CLASSES, Settings(batch=batch), threads=threads, budget_bytes=budget_bytes)
    result: dict[str, Any] = {
        "kind": KIND,
        "version": FORMAT_VERSION,
        "work": {
            "backbone": bundle.digest,
            "recipe": bundle.recipe,
            "size": bundle.input.size,
            "threads": threads,
            "batch": batch,
            "packs": digests,
        },
        "machine": telemetry.machine(),
        **(provenance or {"emulated": False}),
        "before": telemetry.condition(),
        "inference": {},
    }
    each = -(-runs // processes)
    for name, path in {PLAIN: None, **{pack.name: str(pack) for pack in packs}}.items():
        tell(f"inference: {name}")
        given = {"bundle": str(bundle.path), "pack": path, "threads": threads, "runs": each}
        parts = [_child("inference", {**given, "operators": i == 0}) for i in range(processes)]
        result["inference"][name] = _together(parts)
    if steps:
        tell(f"adaptation: steps of {batch} images")
        given = {"bundle": str(bundle.path), "batch": batch, "threads": threads, "steps": -(-steps // processes)}
        given |= {"budget_bytes": budget_bytes, "classes": CLASSES}
        result["adaptation"] = _listed([_child("adaptation", given) for _ in range(processes)])
    result["after"] = telemetry.condition()
    result["summary"] = summary(result)
    result["warnings"] = warnings_of(result)
    if plan is not None and plan.distrusted is not None and not plan.distrusted.is_passed:
        result["warnings"].append(
            f"adaptation: by standard operators, as this project's own are wrong here: {plan.distrusted}"
        )
    return result


def _require_names(packs: Sequence[Path]) -> None:
    """Results go by the packs' file names."""
    names = [PLAIN, *(pack.name for pack in packs)]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"two of the packs are called {name}: results go by their names, so rename one")


def _digest(path: Path, bundle: Bundle) -> str:
    """Of the pack's file, which must be one of that backbone's."""
    pack, data = load_pack_and_bytes(path)
    require_backbone(pack, bundle)
    return hashlib.sha256(data).hexdigest()


def _child(what: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a fresh process measured, with its resident memory over time."""
    with tempfile.TemporaryDirectory(prefix="ksm-edge-") as folder:
        asked, out = Path(folder, "asked.json"), Path(folder, "found.json")
        asked.write_text(json.dumps(given))
        outcome = run_limited(module_command("ksm_edge.profiler.child", what, str(out), str(asked)), None)
        if outcome.interrupted:
            raise KeyboardInterrupt
        if outcome.exit_status or not out.exists():
            raise KsmEdgeError(f"the process that measures {what} ended with exit status {outcome.exit_status}")
        found: dict[str, Any] = json.loads(out.read_text())
    return {**found, "rss_over_time": outcome.rss_bytes}


def _listed(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of several processes: each one's values in a list."""
    return {name: [part[name] for part in parts] for name in parts[0]}


def _together(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    plain = ("latency_ms", "cpu_share", "baseline_bytes", "peak_rss_bytes", "rss_bytes", "pss_bytes")
    found = _listed([{name: part[name] for name in plain} for part in parts])
    return {**found, "cold": _listed([part["cold"] for part in parts]), "operators_ms": parts[0]["operators_ms"]}


def summary(result: Mapping[str, Any]) -> dict[str, Any]:
    """What the raw values come to."""
    found: dict[str, Any] = {"inference": {name: _inference(raw) for name, raw in result["inference"].items()}}
    if "adaptation" in result:
        raw, images = result["adaptation"], result["work"]["batch"]
        parts = {name: statistics.median(value for part in raw[name] for value in part) for name in STEP_PARTS}
        step = parts["gradient_ms"] + parts["update_ms"]
        found["adaptation"] = {
            **parts,
            "backward_ms": parts["gradient_ms"] - parts["forward_ms"],
            "step_ms": step,
            "images_per_second": 1e3 * images / step,
            "baseline_bytes": statistics.median(raw["baseline_bytes"]),
            "peak_rss_bytes": max(raw["peak_rss_bytes"]),
            **{name: raw[name][0] for name in ("expected_peak_bytes", "activation_bytes", "micro_batch", "workers")},
        }
    return found


def _inference(raw: Mapping[str, Any]) -> dict[str, Any]:
    latency = sorted(value for part in raw["latency_ms"] for value in part)
    cold = {name: statistics.median(values) for name, values in raw["cold"].items()}
    largest = {name: max(raw[name]) for name in ("peak_rss_bytes", "rss_bytes", "pss_bytes")}
    return {
        "n": len(latency),
        "p50_ms": percentile(latency, 50),
        # Fewer values than these say nothing of the tail.
        **({"p95_ms": percentile(latency, 95)} if len(latency) >= 100 else {}),
        **({"p99_ms": percentile(latency, 99)} if len(latency) >= 500 else {}),
        "cold_start_ms": statistics.median(map(sum, zip(*raw["cold"].values(), strict=True))),
        **cold,
        "baseline_bytes": statistics.median(raw["baseline_bytes"]),
        **largest,
    }


def percentile(ordered: Sequence[float], percent: int) -> float:
    """The smallest value that is not below `percent` % of them."""
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


def warnings_of(result: Mapping[str, Any]) -> list[str]:
    """What in the raw values, and in the machine's state, makes figures doubtful."""
    found = telemetry.warnings(result["before"], result["after"])
    for name, raw in result["inference"].items():
        if result["work"]["threads"] == 1:
            found += telemetry.share_warnings(name, raw["cpu_share"])
        row = _inference(raw)
        if row.get("p95_ms", 0) > UNSTABLE * row["p50_ms"]:
            found.append(f"{name}: p95 is {row['p95_ms'] / row['p50_ms']:.1f} times p50: times are unstable")
    return found
