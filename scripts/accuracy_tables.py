"""The tables of docs/accuracy.md, from the summary of `benchmarks/accuracy.py`."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from readme_table import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
from accuracy import backbone_name  # found by the line above
from grid import BEFORE
from methods import ABLATIONS, ALL, METHODS, REMARKED, outdated, remark
from tasks import FIVE

from ksm_edge.training.crops import WIDE_CROPS

BACKBONES = (
    "mobilenet_v2, 160 px",
    "mobilenet_v2, 96 px",
    "efficientnet_lite0, 96 px",
    "onnx:mcunet_5fps.onnx, 128 px",
    "onnx:mbv2-w035.onnx, 128 px",
    "resnet20_cifar10, 32 px",
)
ABLATED = (BACKBONES[1], *BACKBONES[3:])
FEW = "@10"
COUNTS = {"@5": "5", FEW: "10", "@20": "20", "": "all"}  # images a class, by what stands behind a task's name
SUITE = "caltech100-"
CROPPED = ("ksm", "crop-narrow", "crop-wide")  # methods that are the default but for their crops

Row = Mapping[str, Any]


def method_tables(content: Mapping[str, Any]) -> str:
    """A table for each size: test accuracy of each method on each of the five tasks, their mean, and what it costs."""
    parts = []
    for backbone in BACKBONES:
        tasks = content["summary"].get(backbone, {})
        heads = ("test accuracy, %", *FIVE, "mean", "pack, kB", "steps")
        lines = [f"{backbone}:", "", *_table(heads, _method_rows(tasks, FIVE))]
        if len(lines) > 4:
            parts.append("\n".join(lines))
    return "\n\n".join(parts)


def few_tables(content: Mapping[str, Any]) -> str:
    """The same for ten images a class."""
    tasks = content["summary"].get(BACKBONES[0], {})
    heads = ("test accuracy, %", *FIVE, "mean", "pack, kB", "steps")
    return "\n".join(_table(heads, _method_rows(tasks, [task + FEW for task in FIVE], (*METHODS, "head-random"))))


def count_tables(content: Mapping[str, Any]) -> str:
    """What more images a class are worth: the default beside classifier only, both with the first seed."""
    tasks = content["summary"].get(BACKBONES[0], {})
    lines = []
    for suffix, count in COUNTS.items():
        for key in ("ksm", "linear"):
            rows = [tasks.get(task + suffix, {}).get(key, {}) for task in FIVE]
            found = [row.get("by_seed", {}).get("0") for row in rows]
            cells = ("" if accuracy is None else _percent(accuracy) for accuracy in found)
            if any(found):
                lines.append((count, _title(key, [row for row in rows if row]), *cells))
    return "\n".join(_table(("images a class", "test accuracy, %", *FIVE), lines))


def suite_tables(content: Mapping[str, Any]) -> str:
    """The mean over the tasks of the suite, of methods that have learned all of them."""
    tasks = {name: rows for name, rows in content["summary"].get(BACKBONES[1], {}).items() if name.startswith(SUITE)}
    lines = []
    for key in METHODS:
        rows = [of_task[key] for of_task in tasks.values() if key in of_task]
        if rows and len(rows) == len(tasks):
            least = min(row["test_accuracy"] for row in rows)
            size = statistics.fmean(row["pack_bytes"] for row in rows)
            lines.append((_title(key, rows), _percent(_mean(rows)), _percent(least), f"{size / 1e3:,.1f}"))
    return "\n".join(_table((f"{len(tasks)} tasks", "mean, %", "worst task, %", "pack, kB"), lines))


def ablation_tables(content: Mapping[str, Any]) -> str:
    """For each backbone one change at a time, against the default on the same task and seeds and otherwise alike."""
    parts = []
    for backbone in ABLATED:
        tasks = content["summary"].get(backbone, {})
        names = [task for task in FIVE if "ksm" in tasks.get(task, {}) and ABLATIONS.keys() & tasks[task].keys()]
        lines = list(_ablation_rows(tasks, names)) if names else []
        if len(lines) > 1:  # more than the default
            parts.append("\n".join([f"{backbone}:", "", *_table(("points of test accuracy", *names), lines)]))
    return "\n\n".join(parts)


def crop_tables(content: Mapping[str, Any]) -> str:
    """The default with crops of how much of an image, wherever it has learned with more than one share."""
    parts = []
    for backbone in BACKBONES:
        of_backbone = [run for run in content["runs"] if _backbone(run) == backbone]
        for suffix, count in COUNTS.items():
            found = _by_crops(of_backbone, {task + suffix: task for task in FIVE})
            if len(found) > 1:
                heads = ("crops show, of an image", *FIVE, "mean")
                lines = [(label, *_means(tasks)) for label, tasks in sorted(found.items())]
                parts.append("\n".join([f"{backbone}, {count} images a class:", "", *_table(heads, lines)]))
    return "\n\n".join(parts)


def _by_crops(runs: Iterable[Mapping[str, Any]], tasks: Mapping[str, str]) -> dict[str, dict[str, dict[int, float]]]:
    """By the share that crops show at least, by task and by seed the test accuracy of defaults alike but for that."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for run in runs:
        learned = run["identity"]
        task = tasks.get(learned["task"])
        changed = set(outdated(learned)) if task and learned["method"] in CROPPED else {"another method"}
        if changed <= REMARKED and changed - {"join_at"} != {"amplify"}:  # those were done again
            settings = BEFORE | learned["settings"]
            label = _crops(settings["crop_scale"], settings["crop_start"]) + remark(changed & {"head_rate", "join_at"})
            found.setdefault(label, {}).setdefault(task, {})[learned["seed"]] = run["test_accuracy"]
    return found


def _crops(scale: float | None, start: float | None) -> str:
    if scale is not None:
        return f"{100 * scale:.0f} % or more"
    first = f"{100 * WIDE_CROPS:.0f} % of what evaluation sees" if start is None else f"{100 * start:.0f} %"
    return f"{first} at first, then by training accuracy"


def _means(tasks: Mapping[str, Mapping[int, float]]) -> Iterable[str]:
    """Of each of the five tasks, and of those, where all are there."""
    means = {task: statistics.fmean(of_seeds.values()) for task, of_seeds in tasks.items()}
    for task in FIVE:
        yield _over(means[task], len(tasks[task])) if task in means else ""
    yield f"**{_percent(statistics.fmean(means.values()))}**" if len(means) == len(FIVE) else ""


def _backbone(run: Mapping[str, Any]) -> str:
    return backbone_name(run["identity"]["recipe"], run["identity"]["size"])


def _ablation_rows(tasks: Mapping[str, Any], names: Sequence[str]) -> Iterable[tuple[str, ...]]:
    defaults = [tasks[name]["ksm"] for name in names]
    yield "the default" + _remark(defaults), *(_percent(row["test_accuracy"]) for row in defaults)
    for key, change in ABLATIONS.items():
        cells = []
        for name in names:
            row, default = tasks[name].get(key), tasks[name]["ksm"]
            # Runs from before kernels could grow are the default's: it has no room for that on a table's few classes.
            given = {*row["given"], "amplify"} if row is not None else set()
            alike = row is not None and _otherwise(row["earlier"], {"amplify"}) == _otherwise(default["earlier"], given)
            seeds = row["by_seed"].keys() & default["by_seed"].keys() if alike else ()
            changes = [row["by_seed"][seed] - default["by_seed"][seed] for seed in seeds]
            cells.append(f"{100 * statistics.fmean(changes):+.1f}" if changes else "")
        if any(cells):
            yield change.title, *cells


def _method_rows(
    tasks: Mapping[str, Any], names: Sequence[str], methods: Iterable[str] = METHODS
) -> Iterable[tuple[str, ...]]:
    for key in methods:
        rows = [tasks.get(name, {}).get(key) for name in names]
        there = [row for row in rows if row is not None]
        if there:
            whole = len(there) == len(rows)
            size = statistics.fmean(row["pack_bytes"] for row in there)
            yield (
                _title(key, there),
                *("" if row is None else _cell(row) for row in rows),
                f"**{_percent(_mean(there))}**" if whole else "",
                f"{size / 1e3:,.1f}" if whole and key != "reference" else "",
                f"{statistics.fmean(row['steps'] for row in there):,.0f}" if whole else "",
            )


def _otherwise(earlier: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
    """Those that a change leaves as they were, because it does not give them itself."""
    return {name: value for name, value in earlier.items() if name not in given}


def _title(key: str, rows: Sequence[Row]) -> str:
    return ALL[key].title + _remark(rows)


def _remark(rows: Iterable[Row]) -> str:
    return remark({name for row in rows for name in row["earlier"]})


def _cell(row: Row) -> str:
    return _over(row["test_accuracy"], len(row["seeds"]))


def _over(accuracy: float, seeds: int) -> str:
    return _percent(accuracy) + (f" ({seeds} seeds)" if seeds > 1 else "")


def _mean(rows: Sequence[Row]) -> float:
    return statistics.fmean(row["test_accuracy"] for row in rows)


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(heads)} |",
        f"|---|{'---|' * (len(heads) - 1)}",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
