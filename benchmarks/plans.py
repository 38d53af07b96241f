"""What does memory that is saved cost in time?

    python benchmarks/plans.py

Optimizer steps of 8 images at 224 px, one thread, of several networks: as they are planned where memory is plenty, and
then for a budget of one byte less than the plan before takes, until there is none. Every figure is of a process of its
own; the plans alternate.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from measure import Record, add_output, backbone, optimizer_steps, output, print_table

RECIPES = ("mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "resnet18")
SIZE, BATCH = 224, 8
FASTEST = "fastest"
MIB = 1 << 20


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), help="(default: all)")
    parser.add_argument("--repeats", type=int, default=3, help="processes for each plan (default: 3)")
    parser.add_argument("--steps", type=int, default=6, help="timed steps in each process (default: 6)")
    add_output(parser)
    return parser


def main() -> int:
    options = arguments().parse_args()
    if options.quick:
        options.repeats, options.steps, options.recipes = 1, 3, options.recipes[:2]
    settings = {"size": SIZE, "batch": BATCH, "threads": 1, "repeats": options.repeats, "steps": options.steps}
    record = Record("plans", __doc__.split("\n")[0], settings)
    for recipe in options.recipes:
        with backbone(None, SIZE, recipe=recipe) as path:
            for repeat in range(options.repeats):
                for budget in _budgets(path):
                    found = optimizer_steps(path, options.steps, BATCH, budget)
                    record.runs.append({"recipe": recipe, "plan": _name(found), "repeat": repeat, **found})
    record.summary = summary(record.runs)
    _show(record.summary)
    record.finish(output(options, "plans"))
    return 0


def _budgets(path: Path) -> list[int | None]:
    """None, and then ever less, each just too little for the plan before."""
    from ksm_edge.bundle.load import load_bundle
    from ksm_edge.errors import BudgetError
    from ksm_edge.training.planner import make_plan
    from ksm_edge.training.settings import Settings

    bundle, budgets = load_bundle(path), list[int | None]([None])
    with suppress(BudgetError):
        while True:
            plan = make_plan(bundle, 10, Settings(batch=BATCH), threads=1, budget_bytes=budgets[-1])
            budgets.append(plan.expected_peak_bytes - 1)
    return budgets[:-1]


def _name(found: dict[str, Any]) -> str:
    """What the planner did to save memory."""
    names = {
        "slower forms": not found["fast"] and not found["inside"],
        "k x k weights made when needed": found["inside"],
        "forward computed twice": found["recompute"],
        "moments in 8 bits": found["moment_bits"] == 8,
    }
    return ", ".join(name for name, is_so in names.items() if is_so) or FASTEST


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over processes, and each plan against the fastest of the same network."""
    rows: dict[str, Any] = {}
    for run in runs:
        rows.setdefault(run["recipe"], {}).setdefault(run["plan"], []).append(run)
    for plans in rows.values():
        for plan, of_plan in plans.items():
            plans[plan] = {
                "step_ms": statistics.median(map(_step_ms, of_plan)),
                "peak_rss_bytes": max(run["peak_rss_bytes"] for run in of_plan),
                "activation_bytes": of_plan[0]["activation_bytes"],
            }
        for row in plans.values():
            row["time_ratio"] = row["step_ms"] / plans[FASTEST]["step_ms"]
            row["saved_bytes"] = plans[FASTEST]["peak_rss_bytes"] - row["peak_rss_bytes"]
    return rows


def _step_ms(run: dict[str, Any]) -> float:
    return sum(statistics.median(run[f"{part}_ms"]) for part in ("gradient", "update"))


def _show(rows: dict[str, Any]) -> None:
    table = [("network", "plan", "step, ms", "peak RSS, MiB", "activations, MiB", "time / fastest")]
    for recipe, plans in rows.items():
        for plan, row in plans.items():
            sizes = (f"{row[name] / MIB:.0f}" for name in ("peak_rss_bytes", "activation_bytes"))
            table.append((recipe, plan, f"{row['step_ms']:.0f}", *sizes, f"{row['time_ratio']:.2f}"))
    print_table(table)


if __name__ == "__main__":
    sys.exit(main())
