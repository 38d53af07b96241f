"""A profile result as pictures; needs matplotlib (extra `plot`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ksm_edge.errors import UnsupportedError, UsageError

FORMATS = ("png", "svg")
MIB = 1 << 20
SHOWN_OPERATORS = 10


def plot_profile(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Latencies, resident memory over time and time by operator, as PNG and SVG files; returns their paths."""
    require_plots(folder)
    from matplotlib.figure import Figure

    drawn = {"latency": _latency, "operators": _operators}
    if "adaptation" in result:
        drawn["memory"] = _memory
    written = []
    for name, draw in drawn.items():
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot()
        draw(axes, result)
        work, note = result["work"], " (emulated)" if result["emulated"] else ""
        figure.suptitle(f"{work['recipe']}, {work['size']} px, {work['threads']} thread(s){note}", fontsize=10)
        for suffix in FORMATS:
            path = folder / f"{name}.{suffix}"
            figure.savefig(path)
            written.append(path)
    return written


def require_plots(folder: Path) -> None:
    """Raises UnsupportedError without matplotlib, UsageError where the folder cannot be made."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UnsupportedError("plots need matplotlib: pip install 'ksm-edge[plot]'")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder} cannot be written: {error.strerror}") from error


def _latency(axes: Any, result: Mapping[str, Any]) -> None:
    """The share of inferences that took at most so long: tails are seen, no bins are chosen."""
    for name, raw in result["inference"].items():
        values = sorted(value for part in raw["latency_ms"] for value in part)
        axes.step(values, [(i + 1) / len(values) for i in range(len(values))], where="post", label=name)
    axes.set(xlabel="latency, ms", ylabel="share of inferences", ylim=(0, 1))
    axes.legend()


def _operators(axes: Any, result: Mapping[str, Any]) -> None:
    """Of the backbone with the last task, or with none."""
    name, raw = list(result["inference"].items())[-1]
    rows = list(raw["operators_ms"].items())[:SHOWN_OPERATORS]
    axes.barh([operator for operator, _ in rows][::-1], [ms for _, ms in rows][::-1])
    axes.set(xlabel=f"ms a run, {name}")


def _memory(axes: Any, result: Mapping[str, Any]) -> None:
    raw = result["adaptation"]
    for index, samples in enumerate(raw["rss_over_time"]):
        times, sizes = zip(*samples, strict=True)
        label = "resident memory, each process" if index == 0 else None
        axes.plot(times, [size / MIB for size in sizes], color="C0", linewidth=1, label=label)
    axes.axhline(raw["expected_peak_bytes"][0] / MIB, linestyle="--", color="grey", label="expected by the plan")
    axes.set(xlabel="seconds since the process began", ylabel="MiB", ylim=(0, None))
    axes.legend()
