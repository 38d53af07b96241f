"""When does a step hold how much memory, and what does memory that is saved cost in time?

    python benchmarks/engine_plots.py            # docs/engine-memory.svg and docs/engine-pareto.svg
    python benchmarks/engine_plots.py --measure  # trace memory again first, half a minute

The first figure shows resident memory during one step of MobileNetV2, traced here; the second what `plans.py` and
`adaptation.py` measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drawing import pyplot
from measure import RESULTS, ROOT, Record, backbone, fresh_json, read
from step_rivals import FULL, OURS, SMALLEST

TRACED = (OURS, SMALLEST, FULL)
CASE = {"recipe": "mobilenet_v2", "size": 224, "batch": 8, "threads": 1}
MIB = 1 << 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="trace memory again")
    parser.add_argument("--results", type=Path, default=RESULTS, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="(default: docs)")
    options = parser.parse_args()
    traces = options.results / "traces.json"
    if options.measure:
        measure(traces)
    runs = {run["rival"]: run["trace"] for run in read(traces)["runs"]}
    others = {name: read(options.results / f"{name}.json")["summary"] for name in ("plans", "adaptation")}
    for path in (
        draw_traces(runs, options.out / "engine-memory.svg"),
        draw_plans(others["plans"], others["adaptation"], options.out / "engine-pareto.svg"),
    ):
        print(path)
    return 0


def measure(path: Path) -> None:
    """A step of each, in a process of its own."""
    record = Record("traces", __doc__.split("\n")[0], CASE)
    script = str(Path(__file__).with_name("step_rivals.py"))
    with backbone(None, int(CASE["size"]), recipe=str(CASE["recipe"])) as bundle:
        for rival in TRACED:
            given = json.dumps({**CASE, "bundle": str(bundle), "steps": 1, "trace": True})
            found = fresh_json([sys.executable, script, rival, given])
            if "absent" not in found:
                record.runs.append({"rival": rival, **found})
    record.finish(path)


def draw_traces(traces: Mapping[str, list[tuple[float, int]]], path: Path) -> Path:
    """Resident memory over the time of a step."""
    figure, axis = pyplot().subplots(figsize=(7, 3.4))
    for name, trace in traces.items():
        axis.plot([ms for ms, _ in trace], [size / MIB for _, size in trace], label=name)
    axis.set(xlabel="milliseconds into a step", ylabel="resident memory, MiB", ylim=(0, None))
    axis.set_title(_heading(), fontsize=9)
    return _saved(figure, axis, path)


def draw_plans(plans: Mapping[str, Any], adaptation: Mapping[str, Any], path: Path) -> Path:
    """Peak memory against the time of a step: our plans as lines, full fine-tuning in torch as a square."""
    figure, axis = pyplot().subplots(figsize=(7, 3.8))
    rivals = {row["recipe"]: row for row in adaptation["cases"] if row["rival"] == FULL and row.items() >= _usual()}
    for number, (recipe, rows) in enumerate(plans.items()):
        points = sorted((row["step_ms"], row["peak_rss_bytes"] / MIB) for row in rows.values())
        axis.plot(*zip(*points, strict=True), marker="o", color=f"C{number}", label=recipe)
        if "step_ms" in (torch := rivals.get(recipe, {})):
            label = FULL if "s" not in {line.get_marker() for line in axis.lines} else None
            point = [torch["step_ms"]], [torch["peak_rss_bytes"] / MIB]
            axis.plot(*point, marker="s", linestyle="", color=f"C{number}", label=label)
    axis.set(xscale="log", yscale="log", xlabel="ms a step", ylabel="peak RSS, MiB")
    axis.set_title(_heading(network=False), fontsize=9)
    return _saved(figure, axis, path)


def _usual() -> Any:
    return {name: value for name, value in CASE.items() if name != "recipe"}.items()


def _heading(*, network: bool = True) -> str:
    what = f"{CASE['batch']} images of {CASE['size']} x {CASE['size']}, one thread"
    return f"{CASE['recipe']}, {what}" if network else what


def _saved(figure: Any, axis: Any, path: Path) -> Path:
    axis.grid(alpha=0.3, which="both")
    axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    return path


if __name__ == "__main__":
    sys.exit(main())
