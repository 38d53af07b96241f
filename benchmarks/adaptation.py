"""What does one optimizer step cost beside every other way to adapt a backbone?

    python benchmarks/adaptation.py             # every network at 224 px, 8 images, one thread; MobileNetV2's axes
    python benchmarks/adaptation.py --recipes resnet18 --sizes 96 160 224 --batches 1 8 32 --threads 1 2 --out FILE
    python benchmarks/adaptation.py --recipes mobilenet_v2 --threads 2 --add     # that case again, the others stay

Every figure comes from a process of its own, rivals alternating, the same images at every step: a loss that does not
fall means that something else was timed than learning. Weights are random where the data folder has none, which costs
the same. Beside it the arithmetic bound: the operations of forward and backward pass at the speed of a large matrix
product of numpy, which no exact gradient of every layer can be faster than unless it does less arithmetic.
The rivals: `step_rivals.py`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from measure import Record, add_output, backbone, fresh_json, output, print_table, read, share_warning
from step_rivals import ALONG_AXES, FASTEST, FULL, ONCE, OURS, RIVALS, applies
from timing import falls

RECIPES = ("mobilenet_v2", "mobilenet_v3_large", "resnet18", "resnet50", "efficientnet_b0")
AXES = {"size": (224, 96, 160), "batch": (8, 1, 32), "threads": (1, 2)}  # each from what is usual on
MIB = 1 << 20

Case = dict[str, Any]


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), help="(default: all)")
    for flag in ("sizes", "batches", "threads"):
        parser.add_argument(f"--{flag}", nargs="+", type=int, metavar="N",
                            help="with --recipes every combination, in place of each axis alone")  # fmt: skip
    parser.add_argument("--rivals", nargs="+", choices=RIVALS, default=list(RIVALS), help="(default: all)")
    parser.add_argument("--repeats", type=int, default=5, help="processes for each rival (default: 5)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps in each process (default: 5)")
    parser.add_argument("--add", action="store_true", help="keep what the file has of other cases and rivals")
    parser.add_argument("--onnxruntime-training", metavar="PYTHON", help="that has it: see ort_training.py")
    add_output(parser)
    return parser


def main() -> int:
    options = arguments().parse_args()
    if options.quick:
        options.repeats, options.steps, options.recipes = 1, 3, options.recipes[:1]
    record = Record("adaptation", __doc__.split("\n")[0], {"repeats": options.repeats, "steps": options.steps})
    wanted = cases(options)
    out = output(options, "adaptation")
    if options.add and out is not None and out.exists():
        again, before = {(*_case(case), rival) for case in wanted for rival in options.rivals}, read(out)
        of_before = {"commit": before["machine"].get("commit")}
        # Of what stays torch does too, which it is held against.
        stay = {_case(run) for run in before["runs"] if (*_case(run), run["rival"]) not in again}
        again -= {(*case, FULL) for case in stay}
        record.runs = [{**of_before, **run} for run in before["runs"] if (*_case(run), run["rival"]) not in again]
        record.warnings += before["warnings"]
    for recipe, size in dict.fromkeys((case["recipe"], case["size"]) for case in wanted):
        with backbone(None, size, recipe=recipe) as bundle:
            for case in wanted:
                if (case["recipe"], case["size"]) == (recipe, size):
                    for run in _runs(case, bundle, options):
                        record.runs.append({**run, "commit": record.machine.get("commit")})
                        print(_line(run), file=sys.stderr)
                    record.summary = {"cases": summary(record.runs), "exponents": exponents(record.runs)}
                    record.save(out)
    _show(record.summary)
    for name in options.rivals:
        of_rival = [run for run in record.runs if run["rival"] == name and "cpu_share" in run and run["threads"] == 1]
        record.warn(share_warning(name, [run["cpu_share"] for run in of_rival]))
    record.finish(out)
    wrong = [run for run in record.runs if "losses" in run and not falls(run["losses"])]
    for run in wrong:
        print(f"WRONG ANSWER: the loss does not fall: {_line(run)}", file=sys.stderr)
    return 1 if wrong else 0


def cases(options: argparse.Namespace) -> list[Case]:
    """Each recipe as usual, and the first along each axis alone; or every combination of what was asked for."""
    usual = {name: values[0] for name, values in AXES.items()}
    asked = {"size": options.sizes, "batch": options.batches, "threads": options.threads}
    if any(asked.values()):
        values = product(*(asked[name] or [usual[name]] for name in AXES))
        return [{"recipe": r, **dict(zip(AXES, v, strict=True))} for r, v in product(options.recipes, values)]
    found = [{"recipe": recipe, **usual} for recipe in options.recipes]
    if not options.quick:
        found += [{**found[0], name: value} for name, values in AXES.items() for value in values[1:]]
    return found


def _runs(case: Case, bundle: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    bound, usual = _bound(bundle, case), all(case[name] == values[0] for name, values in AXES.items())
    rivals = RIVALS if usual or options.sizes or options.batches or options.threads else ALONG_AXES
    given = {**case, "bundle": str(bundle), "steps": options.steps}
    given["onnxruntime_training"] = options.onnxruntime_training
    for repeat in range(options.repeats):
        for rival in options.rivals if repeat % 2 == 0 else reversed(options.rivals):
            if (repeat and rival in ONCE) or not applies(rival, case["recipe"]) or rival not in rivals:
                continue
            script = Path(__file__).with_name("step_rivals.py")
            found = fresh_json([sys.executable, str(script), rival, json.dumps(given)], case["threads"])
            yield {**case, "rival": rival, "repeat": repeat, "bound_flops": bound, **found}


def _bound(bundle: Path, case: dict[str, Any]) -> float:
    """Operations of a step: forward, the gradient of every weight, and of every input but the image."""
    from ksm_edge.bundle.load import load_bundle
    from ksm_edge.profiler.work import graph_work

    work = graph_work(load_bundle(bundle).graph_path, case["size"])
    stem = next(part.flops for part in work if part.operator == "Conv")
    return case["batch"] * (3 * sum(part.flops for part in work) - stem)


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each case and rival the medians over processes, beside full fine-tuning in torch and the arithmetic bound.

    Of several times that a rival was measured the last; held against torch of the same time, or else the first.
    """
    cells: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in runs:
        cells.setdefault((*_case(run), run["rival"]), []).append(run)
    rows, seen = [], list(dict.fromkeys(map(_case, runs)))
    for (*case, rival), of_all_times in sorted(
        cells.items(), key=lambda cell: (seen.index(cell[0][:-1]), list(RIVALS).index(cell[0][-1]))
    ):
        of_cell = [run for run in of_all_times if run.get("commit") == of_all_times[-1].get("commit")]
        recipe, size, batch, threads = case
        row = {"recipe": recipe, "size": size, "batch": batch, "threads": threads, "rival": rival}
        there = [run for run in of_cell if "absent" not in run]
        if not there:
            rows.append({**row, "absent": of_cell[0]["absent"].rpartition("was false. ")[2]})  # of a check that failed
            continue
        row["step_ms"] = _median_ms(there)
        row["learns"] = all(falls(run["losses"]) for run in there)
        row["peak_rss_bytes"] = max(run["peak_rss_bytes"] for run in there)
        if rival != FASTEST:  # which does less
            row["bound_ms"] = there[0]["bound_flops"] / statistics.median(run["flop_rate"] for run in there) * 1e3
        full = [run for run in cells.get((*case, FULL), []) if "absent" not in run]
        if full:
            of_same = [run for run in full if run.get("commit") == there[0].get("commit")]
            beside = of_same or [run for run in full if run.get("commit") == full[0].get("commit")]
            row["time_ratio"] = row["step_ms"] / _median_ms(beside)
            row["memory_ratio"] = row["peak_rss_bytes"] / max(run["peak_rss_bytes"] for run in beside)
        rows.append(row)
    return rows


def _median_ms(runs: list[dict[str, Any]]) -> float:
    return statistics.median(statistics.median(run["step_ms"]) for run in runs)


def _case(run: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(run[name] for name in ("recipe", "size", "batch", "threads"))


def exponents(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How our step's time grows with images, and with pixels: the exponent of a power law fitted to its cases."""
    import numpy as np

    rows = [row for row in summary(runs) if row["rival"] == OURS]
    found = []
    for axis, measure in (("batch", lambda row: row["batch"]), ("size", lambda row: row["size"] ** 2)):
        others = [name for name in ("recipe", "size", "batch", "threads") if name != axis]
        series: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for row in rows:
            series.setdefault(tuple(row[name] for name in others), []).append(row)
        for of_series in series.values():
            if len(of_series) > 1:
                x, y = (np.log([get(row) for row in of_series]) for get in (measure, lambda row: row["step_ms"]))
                fixed = {name: of_series[0][name] for name in others}
                found.append({**fixed, "axis": axis, "exponent": float(np.polyfit(x, y, 1)[0])})
    return found


def _show(found: dict[str, Any]) -> None:
    table = [
        ("network", "px", "images", "threads", "", "step, ms", "/ torch", "of the bound", "peak RSS, MiB", "/ torch")
    ]
    for row in found["cases"]:
        case = (row["recipe"], *(str(row[name]) for name in ("size", "batch", "threads")), row["rival"])
        if "absent" in row:
            table.append((*case, "", "", "", row["absent"], ""))
            continue
        time_ratio, memory_ratio = (
            f"{row[name]:.3f}" if name in row else "" for name in ("time_ratio", "memory_ratio")
        )
        share = f"{row['bound_ms'] / row['step_ms']:.0%}" if "bound_ms" in row else ""
        table.append(
            (*case, f"{row['step_ms']:.0f}", time_ratio, share, f"{row['peak_rss_bytes'] / MIB:.0f}", memory_ratio)
        )
    print_table(table)
    for row in found["exponents"]:
        per = "images" if row["axis"] == "batch" else "pixels"
        print(f"{row['recipe']}, {row['threads']} thread(s): time grows as {per} to the power of {row['exponent']:.2f}")


def _line(run: dict[str, Any]) -> str:
    cost = run.get("absent") or f"{statistics.median(run['step_ms']):.0f} ms, {run['peak_rss_bytes'] / MIB:.0f} MiB"
    return (
        f"{run['recipe']}, {run['size']} px, {run['batch']} images, {run['threads']} thread(s), {run['rival']}: {cost}"
    )


if __name__ == "__main__":
    sys.exit(main())
