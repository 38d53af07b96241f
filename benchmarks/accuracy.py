"""How accurate is a task, by every way to learn it on the same frozen backbone?

    python benchmarks/accuracy.py                                 # the default settings, five tasks, three seeds: hours
    python benchmarks/accuracy.py --methods linear ksm full --seeds 0
    python benchmarks/accuracy.py --tasks flowers5@10 gtsrb43@10  # ten images a class
    python benchmarks/accuracy.py --show                          # what is there

MobileNetV2 at 160 px. Every method that is trained in steps learns from the same images in the same order with the same
augmentation, and, where its title does not say otherwise, for the same number of optimizer steps. Everything is chosen
on the validation split that `adapt` holds out, until each method has it join; the test set is read once, at the end.
Each run is a process of its own with one thread. Runs are added to the file as they come, and those that are there are
not done again.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grid
from measure import RESULTS, add_backbone, backbone, condition, disturbance, machine, print_table
from methods import ALL, given, identity, learn, outdated, temporary_pack
from tasks import FIVE, task_data

if TYPE_CHECKING:
    from ksm_edge.bundle.layers import Bundle
    from ksm_edge.data.image_set import ImageSet

SIZES = {"mobilenet_v2": 160, "resnet20_cifar10": 32}


def _way(run: Mapping[str, Any]) -> dict[str, Any]:
    """How it was learned; how often each image was shown depends on how many there are, and is left out.

    So is whether kernels are amplified, which follows from how many classes there are.
    """
    given = ("task", "data_digest", "seed", "epochs")
    found = {name: value for name, value in run["identity"].items() if name not in given}
    if "settings" in found:
        found["settings"] = {
            name: value for name, value in found["settings"].items() if name not in ("epochs", "batch", "amplify")
        }
    # Which of its strengths is best, logistic regression chooses for each task.
    return found if found["method"] == "linear" else {**found, "rate": run.get("rate")}


def _where(run: Mapping[str, Any]) -> tuple[Any, ...]:
    """A suite's tasks, `SUITE-NUMBER`, are measured together, apart from others; so are few images, `TASK@NUMBER`."""
    found = run["identity"]
    task, _, images = found["task"].partition("@")
    return (*(found[name] for name in ("method", "recipe", "size")), task.rpartition("-")[0], images)


# Of each method and backbone the runs that are like the last one in all but task and seed.
STANDING = grid.latest(_where, _way, task=lambda run: (_where(run), run["identity"]["task"]))
QUESTION = __doc__.split("\n")[0]
KEPT = ("test_accuracy", "test_images", "validation_accuracy", "judged_epoch", "best_epoch", "steps", "pack_bytes",
        "coded_bytes", "rate", "step_ms_p50", "peak_rss_bytes", "wall_seconds", "history", "skipped")  # fmt: skip
AVERAGED = ("test_accuracy", "validation_accuracy", "pack_bytes", "coded_bytes", "steps", "wall_seconds")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_backbone(parser)
    parser.add_argument("--recipe", choices=tuple(SIZES), default="mobilenet_v2", help="(default: mobilenet_v2)")
    parser.add_argument("--size", type=int, help="pixels; only without --bundle (default: 160, ResNet-20's 32)")
    parser.add_argument("--methods", nargs="+", choices=tuple(ALL), default=["ksm"], metavar="METHOD",
                        help=f"of {', '.join(ALL)} (default: ksm)")  # fmt: skip
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=list(FIVE),
        help="of the data folder; TASK@10: ten images a class; SUITE/3: task 3 of a suite (default: %(default)s)",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument("--fresh", action="store_true", help="do runs again that are in the file")
    parser.add_argument("--show", action="store_true", help="measure nothing: show what is there")
    parser.add_argument("--packs", type=Path, help="folder to keep the packs in (default: they are thrown away)")
    parser.add_argument("--out", type=Path, default=RESULTS / "accuracy.json", help="(default: results/accuracy.json)")
    return parser


def main() -> int:
    options = arguments().parse_args()
    if options.packs and len(options.methods) > 1:
        raise SystemExit("--packs keeps those of one method: give one with --methods")
    if not options.show:
        size = options.size or SIZES[options.recipe]
        with (
            backbone(options.bundle, size, random=False, recipe=options.recipe) as bundle,
            tempfile.TemporaryDirectory(prefix="ksm-edge-tasks-") as folder,
        ):
            for seed in options.seeds:  # one seed of everything first: an interrupted grid then says most
                for method in options.methods:
                    for task in options.tasks:
                        _run(options, method, task_data(task, Path(folder), seed), bundle, seed)
    _show(summary(STANDING(grid.runs(options.out))))
    print(f"\nraw values: {options.out}")
    return 0


def _run(options: argparse.Namespace, method: str, data: Path, bundle_path: Path, seed: int) -> None:
    """One training, kept in the file; none where that is there."""
    from ksm_edge.bundle.load import load_bundle
    from ksm_edge.data.image_set import open_image_set

    bundle, images = load_bundle(bundle_path), open_image_set(data)
    wanted = identity(method, bundle, images, seed)
    what = f"{bundle.recipe}, {bundle.input.size} px, {method}, {images.name}, seed {seed}"
    if not options.fresh and grid.has(options.out, wanted):
        print(f"{what}: there already", file=sys.stderr)
        return
    print(f"{what}: {wanted['epochs']} epochs ...", file=sys.stderr)
    with temporary_pack() as folder:
        packs = options.packs or Path(folder)
        packs.mkdir(parents=True, exist_ok=True)
        run = measured(wanted, bundle, images, data, packs / f"{images.name}-{seed}.ksm")
    keep(options.out, run)
    print(f"{run['test_accuracy']:.2%} on test, {run['pack_bytes'] / 1e3:.1f} kB", file=sys.stderr)


def measured(wanted: dict[str, Any], bundle: Bundle, images: ImageSet, data: Path, pack: Path) -> dict[str, Any]:
    """The run that `wanted` identifies, done now, with the machine's state around it."""
    before = condition()
    found = learn(wanted, bundle, images, data, pack)
    run = {"identity": wanted, **{name: found[name] for name in KEPT if name in found}}
    run |= {"machine": machine(), "before": before, "after": condition()}
    return {**run, "warnings": disturbance(before) + disturbance(run["after"])}


def keep(path: Path, run: dict[str, Any]) -> None:
    """Add a run to the file."""
    grid.keep(path, {"benchmark": "accuracy", "question": QUESTION}, run, summary, STANDING)


def summary(runs: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """For each backbone and size, task and method the figures over its seeds."""
    cells: dict[tuple[str, str, str], dict[int, Mapping[str, Any]]] = {}
    for run in runs:  # of a seed the last
        found = run["identity"]
        cell = backbone_name(found["recipe"], found["size"]), found["task"], found["method"]
        cells.setdefault(cell, {})[found["seed"]] = run
    result: dict[str, Any] = {}
    for (name, task, method), of_cell in cells.items():
        result.setdefault(name, {}).setdefault(task, {})[method] = _row(list(of_cell.values()))
    return result


def backbone_name(recipe: str, size: int) -> str:
    """Under which a summary has its tasks."""
    return f"{recipe}, {size} px"


def _row(runs: list[Mapping[str, Any]]) -> dict[str, Any]:
    test = [run["test_accuracy"] for run in runs]
    row: dict[str, Any] = {"seeds": sorted(run["identity"]["seed"] for run in runs)}
    row["by_seed"] = {str(run["identity"]["seed"]): run["test_accuracy"] for run in runs}
    row["test_accuracy_range"] = [min(test), max(test)]
    for name in AVERAGED:
        if all(name in run for run in runs):
            row[name] = statistics.fmean(run[name] for run in runs)
    row["earlier"] = outdated(runs[0]["identity"])
    row["given"] = given(runs[0]["identity"])
    if all("peak_rss_bytes" in run for run in runs):
        row["peak_rss_bytes"] = max(run["peak_rss_bytes"] for run in runs)
    return row


def _show(result: Mapping[str, Any]) -> None:
    for name, tasks in result.items():
        lines = [(name, *(f"{task}, %" for task in tasks), "pack, kB", "steps", "minutes", "peak RSS, MiB")]
        for key, method in ALL.items():
            rows = [tasks[task].get(key) for task in tasks]
            if any(rows):
                cells = ("" if row is None else _percent(row) for row in rows)
                lines.append((method.title, *cells, *_costs([row for row in rows if row])))
        print_table(lines)
        print()


def _percent(row: Mapping[str, Any]) -> str:
    low, high = (f"{100 * end:.1f}" for end in row["test_accuracy_range"])
    spread = f" ({low} - {high})" if len(row["seeds"]) > 1 else ""
    return f"{100 * row['test_accuracy']:.2f}{spread}"


def _costs(rows: list[Mapping[str, Any]]) -> tuple[str, ...]:
    """Means over the tasks of what a run took, and the largest peak; empty where older runs did not keep it."""

    def of(name: str, factor: float, digits: int, fold: Any = statistics.fmean) -> str:
        return f"{fold(row[name] for row in rows) / factor:,.{digits}f}" if all(name in row for row in rows) else ""

    peak = of("peak_rss_bytes", 2**20, 0, max)
    return of("pack_bytes", 1e3, 1), of("steps", 1, 0), of("wall_seconds", 60, 1), peak


if __name__ == "__main__":
    sys.exit(grid.resumable(main))
