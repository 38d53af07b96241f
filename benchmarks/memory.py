"""Does an adaptation take the memory that its plan expects?

    python benchmarks/memory.py
    python benchmarks/memory.py --recipes resnet18 resnet50 --add

Every recipe, several batches and ways to adapt, each a whole `ksm-edge adapt` of two epochs on generated photos in a
process of its own that compiles its graphs first, as on a new board, under an enforced limit: what the plan expects.
Where that stops it, the plan was wrong. Two epochs hardly move a mask, so adaptations with kernel-wise masks go on from
a pack in which as many kernels leave 1 as the plan reckons with.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measure import KSM_EDGE, Record, add_output, backbone, output, print_table, random_pack, read

if TYPE_CHECKING:
    from ksm_edge.bundle.layers import Bundle
    from ksm_edge.training.settings import Settings

RECIPES = (
    "mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small", "efficientnet_b0", "efficientnet_lite0",
    "squeezenet1_1", "resnet18", "resnet50", "resnet20_cifar10", "vgg16_bn",
)  # fmt: skip
CLASSES, IMAGES = 6, 14
SMALLEST = "smallest"  # in place of a budget: the smallest that the planner agrees to
# Recipe, pixels (0: the recipe's own) and options.
CASES: list[tuple[str, int, tuple[str, ...]]] = [
    *((recipe, 0, ("--batch", str(batch))) for recipe in RECIPES[:-1] for batch in (1, 8, 32)),
    ("vgg16_bn", 0, ("--batch", "8")),  # takes longer than all others together
    *(("mobilenet_v2", size, ("--batch", "16")) for size in (96, 160)),
    ("mobilenet_v2", 0, ("--method", "norm")),
    ("mobilenet_v2", 0, ("--method", "head")),
    ("mobilenet_v2", 0, ("--layers", "features.11.conv.0.0..")),
    # Layers in front that run apart from the rest.
    ("mobilenet_v2", 0, ("--fast",)),
    ("mobilenet_v2", 0, ("--fast", "--threads", "4")),
    *((recipe, 0, ("--method", "head", "--views", "1")) for recipe in ("mobilenet_v2", "resnet18", "resnet50")),
    ("resnet18", 0, ("--fast",)),
    # Judged in images that are larger than those of training.
    *(
        (recipe, 0, ("--train-scale", scale, "--whole-at", "1"))
        for recipe in ("mobilenet_v2", "resnet18")
        for scale in ("0.7", "0.3")
    ),
    ("mobilenet_v2", 0, ("--fast", "--train-scale", "0.7", "--whole-at", "1")),
    # The second epoch in whole images.
    *((recipe, 0, ("--train-scale", "0.5")) for recipe in ("mobilenet_v2", "resnet18")),
    ("mobilenet_v2", 0, ("--train-scale", "0.5", "--threads", "4")),
    ("mobilenet_v2", 0, ("--fast", "--train-scale", "0.5")),
    ("resnet20_cifar10", 0, ("--batch", "1", "--train-scale", "0.75", "--whole-at", "1")),
    # The features of one image are 21 times as large.
    ("vgg16_bn", 0, ("--batch", "4", "--layers", "features.3..", "--views", "1")),
    ("mobilenet_v2", 0, ("--granularity", "element")),
    ("mobilenet_v2", 96, ("--statistics", "batch", "--batch", "8")),
    # Activations in half precision.
    *((r, 0, ("--activation-bits", "16")) for r in ("mobilenet_v2", "efficientnet_b0", "resnet18", "resnet50")),
    ("mobilenet_v2", 0, ("--activation-bits", "16", "--threads", "4")),
    ("mobilenet_v2", 96, ("--activation-bits", "16", "--statistics", "batch", "--batch", "8")),
    ("efficientnet_b0", 0, ("--activation-bits", "16", "--threads", "4")),
    ("resnet50", 0, ("--activation-bits", "16", "--threads", "4")),
    # Products in half precision, where the processor has them.
    *(("mobilenet_v2", 0, ("--product-bits", "16", "--threads", threads)) for threads in ("1", "2", "4")),
    *((recipe, 0, ("--product-bits", "16")) for recipe in ("mobilenet_v3_large", "resnet50")),
    # Each thread with micro-batches of its own, on however many cores.
    *((recipe, 0, ("--threads", "2")) for recipe in ("mobilenet_v2", "resnet18", "resnet20_cifar10")),
    ("efficientnet_b0", 0, ("--threads", "2")),
    *((recipe, 0, ("--threads", "4")) for recipe in ("mobilenet_v2", "resnet50")),
    ("mobilenet_v2", 96, ("--threads", "4")),
    ("mobilenet_v2", 0, ("--threads", "4", "--memory-budget", "256MiB")),
    # Budgets for which the plan keeps weights once, makes them when they are needed, computes most of the forward pass
    # twice, or has moments in 8 bits.
    *((recipe, 0, ("--memory-budget", budget)) for recipe, budget in (("resnet18", "240MiB"), ("resnet50", "450MiB"))),
    *(
        (recipe, 0, ("--memory-budget", SMALLEST))
        for recipe in ("mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "resnet18", "resnet50")
    ),
]
MIB = 1 << 20


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), help="(default: all)")
    parser.add_argument("--add", action="store_true", help="keep what the file has of other recipes")
    add_output(parser)
    return parser


def main() -> int:
    options = arguments().parse_args()
    cases = [case for case in CASES if case[0] in options.recipes]
    if options.quick:
        cases = [case for case in cases if case[0] in ("mobilenet_v3_small", "resnet20_cifar10")]
    out = output(options, "memory")
    record = Record("memory", __doc__.split("\n")[0], {"classes": CLASSES, "images": CLASSES * IMAGES})
    if options.add and out is not None and out.exists():
        before, again = read(out), {case[0] for case in cases}
        of_before = {"commit": before["machine"].get("commit")}
        record.runs = [{**of_before, **run} for run in before["runs"] if run["recipe"] not in again]
        record.warnings += before["warnings"]
    with tempfile.TemporaryDirectory(prefix="ksm-edge-") as folder:
        from ksm_edge.profiler.child import write_photos

        photos = Path(folder, "photos")
        photos.mkdir()
        write_photos(photos, CLASSES, IMAGES)
        for recipe, size in dict.fromkeys(case[:2] for case in cases):
            with backbone(None, size or _size(recipe), recipe=recipe) as bundle:
                for case in cases:
                    if case[:2] == (recipe, size):
                        run = _run(bundle, photos, Path(folder), case[2])
                        print(_line(run), file=sys.stderr)
                        record.runs.append({**run, "commit": record.machine.get("commit")})
                        record.runs.sort(key=lambda run: RECIPES.index(run["recipe"]))
                        record.summary = summary(record.runs)
                        record.save(out)
    print_table([("recipe", "pixels", "options", "expected, MiB", "measured, MiB", "ratio"), *map(_row, record.runs)])
    found = record.summary
    print(
        f"\nexpected / measured: {found['least']:.3f} to {found['most']:.3f}; stopped by the limit: {found['exceeded']}"
    )
    record.finish(out)
    return 0


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """How near the plan is, and on which side."""
    ratios = [run["expected_bytes"] / run["peak_rss_bytes"] for run in runs]
    return {"least": min(ratios), "most": max(ratios), "exceeded": sum(run["exceeded"] for run in runs)}


def _size(recipe: str) -> int:
    from ksm_edge.bundle.recipe import load_recipe

    return load_recipe(recipe).input.size


def _run(path: Path, photos: Path, folder: Path, given: tuple[str, ...]) -> dict[str, Any]:
    """One adaptation under the limit that its plan expects."""
    from ksm_edge.bundle.load import load_bundle

    bundle = load_bundle(path)
    words = ["adapt", str(photos), "--bundle", str(path), "--out", str(folder / "task.ksm"),
             "--epochs", "2", "--threads", "1", "--json", *given]  # fmt: skip
    settings, budget, threads = _asked(words)
    expected = _expected(bundle, settings, budget, threads, smallest=SMALLEST in words)
    apart = _apart(bundle, settings)
    if apart is not None:
        words += ["--from", str(_pack(bundle, settings, apart, photos, folder / "from.ksm"))]
    command = [*KSM_EDGE, *(str(expected) if word == SMALLEST else word for word in words)]
    # A process of its own holds the limit, so that what it prints can be read.
    code = (
        "import json, sys; from ksm_edge.limits import run_limited; "
        "found = run_limited(sys.argv[2:], int(sys.argv[1])); print(json.dumps(vars(found)))"
    )
    limited = [sys.executable, "-c", code, str(expected), *command]
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        environment = {**os.environ, "KSM_EDGE_CACHE": cache}
        done = subprocess.run(limited, env=environment, capture_output=True, text=True, check=True)
    *report, outcome = map(json.loads, done.stdout.splitlines())
    if outcome["exit_status"] and not outcome["exceeded"]:
        raise SystemExit(f"exit status {outcome['exit_status']} from {' '.join(command)}\n{done.stderr}")
    peak = max(outcome["peak_rss_bytes"], *(found["peak_rss_bytes"] for found in report), 0)
    return {
        "recipe": bundle.recipe,
        "size": bundle.input.size,
        "options": list(given),
        "apart": apart,
        "expected_bytes": expected,
        "peak_rss_bytes": peak,
        "exceeded": outcome["exceeded"],
        "enforced": outcome["enforced"],
        "exit_status": outcome["exit_status"],
    }


def _asked(words: list[str]) -> tuple[Settings, int | None, int]:
    """Settings, budget and threads of that command."""
    from ksm_edge.cli.adapt import budget_of
    from ksm_edge.cli.adapt_options import settings_of
    from ksm_edge.cli.main import build_parser
    from ksm_edge.device import this_machine

    args = build_parser().parse_args(["1MiB" if word == SMALLEST else word for word in words])
    return settings_of(args, this_machine(), CLASSES * IMAGES), budget_of(args, this_machine()), args.threads


def _expected(bundle: Bundle, settings: Settings, budget: int | None, threads: int, *, smallest: bool) -> int:
    """What the planner says; `smallest`: the smallest budget that it agrees to."""
    from ksm_edge.errors import BudgetError
    from ksm_edge.training.planner import make_plan

    try:
        plan = make_plan(bundle, CLASSES, settings, threads=threads, budget_bytes=budget)
    except BudgetError as refused:
        if not smallest or refused.needed_bytes is None:
            raise
        return refused.needed_bytes
    return plan.expected_peak_bytes


def _apart(bundle: Bundle, settings: Settings) -> float | None:
    """The share of kernels that the plan reckons to leave 1; None where no pack can be gone on from."""
    from ksm_edge.training.footprint import apart_share, score_count

    if (settings.method, settings.granularity, settings.statistics) != ("ksm", "kernel", "frozen"):
        return None
    return apart_share(bundle, score_count(bundle, settings), CLASSES, settings)


def _pack(bundle: Bundle, settings: Settings, apart: float, photos: Path, out: Path) -> Path:
    """A pack of these classes of which that share leaves 1."""
    from ksm_edge.pack.files import save_pack
    from ksm_edge.training.footprint import score_count
    from ksm_edge.training.suited import amplifies
    from ksm_edge.training.trainer import learning_layers

    _, masked = learning_layers(bundle.layers, settings)
    classes = sorted(folder.name for folder in photos.iterdir())
    amplify = amplifies(bundle, score_count(bundle, settings), CLASSES, settings)
    save_pack(random_pack(bundle, apart, classes, masked=masked, amplify=amplify), out, **settings.pack_bits)
    return out


def _row(run: dict[str, Any]) -> tuple[str, ...]:
    expected, peak = run["expected_bytes"], run["peak_rss_bytes"]
    ratio = f"{expected / peak:.3f}" + (" STOPPED" if run["exceeded"] else "")
    return (
        run["recipe"],
        str(run["size"]),
        " ".join(run["options"]),
        f"{expected / MIB:.0f}",
        f"{peak / MIB:.0f}",
        ratio,
    )


def _line(run: dict[str, Any]) -> str:
    return "  ".join(_row(run))


if __name__ == "__main__":
    sys.exit(main())
