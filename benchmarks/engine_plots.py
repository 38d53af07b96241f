"""When does a step hold how much memory, and what do time and memory of a step cost one another?

    python benchmarks/engine_plots.py            # docs/engine-memory.svg and docs/engine-pareto.svg
    python benchmarks/engine_plots.py --measure  # trace memory again first, half a minute

The first figure shows resident memory during one step of MobileNetV2, traced here; the second what `adaptation.py`
measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from drawing import label_plainly, pyplot
from measure import RESULTS, ROOT, Record, backbone, fresh_json, read
from step_rivals import CHANNELS_LAST, FASTEST, FULL, ORT_TRAINING, OURS, SMALLEST

TRACED = (OURS, SMALLEST, FULL)
MARKERS = {OURS: "o", SMALLEST: "v", FASTEST: "<", FULL: "s", CHANNELS_LAST: "D", ORT_TRAINING: "^"}
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
    adaptation = read(options.results / "adaptation.json")["summary"]
    for path in (
        draw_traces(runs, options.out / "engine-memory.svg"),
        draw_ways(adaptation["cases"], options.out / "engine-pareto.svg"),
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
    figure, axis = pyplot().subplots(figsize=(9, 3.4))
    for name, trace in traces.items():
        axis.plot([ms for ms, _ in trace], [size / MIB for _, size in trace], label=name)
    axis.set(xlabel="milliseconds into a step", ylabel="resident memory, MiB", ylim=(0, None))
    axis.set_title(_heading(), fontsize=9)
    return _saved(figure, axis, path)


def draw_ways(cases: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Peak memory against the time of a step: of each network a colour, of each way a marker."""
    figure, axis = pyplot().subplots(figsize=(9, 4))
    usual = {name: value for name, value in CASE.items() if name != "recipe"}
    rows = [row for row in cases if "step_ms" in row and row.items() >= usual.items() and row["rival"] in MARKERS]
    for number, recipe in enumerate(dict.fromkeys(row["recipe"] for row in rows)):
        of_recipe = [row for row in rows if row["recipe"] == recipe]
        points = {row["rival"]: (row["step_ms"], row["peak_rss_bytes"] / MIB) for row in of_recipe}
        ours = [points[rival] for rival in (OURS, SMALLEST) if rival in points]
        axis.plot(*zip(*ours, strict=True), color=f"C{number}", label=recipe)
        for rival, point in points.items():
            axis.plot(*point, marker=MARKERS[rival], color=f"C{number}", linestyle="")
    for rival, marker in MARKERS.items():
        axis.plot([], [], marker=marker, color="grey", linestyle="", label=rival)
    axis.set(xscale="log", yscale="log", xlabel="ms a step", ylabel="peak RSS, MiB")
    for each in (axis.xaxis, axis.yaxis):
        label_plainly(each)
    axis.set_title(_heading(network=False), fontsize=9)
    return _saved(figure, axis, path)


def _heading(*, network: bool = True) -> str:
    what = f"{CASE['batch']} images of {CASE['size']} x {CASE['size']}, one thread"
    return f"{CASE['recipe']}, {what}" if network else what


def _saved(figure: Any, axis: Any, path: Path) -> Path:
    axis.grid(alpha=0.3, which="both")
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    return path


if __name__ == "__main__":
    sys.exit(main())
