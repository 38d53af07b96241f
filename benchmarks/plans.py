"""What does memory that is saved cost in time?

    python benchmarks/plans.py

Optimizer steps of 8 images at 224 px, one thread, of several networks: as they are planned where memory is plenty, and
where the budget is one byte less than that takes, so that most of the forward pass is computed twice. Every figure is
of a process of its own; the two plans alternate.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from typing import Any

from measure import Record, add_output, backbone, optimizer_steps, output, print_table

# Not ResNet-50: most memory, as planned, is taken when its 13 million masks are packed, so no other plan is smaller.
RECIPES = ("mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "resnet18")
SIZE, BATCH = 224, 8
FASTEST, SMALLEST = "fastest", "forward computed twice"
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
                fastest = optimizer_steps(path, options.steps, BATCH)
                tight = optimizer_steps(path, options.steps, BATCH, fastest["expected_peak_bytes"] - 1)
                for plan, found in ((FASTEST, fastest), (SMALLEST, tight)):
                    record.runs.append({"recipe": recipe, "plan": plan, "repeat": repeat, **found})
    record.summary = summary(record.runs)
    _show(record.summary)
    record.finish(output(options, "plans"))
    return 0


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
