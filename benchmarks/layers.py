"""How many layers have to change for a task, in images of what size, and what do the others cost?

    python benchmarks/layers.py            # learns: hours; goes on where it stopped
    python benchmarks/layers.py --time     # measures steps instead, beside full fine-tuning in torch

MobileNetV2 with only its layers from one on adapted, the others plain, and with their output kept in a few views, or
learned in smaller images, or by products in half precision: validation accuracy over three tasks and three seeds at
96 px, 30 % of the images held out, each against the run of the same task and seed in which all layers change; and, with
--time, what an optimizer step of 8 images takes at 224 px, the views' share of it included, in processes of one thread
that alternate. The test sets are not read.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grid
from measure import (
    KSM_EDGE,
    RESULTS,
    Record,
    add_backbone,
    backbone,
    condition,
    disturbance,
    fresh_json,
    machine,
    print_table,
)
from methods import settings_by
from step_rivals import FULL, OURS
from tasks import task_data
from timing import falls

SIZE, STEP_SIZE, STEP_BATCH = 96, 224, 8
TASKS = ("trashnet", "pacs_sketch7", "gtsrb43")
HELD_OUT = 0.3
ALL = ""
# Options of `adapt`, of those in `KINDS`.
WAYS = (ALL, "product-bits=16", "layers=35%.. views=4", "layers=35%.. views=4 product-bits=16",
        "train-scale=0.7 product-bits=16", "layers=35%.. views=4 product-bits=16 train-scale=0.7")  # fmt: skip
KINDS = {"layers": str, "views": int, "product_bits": int, "train_scale": float, "whole_at": float}
# Runs with the same settings as the last one, but for what a way gives.
STANDING = grid.latest(
    lambda run: "all of them",
    lambda run: {
        name: value for name, value in run["identity"].get("settings", {}).items() if name not in (*KINDS, "amplify")
    },
    task=lambda run: run["identity"]["task"],
)
QUESTION = __doc__.split("\n")[0]


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_backbone(parser)
    parser.add_argument("--time", action="store_true", help="measure steps, with the other results left as they are")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), metavar="OPTIONS",
                        help="of layers= views= product-bits= train-scale= whole-at=, as of adapt")  # fmt: skip
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help="of the data folder (default: %(default)s)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument("--repeats", type=int, default=5, help="processes for each, with --time (default: 5)")
    parser.add_argument("--out", type=Path, default=RESULTS / "layers.json", help="(default: results/layers.json)")
    return parser


def main() -> int:
    options = arguments().parse_args()
    if options.time:
        return _time(options)
    with backbone(options.bundle, SIZE, random=False) as bundle:
        for seed in options.seeds:
            for way in options.ways:
                for task in options.tasks:
                    _learn(options, bundle, task, seed, way)
    _show(summary(STANDING(grid.runs(options.out))))
    print(f"\nraw values: {options.out}")
    return 0


# Accuracy


def _learn(options: argparse.Namespace, bundle: Path, task: str, seed: int, way: str) -> None:
    """One training, kept in the file; none where that is there."""
    from ksm_edge.training.settings import Settings

    digest = json.loads((bundle / "manifest.json").read_text())["backbone_digest"]
    usual = Settings()
    words = [*_words(way), "--validation", str(HELD_OUT), "--join-at", "1", "--epochs", str(usual.epochs),
             "--batch", str(usual.batch)]  # fmt: skip
    identity = {"task": task, "seed": seed, "way": way, "size": SIZE, "backbone_digest": digest,
                "settings": settings_by(words)}  # fmt: skip
    if grid.has(options.out, identity):
        return
    print(f"{task}, seed {seed}, {way or 'all layers'} ...", file=sys.stderr)
    before = condition()
    with tempfile.TemporaryDirectory(prefix="ksm-edge-layers-") as folder:
        adapt = ("adapt", str(task_data(task)), "--bundle", str(bundle), "--out", str(Path(folder, "task.ksm")),
                 *words, "--seed", str(seed), "--threads", "1", "--json")  # fmt: skip
        report = fresh_json([*KSM_EDGE, *adapt], quiet=False)
    kept = ("validation_accuracy", "pack_bytes", "peak_rss_bytes", "step_ms_p50", "wall_seconds", "steps")
    found = {name: report[name] for name in kept}
    run = {"identity": identity, **found, "machine": machine(), "before": before, "after": condition()}
    head = {"benchmark": "layers", "question": QUESTION}
    grid.keep(options.out, head, {**run, "warnings": disturbance(before)}, summary, STANDING)


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each way: mean accuracy, and the mean change with its standard error over pairs of runs."""
    by_way: dict[str, dict[tuple[str, int], dict[str, Any]]] = {}
    for run in runs:
        identity = run["identity"]
        by_way.setdefault(identity["way"], {})[identity["task"], identity["seed"]] = run
    rows = {}
    for way, found in by_way.items():
        paired = sorted(found.keys() & by_way.get(ALL, {}).keys())
        changes = [_accuracy(found[key]) - _accuracy(by_way[ALL][key]) for key in paired]
        rows[way] = {
            "runs": len(found),
            "accuracy": statistics.fmean(map(_accuracy, found.values())),
            "accuracy_change": statistics.fmean(changes) if changes else None,
            "accuracy_change_error": statistics.stdev(changes) / len(changes) ** 0.5 if len(changes) > 1 else None,
            "pack_bytes": statistics.fmean(run["pack_bytes"] for run in found.values()),
        }
    return rows


def _accuracy(run: dict[str, Any]) -> float:
    return float(run["validation_accuracy"])


def _show(rows: dict[str, Any]) -> None:
    table = [("options", "runs", "validation accuracy", "change, points", "pack, kB")]
    for way, row in rows.items():
        error = row["accuracy_change_error"]
        change = "" if error is None else f"{100 * row['accuracy_change']:+.2f} +- {100 * error:.2f}"
        accuracy = f"{100 * row['accuracy']:.2f} %"
        table.append((way, str(row["runs"]), accuracy, change, f"{row['pack_bytes'] / 1e3:.1f}"))
    print_table(table)


# Time


def _time(options: argparse.Namespace) -> int:
    record = Record("layer-steps", QUESTION, {"size": STEP_SIZE, "batch": STEP_BATCH, "threads": 1})
    script = str(Path(__file__).with_name("step_rivals.py"))
    with backbone(options.bundle, STEP_SIZE) as bundle:
        usual = {"recipe": "mobilenet_v2", "size": STEP_SIZE, "batch": STEP_BATCH, "threads": 1, "steps": 12}
        usual["bundle"] = str(bundle)
        rivals = {way: (OURS, usual | _settings(way)) for way in options.ways} | {FULL: (FULL, usual)}
        for repeat in range(options.repeats):
            for name in rivals if repeat % 2 == 0 else reversed(rivals):
                rival, given = rivals[name]
                run = fresh_json([sys.executable, script, rival, json.dumps(given)])
                if "absent" in run:
                    continue
                if not falls(run["losses"]):
                    raise SystemExit(f"WRONG ANSWER: the loss of {name} does not fall: {run['losses']}")
                record.runs.append({"way": name, "repeat": repeat, **run})
    for name in rivals:
        of_rival = [run for run in record.runs if run["way"] == name]
        if of_rival:
            record.summary[name] = {
                "step_ms": statistics.median(statistics.median(run["step_ms"]) for run in of_rival),
                "peak_rss_bytes": max(run["peak_rss_bytes"] for run in of_rival),
            }
    torch = record.summary.get(FULL)
    for row in record.summary.values():
        row["ratio"] = row["step_ms"] / torch["step_ms"] if torch else None
    table = [("", "step, ms", "peak RSS, MiB", "time / torch")]
    for name, row in record.summary.items():
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.3f}"
        table.append((name, f"{row['step_ms']:.0f}", f"{row['peak_rss_bytes'] / 2**20:.0f}", ratio))
    print_table(table)
    record.finish(options.out.with_name("layer-steps.json"))
    return 0


def _words(way: str) -> Iterator[str]:
    """As `adapt` takes them."""
    for name, value in _settings(way).items():
        yield from (f"--{name.replace('_', '-')}", str(value))


def _settings(way: str) -> dict[str, Any]:
    given = [(name.replace("-", "_"), value) for name, value in (part.split("=", 1) for part in way.split())]
    for name, _ in given:
        if name not in KINDS:
            raise SystemExit(f"--ways {way}: {name} is none of {', '.join(KINDS)}")
    return {name: KINDS[name](value) for name, value in given}


if __name__ == "__main__":
    sys.exit(grid.resumable(main))
