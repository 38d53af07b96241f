"""What does a kilobyte of task pack buy, beside the other ways to keep a task?

    python benchmarks/pareto.py                               # MobileNetV2 at 96 px: hours; goes on where it stopped
    python benchmarks/pareto.py --recipe resnet20_cifar10
    python benchmarks/pareto.py --plot                        # docs/pareto.svg and .png from what is there

Every method learns from the same images in the same order with the same augmentation, for the same number of optimizer
steps, and the best epoch is taken on the same validation split. The test set is read once, for the figure. Rivals that
need torch run in `rivals.py`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grid
from measure import (
    KSM_EDGE,
    RESULTS,
    ROOT,
    add_backbone,
    backbone,
    condition,
    disturbance,
    fresh_json,
    machine,
    print_table,
)

if TYPE_CHECKING:
    from ksm_edge.bundle.layers import Bundle
    from ksm_edge.training.settings import Settings

SIZES = {"mobilenet_v2": 96, "resnet20_cifar10": 32}
TASKS = ("trashnet", "pacs_sketch7", "gtsrb43")
# Of each method and backbone the runs that are like the last one in all but task and seed.
STANDING = grid.latest(
    lambda run: (run["identity"]["method"], run["identity"]["recipe"]),
    lambda run: (
        {name: value for name, value in run["identity"].items() if name not in ("task", "data_digest", "seed")},
        run.get("rate"),
    ),
)
QUESTION = __doc__.split("\n")[0]
RIVALS = Path(__file__).with_name("rivals.py")


@dataclass(frozen=True)
class Method:
    """One way to learn a task and keep it."""

    title: str
    words: Callable[[Bundle], tuple[str, ...]] | None  # options of `ksm-edge adapt`; None: it runs in `rivals.py`
    ours: bool = False


def _always(*words: str) -> Callable[[Bundle], tuple[str, ...]]:
    return lambda bundle: words


METHODS = {
    "ksm": Method("KSM, default", _always(), ours=True),
    "small": Method("KSM, --small", _always("--small"), ours=True),
    "whole": Method("KSM, --thin 0", _always("--thin", "0"), ours=True),
    "penalty": Method("KSM, --cut-penalty 0.05 --thin 0", _always("--cut-penalty", "0.05", "--thin", "0"), ours=True),
    "group4": Method("KSM, group:4", _always("--granularity", "group:4"), ours=True),
    "late": Method("KSM, masks in the second half", lambda bundle: ("--masked", _second_half(bundle)), ours=True),
    "norm": Method("batch-norm + head", _always("--method", "norm"), ours=True),
    "head": Method("head only", _always("--method", "head"), ours=True),
    "piggyback": Method(
        "binary masks as Piggyback's, 1 bit per weight",
        _always("--granularity", "element", "--binary", "--norm-rate", "0", "--thin", "0", "--head-bits", "8"),
    ),
    "full": Method("full fine-tuning, fp16", None),
    "lora:4": Method("conv LoRA rank 4, fp16", None),
    "lora:8": Method("conv LoRA rank 8, fp16", None),
}


COLOURS = (*(f"C{number}" for number in range(10)), "black", "gold")


def _second_half(bundle: Bundle) -> str:
    return f"{bundle.layers[len(bundle.layers) // 2].name}.."


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_backbone(parser)
    parser.add_argument("--recipe", choices=tuple(SIZES), default="mobilenet_v2", help="(default: mobilenet_v2)")
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS), metavar="METHOD",
                        help=f"of {', '.join(METHODS)} (default: all)")  # fmt: skip
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help="of the data folder (default: %(default)s)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="(default: 0)")
    parser.add_argument("--plot", action="store_true", help="measure nothing: draw what is there")
    parser.add_argument("--out", type=Path, default=RESULTS / "pareto.json", help="(default: results/pareto.json)")
    return parser


def main() -> int:
    options = arguments().parse_args()
    if options.plot:
        plot(summary(STANDING(grid.runs(options.out))), ROOT / "docs" / "pareto")
        return 0
    paths = [grid.task_data(task) for task in options.tasks]
    with backbone(options.bundle, SIZES[options.recipe], random=False, recipe=options.recipe) as bundle:
        for seed in options.seeds:
            for method in options.methods:
                for data in paths:
                    _run(options.out, method, data, bundle, seed)
    _show(summary(STANDING(grid.runs(options.out))))
    print(f"\nraw values: {options.out}")
    return 0


def _run(out: Path, name: str, data: Path, bundle_path: Path, seed: int) -> None:
    """One training, kept in the file; none where that is there."""
    from ksm_edge.bundle.load import load_bundle
    from ksm_edge.data.image_set import open_image_set
    from ksm_edge.training.settings import Settings

    bundle, images, settings = load_bundle(bundle_path), open_image_set(data), Settings(seed=seed)
    words = METHODS[name].words
    given = list(words(bundle)) if words else []
    identity: dict[str, Any] = {
        "method": name,
        "words": given,
        "task": images.name,
        "data_digest": images.digest(),
        "recipe": bundle.recipe,
        "backbone_digest": bundle.digest,
        "size": bundle.input.size,
        "seed": seed,
        "epochs": settings.epochs,
        "batch": settings.batch,
    }
    if words:
        identity["settings"] = _settings(given, settings)
    if grid.has(out, identity):
        print(f"{bundle.recipe}, {name}, {images.name}, seed {seed}: there already", file=sys.stderr)
        return
    print(f"{bundle.recipe}, {name}, {images.name}, seed {seed} ...", file=sys.stderr)
    before = condition()
    common = ["--bundle", str(bundle_path), "--seed", str(seed), "--batch", str(settings.batch)]
    common += ["--epochs", str(settings.epochs)]
    if words:
        found = _device(data, common, given)
    else:
        found = fresh_json([sys.executable, str(RIVALS), name, str(data), *common])
    kept = ("test_accuracy", "validation_accuracy", "best_epoch", "steps", "pack_bytes", "rate", "history")
    run = {"identity": identity, **{key: found[key] for key in kept if key in found}}
    if name == "piggyback":  # as it is published: a bit for every weight; and the head of the pack
        weights = sum(w.weight.size for w in bundle.weights.values())
        run["coded_bytes"] = run["pack_bytes"]
        run["pack_bytes"] = weights // 8 + len(images.classes) * (bundle.features + 4)
    run |= {"machine": machine(), "before": before, "after": condition()}
    run["warnings"] = disturbance(before) + disturbance(run["after"])
    grid.keep(out, {"benchmark": "pareto", "question": QUESTION}, run, summary, STANDING)
    print(f"{run['test_accuracy']:.2%} on test, {run['pack_bytes'] / 1e3:.1f} kB", file=sys.stderr)


def _settings(words: list[str], settings: Settings) -> dict[str, Any]:
    """What `ksm-edge adapt` makes of these options, the seed aside."""
    from ksm_edge.cli.adapt import settings_of
    from ksm_edge.cli.main import build_parser
    from ksm_edge.device import Device

    common = ["--epochs", str(settings.epochs), "--batch", str(settings.batch)]
    args = build_parser().parse_args(["adapt", "DATA", *common, *words])
    return {name: value for name, value in asdict(settings_of(args, Device.load("host"))).items() if name != "seed"}


def _device(data: Path, common: list[str], words: list[str]) -> dict[str, Any]:
    """Learned and judged by this project's own commands."""
    bundle = common[:2]
    with tempfile.TemporaryDirectory(prefix="ksm-edge-pareto-") as folder:
        pack = Path(folder, "task.ksm")
        adapt = [*KSM_EDGE, "adapt", str(data), "--out", str(pack), "--threads", "1", *common, *words, "--json"]
        learned = fresh_json(adapt)
        judged = fresh_json([*KSM_EDGE, "eval", str(pack), str(data), *bundle, "--threads", "1", "--json"])
    return {**learned, "test_accuracy": judged["accuracy"]}


def summary(runs: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """For each backbone, task and method the means over its seeds."""
    cells: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for run in runs:
        identity = run["identity"]
        cells.setdefault((identity["recipe"], identity["task"], identity["method"]), []).append(run)
    result: dict[str, Any] = {}
    for (recipe, task, method), of_cell in cells.items():
        row = {"seeds": sorted(run["identity"]["seed"] for run in of_cell)}
        for key in ("test_accuracy", "validation_accuracy", "pack_bytes"):
            row[key] = statistics.fmean(run[key] for run in of_cell)
        if "coded_bytes" in of_cell[0]:
            row["coded_bytes"] = statistics.fmean(run["coded_bytes"] for run in of_cell)
        result.setdefault(recipe, {}).setdefault(task, {})[method] = row
    return result


def _show(result: dict[str, Any]) -> None:
    for recipe, tasks in result.items():
        lines = [(recipe, *(f"{task}, %" for task in tasks), *(f"{task}, kB" for task in tasks))]
        for name, method in METHODS.items():
            rows = [tasks[task].get(name) for task in tasks]
            if any(rows):
                test = ("" if row is None else f"{100 * row['test_accuracy']:.1f}" for row in rows)
                size = ("" if row is None else f"{row['pack_bytes'] / 1e3:.1f}" for row in rows)
                lines.append((method.title, *test, *size))
        print_table(lines)
        print()


def plot(result: dict[str, Any], path: Path) -> None:
    """One panel for each backbone and task: test accuracy against bytes kept for the task."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("--plot needs the package matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "ksm_edge"  # the same file for the same figures
    from matplotlib import pyplot

    tasks = sorted({task for of_recipe in result.values() for task in of_recipe})
    size = 4.2 * len(tasks), 3.4 * len(result)
    figure, axes = pyplot.subplots(len(result), len(tasks), figsize=size, squeeze=False, sharex="row")
    for row, (recipe, of_recipe) in zip(axes, result.items(), strict=True):
        for axis, task in zip(row, tasks, strict=True):
            _panel(axis, of_recipe.get(task, {}), f"{recipe}, {SIZES[recipe]} px: {task}")
    shown = {
        label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    titles = [method.title for method in METHODS.values() if method.title in shown]
    figure.legend([shown[title] for title in titles], titles, loc="lower center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0.06 + 0.04 / len(result), 1, 1))
    for suffix in (".svg", ".png"):
        figure.savefig(path.with_suffix(suffix), dpi=110, metadata={"Date": None} if suffix == ".svg" else None)
        print(path.with_suffix(suffix))


def _panel(axis: Any, rows: Mapping[str, Any], title: str) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    for (name, method), colour in zip(METHODS.items(), COLOURS, strict=True):
        if name in rows:
            point = [rows[name]["pack_bytes"] / 1e3], [100 * rows[name]["test_accuracy"]]
            marker = "o" if method.ours else "s"
            axis.plot(*point, linestyle="", markersize=7, label=method.title, color=colour, marker=marker)
    axis.set(title=title, xscale="log", xlabel="kB kept for the task", ylabel="test accuracy, %")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.tick_params(labelbottom=True)
    axis.grid(alpha=0.3)


if __name__ == "__main__":
    sys.exit(grid.resumable(main))
