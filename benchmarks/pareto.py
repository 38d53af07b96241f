"""Draw what `accuracy.py` measured: test accuracy against what a task costs.

    python benchmarks/pareto.py     # docs/pareto-*.svg and .png

One figure for the bytes that are kept for a task, one for the seconds that it took to learn, one for the peak of memory
meanwhile; a panel for each backbone and task.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grid
from accuracy import STANDING, summary
from drawing import pyplot
from measure import RESULTS, ROOT
from methods import METHODS, title
from tasks import FIVE

LEGEND_COLUMNS = 3
COLOURS = (*(f"C{number}" for number in range(10)),
           "black", "gold", "lime", "navy", "saddlebrown", "orchid", "teal", "tomato")  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """One thing that a task costs."""

    key: str  # in a row of the summary
    factor: float
    label: str


COSTS = {
    "bytes": Cost("pack_bytes", 1e3, "kB kept for the task"),
    "seconds": Cost("wall_seconds", 60, "minutes to learn it, one thread"),
    "memory": Cost("peak_rss_bytes", 2**20, "peak RSS, MiB"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS / "accuracy.json", help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="(default: docs)")
    options = parser.parse_args()
    found = summary(STANDING(grid.runs(options.results)))
    for name, cost in COSTS.items():
        for path in plot(found, cost, options.out / f"pareto-{name}"):
            print(path)
    return 0


def plot(result: Mapping[str, Any], cost: Cost, path: Path) -> list[Path]:
    """The files written; those of the same figures are the same."""
    plt = pyplot()
    panels = {name: _tasks(tasks, cost) for name, tasks in result.items()}
    panels = {name: tasks for name, tasks in panels.items() if tasks}
    columns = max(map(len, panels.values()))
    size = 3.4 * columns, 3.2 * len(panels)
    figure, axes = plt.subplots(len(panels), columns, figsize=size, squeeze=False, sharex="row")
    for row, (name, tasks) in zip(axes, panels.items(), strict=True):
        for axis, task in zip(row, [*tasks, *[None] * (columns - len(tasks))], strict=True):
            if task is None:
                axis.set_axis_off()
            else:
                _panel(axis, tasks[task], cost, f"{task}: {name}")
    shown = {
        label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    plain = [method.title for method in METHODS.values()]
    titles = [label for known in plain for label in sorted(shown) if label == known or label.startswith(f"{known} (")]
    figure.legend([shown[label] for label in titles], titles, loc="lower center", ncols=LEGEND_COLUMNS, frameon=False)
    legend_inches = 0.25 * (1 + -(-len(titles) // LEGEND_COLUMNS))
    figure.tight_layout(rect=(0, legend_inches / size[1], 1, 1))
    written = [path.with_suffix(suffix) for suffix in (".svg", ".png")]
    for file in written:
        figure.savefig(file, dpi=110, metadata={"Date": None} if file.suffix == ".svg" else None)
    plt.close(figure)
    return written


def _tasks(tasks: Mapping[str, Any], cost: Cost) -> dict[str, Any]:
    """Of the five tasks those with at least two methods whose cost is known, and of these the methods."""
    known = {task: {k: row for k, row in tasks[task].items() if cost.key in row} for task in FIVE if task in tasks}
    return {task: rows for task, rows in known.items() if len(rows) > 1}


def _panel(axis: Any, rows: Mapping[str, Any], cost: Cost, heading: str) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    for (name, method), colour in zip(METHODS.items(), COLOURS, strict=True):
        if name in rows:
            point = [rows[name][cost.key] / cost.factor], [100 * rows[name]["test_accuracy"]]
            marker = "o" if method.ours else "s"
            axis.plot(
                *point,
                linestyle="",
                markersize=7,
                label=title(name, rows[name]["earlier"]),
                color=colour,
                marker=marker,
            )
    axis.set(xscale="log", xlabel=cost.label, ylabel="test accuracy, %")
    axis.set_title(heading, fontsize=9)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.tick_params(labelbottom=True)
    axis.grid(alpha=0.3)


if __name__ == "__main__":
    sys.exit(main())
