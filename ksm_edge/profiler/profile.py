"""Measure a backbone, and tasks on it, on this machine: inference and adaptation, time and memory, raw values kept."""

from __future__ import annotations

import hashlib
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ksm_edge.bundle.layers import Bundle
from ksm_edge.errors import KsmEdgeError
from ksm_edge.limits import run_limited
from ksm_edge.pack.files import load_pack, require_backbone
from ksm_edge.profiler import telemetry
from ksm_edge.profiler.child import COLD_PARTS, STEP_PARTS

FORMAT_VERSION = 1
KIND = "ksm-edge profile"
FULL_SHARE = 0.95  # of one core: a single-threaded loop that got less was kept waiting
UNSTABLE = 1.5  # p95 over p50 of a quiet machine is below
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

    `runs`: timed inferences in all, over `processes` fresh ones, each of which is also one cold start; `steps` of
    `batch` images, 0 for none. `budget_bytes` is what adaptation is planned within. Raises what a bundle or pack that
    does not fit raises.
    """
    tell = progress or (lambda text: None)
    for pack in packs:
        require_backbone(load_pack(pack), bundle)
    result: dict[str, Any] = {
        "kind": KIND,
        "version": FORMAT_VERSION,
        "work": {
            "backbone": bundle.digest,
            "recipe": bundle.recipe,
            "size": bundle.input.size,
            "threads": threads,
            "batch": batch,
            "packs": {pack.name: hashlib.sha256(pack.read_bytes()).hexdigest() for pack in packs},
        },
        "machine": telemetry.machine(),
        **(provenance or {"emulated": False}),
        "before": telemetry.condition(),
        "inference": {},
    }
    each = -(-runs // processes)
    for name, path in {"plain backbone": None, **{pack.name: str(pack) for pack in packs}}.items():
        tell(f"inference: {name}")
        given = {"bundle": str(bundle.path), "pack": path, "threads": threads, "runs": each}
        parts = [_child("inference", {**given, "operators": i == 0}) for i in range(processes)]
        result["inference"][name] = _together(parts)
    if steps:
        tell(f"adaptation: steps of {batch} images")
        given = {"bundle": str(bundle.path), "batch": batch, "threads": threads, "steps": steps}
        result["adaptation"] = _child("adaptation", {**given, "budget_bytes": budget_bytes, "classes": CLASSES})
    result["after"] = telemetry.condition()
    result["summary"] = summary(result)
    result["warnings"] = _warnings(result)
    return result


def _child(what: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a fresh process measured, with its resident memory over time."""
    with tempfile.TemporaryDirectory(prefix="ksm-edge-") as folder:
        asked, out = Path(folder, "asked.json"), Path(folder, "found.json")
        asked.write_text(json.dumps(given))
        command = [sys.executable, "-m", "ksm_edge.profiler.child", what, str(out), str(asked)]
        outcome = run_limited(command, None)
        if outcome.exit_status or not out.exists():
            raise KsmEdgeError(f"the process that measures {what} ended with exit status {outcome.exit_status}")
        found: dict[str, Any] = json.loads(out.read_text())
    return {**found, "rss_over_time": outcome.rss_bytes}


def _together(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of several processes: each one's values in a list."""
    plain = ("latency_ms", "cpu_share", "baseline_bytes", "peak_rss_bytes", "rss_bytes", "pss_bytes")
    found: dict[str, Any] = {name: [part[name] for part in parts] for name in plain}
    found["cold"] = {name: [part["cold"][name] for part in parts] for name in COLD_PARTS}
    return {**found, "operators_ms": parts[0]["operators_ms"]}


def summary(result: Mapping[str, Any]) -> dict[str, Any]:
    """What the raw values come to."""
    found: dict[str, Any] = {"inference": {name: _inference(raw) for name, raw in result["inference"].items()}}
    if "adaptation" in result:
        raw, images = result["adaptation"], result["work"]["batch"]
        parts = {name: statistics.median(raw[name]) for name in STEP_PARTS}
        step = parts["forward_ms"] + parts["backward_ms"] + parts["update_ms"]
        kept = ("baseline_bytes", "peak_rss_bytes", "expected_peak_bytes", "activation_bytes", "micro_batch")
        found["adaptation"] = {
            **parts,
            "step_ms": step,
            "images_per_second": 1e3 * images / step,
            **{name: raw[name] for name in kept},
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


def _warnings(result: Mapping[str, Any]) -> list[str]:
    found = telemetry.warnings(result["before"], result["after"])
    for name, raw in result["inference"].items():
        share = min(raw["cpu_share"])
        if result["work"]["threads"] == 1 and share < FULL_SHARE:
            found.append(
                f"{name}: a timed loop got only {share:.0%} of a core: stop what else runs, and run this again"
            )
        row = result["summary"]["inference"][name]
        if row.get("p95_ms", 0) > UNSTABLE * row["p50_ms"]:
            found.append(f"{name}: p95 is {row['p95_ms'] / row['p50_ms']:.1f} times p50: times are unstable")
    return found
