"""What does one optimizer step cost beside every other way to adapt a backbone?

    python benchmarks/adaptation.py                       # MobileNetV2 and the ResNets at 224 px, 8 images, one thread
    python benchmarks/adaptation.py --recipes mobilenet_v2 --sizes 96 160 224 --batches 1 8 32 --threads 1 2

Every figure comes from a process of its own, rivals alternating, the same images at every step: a loss that does not
fall means that something else was timed than learning. Weights are random where the data folder has none, which costs
the same. Beside it the arithmetic bound: the operations of forward and backward pass at the speed of a large matrix
product of numpy, which no exact gradient of every layer can be faster than unless it does less arithmetic.

Rivals in torch: full fine-tuning as torchvision and eager torch have it; the same in the channels-last layout; KSM
written as the paper has it, every conv masked, with the batch's statistics; and KSM with frozen statistics in the
channels-last layout, compiled where a compiler is found.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

from measure import Record, add_output, backbone, fresh_json, output, print_table, share_warning
from step import falls, timed

RECIPES = ("mobilenet_v2", "mobilenet_v3_large", "resnet18", "resnet50", "efficientnet_b0")
CLASSES, RATE = 10, 1e-4
OURS, SMALLEST, FULL = "ksm_edge", "ksm_edge, least memory", "torch, full fine-tuning"
MIB = 1 << 20


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=["mobilenet_v2", "resnet18", "resnet50"],
                        help="(default: %(default)s)")  # fmt: skip
    for name, default, what in (("sizes", 224, "pixels"), ("batches", 8, "images a step"), ("threads", 1, "threads")):
        parser.add_argument(f"--{name}", nargs="+", type=int, default=[default], help=f"{what} (default: {default})")
    parser.add_argument("--rivals", nargs="+", choices=RIVALS, default=list(RIVALS), help="(default: all)")
    parser.add_argument("--repeats", type=int, default=3, help="processes for each rival (default: 3)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps in each process (default: 5)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    add_output(parser)
    return parser


def main() -> int:
    options = arguments().parse_args()
    if options.child:
        given = json.loads(options.child)
        print(json.dumps(RIVALS[given["rival"]](given)))
        return 0
    if options.quick:
        options.repeats, options.steps, options.recipes = 1, 3, options.recipes[:1]
    record = Record("adaptation", __doc__.split("\n")[0], {"repeats": options.repeats, "steps": options.steps})
    for recipe, size in product(options.recipes, options.sizes):
        with backbone(None, size, recipe=recipe) as bundle:
            for batch, threads in product(options.batches, options.threads):
                case = {"recipe": recipe, "size": size, "batch": batch, "threads": threads}
                for run in _runs(case, bundle, options):
                    record.runs.append(run)
                    print(_line(run), file=sys.stderr)
    record.summary = {"cases": summary(record.runs), "exponents": exponents(record.runs)}
    _show(record.summary)
    for name in options.rivals:
        of_rival = [run for run in record.runs if run["rival"] == name and "cpu_share" in run and run["threads"] == 1]
        record.warn(share_warning(name, [run["cpu_share"] for run in of_rival]))
    record.finish(output(options, "adaptation"))
    wrong = [run for run in record.runs if "losses" in run and not falls(run["losses"])]
    for run in wrong:
        print(f"WRONG ANSWER: the loss does not fall: {_line(run)}", file=sys.stderr)
    return 1 if wrong else 0


def _runs(case: dict[str, Any], bundle: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    bound = _bound(bundle, case)
    for repeat in range(options.repeats):
        for rival in options.rivals if repeat % 2 == 0 else reversed(options.rivals):
            given = {**case, "rival": rival, "bundle": str(bundle), "steps": options.steps}
            found = fresh_json([sys.executable, __file__, "--child", json.dumps(given)], case["threads"])
            yield {**case, "rival": rival, "repeat": repeat, "bound_flops": bound, **found}


def _bound(bundle: Path, case: dict[str, Any]) -> float:
    """Operations of a step: forward, the gradient of every weight, and of every input but the image."""
    from ksm_edge.bundle.load import load_bundle
    from ksm_edge.profiler.work import graph_work

    work = graph_work(load_bundle(bundle).graph_path, case["size"])
    stem = next(part.flops for part in work if part.operator == "Conv")
    return case["batch"] * (3 * sum(part.flops for part in work) - stem)


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each case and rival the medians over processes, beside full fine-tuning in torch and the arithmetic bound."""
    cells: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in runs:
        cells.setdefault((*_case(run), run["rival"]), []).append(run)
    rows = []
    for (recipe, size, batch, threads, rival), of_cell in cells.items():
        row = {"recipe": recipe, "size": size, "batch": batch, "threads": threads, "rival": rival}
        there = [run for run in of_cell if "absent" not in run]
        if not there:
            rows.append({**row, "absent": of_cell[0]["absent"]})
            continue
        row["step_ms"] = statistics.median(statistics.median(run["step_ms"]) for run in there)
        row["peak_rss_bytes"] = max(run["peak_rss_bytes"] for run in there)
        row["bound_ms"] = there[0]["bound_flops"] / statistics.median(run["flop_rate"] for run in there) * 1e3
        rows.append(row)
    full = {_case(row): row for row in rows if row["rival"] == FULL and "absent" not in row}
    for row in rows:
        if "step_ms" in row and (beside := full.get(_case(row))):
            row["time_ratio"] = row["step_ms"] / beside["step_ms"]
            row["memory_ratio"] = row["peak_rss_bytes"] / beside["peak_rss_bytes"]
    return rows


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
        share = f"{row['bound_ms'] / row['step_ms']:.0%}"
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


# Each rival, in a process of its own


def _flop_rate() -> float:
    """Of a large matrix product in numpy, the best of a few."""
    import numpy as np

    side = 1024
    a, b = (np.random.default_rng(seed).standard_normal((side, side), np.float32) for seed in (0, 1))
    best = float("inf")
    for _ in range(8):
        began = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best


def _ours(given: dict[str, Any], *, smallest: bool = False) -> dict[str, Any]:
    import numpy as np

    from ksm_edge.bundle.load import load_bundle
    from ksm_edge.errors import BudgetError
    from ksm_edge.resident import use_compact_heap
    from ksm_edge.training.planner import make_plan
    from ksm_edge.training.settings import Settings
    from ksm_edge.training.targets import target_rows
    from ksm_edge.training.trainer import Trainer

    use_compact_heap()
    settings = Settings(batch=given["batch"], score_rate=RATE, norm_rate=RATE, head_rate=RATE)
    bundle, budget = load_bundle(given["bundle"]), None
    if smallest:
        try:
            make_plan(bundle, CLASSES, settings, threads=given["threads"], budget_bytes=1)
        except BudgetError as error:
            budget = error.needed_bytes
    plan = make_plan(bundle, CLASSES, settings, threads=given["threads"], budget_bytes=budget)
    trainer = Trainer(bundle, plan.graph, plan.settings, steps=given["steps"] + 5, threads=given["threads"])
    side = bundle.input.size
    images = np.random.default_rng(0).standard_normal((given["batch"], 3, side, side), np.float32)
    targets = target_rows(np.arange(given["batch"]) % CLASSES, CLASSES, 0.0)
    found = timed(lambda: float(trainer.step(images, targets).loss), given["steps"])
    return {**found, "expected_peak_bytes": plan.expected_peak_bytes, "flop_rate": _flop_rate()}


def _in_torch(make: Callable[[Any, dict[str, Any]], Any], *, channels_last: bool) -> Callable[[dict[str, Any]], Any]:
    def measured(given: dict[str, Any]) -> dict[str, Any]:
        try:
            import torch

            network = make(torch, given)
        except ImportError as error:
            return {"absent": str(error)}
        torch.set_num_threads(given["threads"])
        torch.manual_seed(0)
        images, labels = torch.randn(given["batch"], 3, given["size"], given["size"]), torch.arange(given["batch"])
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
            network = network.to(memory_format=torch.channels_last)
        adam = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], RATE)

        def step() -> float:
            adam.zero_grad()
            loss = torch.nn.functional.cross_entropy(network(images), labels % CLASSES)
            loss.backward()
            adam.step()
            return float(loss)

        return {**timed(step, given["steps"]), "flop_rate": _flop_rate()}

    return measured


def _full(torch: Any, given: dict[str, Any]) -> Any:
    from ksm_edge.exporter.torchvision_shim import import_torchvision

    return getattr(import_torchvision().models, given["recipe"])(num_classes=CLASSES).train()


def _masked(torch: Any, given: dict[str, Any]) -> Any:
    import rivals

    from ksm_edge.bundle.load import load_bundle

    return rivals.with_masks(rivals.Network(load_bundle(given["bundle"]), CLASSES)).train()


def _masked_frozen(torch: Any, given: dict[str, Any]) -> Any:
    network = torch.compile(_masked(torch, given).eval())
    try:
        network(torch.zeros(1, 3, given["size"], given["size"]))
    except Exception as error:  # whatever keeps torch from compiling: most often that there is no compiler
        raise ImportError(f"torch.compile: {str(error).splitlines()[0]}") from error
    return network


RIVALS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    OURS: _ours,
    SMALLEST: lambda given: _ours(given, smallest=True),
    FULL: _in_torch(_full, channels_last=False),
    "torch, full fine-tuning, channels-last": _in_torch(_full, channels_last=True),
    "torch, KSM as the paper writes it": _in_torch(_masked, channels_last=False),
    "torch, KSM, frozen statistics, channels-last, compiled": _in_torch(_masked_frozen, channels_last=True),
}

if __name__ == "__main__":
    sys.exit(main())
