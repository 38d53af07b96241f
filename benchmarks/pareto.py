"""Draw what `accuracy.py` measured: test accuracy against what a task costs.

    python benchmarks/pareto.py     # docs/pareto-*.svg

One figure for the bytes that are kept for a task, one for the minutes that it took to learn, one for the peak of memory
meanwhile. A panel for each task of which the cost of three methods is known, a row for each backbone that has one, most
panels first; the line joins methods than which none is cheaper and at least as accurate.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grid
from accuracy import STANDING, summary
from drawing import label_plainly, pyplot
from measure import RESULTS, ROOT
from methods import METHODS
from tasks import FIVE

LEGEND_COLUMNS = 4
FEWEST = 3  # methods of a panel
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
        path = options.out / f"pareto-{name}.svg"
        plot(found, cost, path)
        print(path)
    return 0


def plot(result: Mapping[str, Any], cost: Cost, path: Path) -> None:
    """Write the figure; of the same figures it is the same."""
    plt = pyplot()
    rows = {name: panels for name, tasks in result.items() if (panels := _panels(tasks, cost))}
    if not rows:
        raise SystemExit(f"no task has been learned by {FEWEST} methods whose {cost.label} is known")
    rows = dict(sorted(rows.items(), key=lambda row: -len(row[1])))
    columns = [task for task in FIVE if any(task in panels for panels in rows.values())]
    size = 2.7 * len(columns), 2.5 * len(rows) + 1
    figure, axes = plt.subplots(len(rows), len(columns), figsize=size, squeeze=False, layout="constrained")
    for line, (name, panels) in zip(axes, rows.items(), strict=True):
        for axis, task in zip(line, columns, strict=True):
            if task in panels:
                _panel(axis, panels[task], cost)
                axis.set_title(task, fontsize=10)
            else:
                axis.set_axis_off()
        first = next(axis for axis, task in zip(line, columns, strict=True) if task in panels)
        first.set_ylabel(f"{name}\ntest accuracy, %")
    figure.legend(handles=_legend(rows), loc="outside lower center", ncols=LEGEND_COLUMNS, frameon=False, fontsize=9)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _legend(rows: Mapping[str, Any]) -> list[Any]:
    """A marker for each method, and one for what a hollow marker says."""
    from matplotlib.lines import Line2D

    drawn = [item for panels in rows.values() for methods in panels.values() for item in methods.items()]
    names = {name for name, _ in drawn}
    handles = [Line2D([], [], **_look(name, []), label=METHODS[name].title) for name in METHODS if name in names]
    if any(row["earlier"] for _, row in drawn):
        handles.append(Line2D([], [], **_look("ksm", ["any"]) | {"color": "grey"}, label="hollow: at earlier settings"))
    return handles


def _panels(tasks: Mapping[str, Any], cost: Cost) -> dict[str, Any]:
    """Of the five tasks those with enough methods whose cost is known, and of these the methods."""
    known = {
        task: {name: row for name, row in tasks[task].items() if name in METHODS and (row.get(cost.key) or 0) > 0}
        for task in FIVE
        if task in tasks
    }
    return {task: rows for task, rows in known.items() if len(rows) >= FEWEST}


def _panel(axis: Any, rows: Mapping[str, Any], cost: Cost) -> None:
    points = {name: (row[cost.key] / cost.factor, 100 * row["test_accuracy"]) for name, row in rows.items()}
    axis.plot(*zip(*_front(points.values()), strict=True), drawstyle="steps-post", color="lightgrey", zorder=0)
    for name, (x, y) in points.items():
        axis.plot(x, y, **_look(name, rows[name]["earlier"]))
    decades = math.log10(max(x for x, _ in points.values()) / min(x for x, _ in points.values()))
    axis.set(xscale="log", xlabel=cost.label)
    axis.margins(0.12)
    label_plainly(axis.xaxis, (1,) if decades > 2 else (1, 3) if decades > 1 else (1, 2, 5))
    axis.grid(alpha=0.3)


def _front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that cost less than any as accurate, by what they cost."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front


def _look(name: str, earlier: Sequence[str]) -> dict[str, Any]:
    """Of a method's marker: ours are round, and filled where its settings are today's."""
    colour = dict(zip(METHODS, COLOURS, strict=True))[name]
    marker = "o" if METHODS[name].ours else "s"
    return {"color": colour, "marker": marker, "linestyle": "", "mfc": "white" if earlier else colour}


if __name__ == "__main__":
    sys.exit(main())
