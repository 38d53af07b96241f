"""How accurate is a task that `ksm-edge adapt` learns with its default settings?

    python benchmarks/accuracy.py                 # all tasks and seeds, one after the other: hours
    python benchmarks/accuracy.py --tasks trashnet --seeds 0

MobileNetV2 at 160 px. Everything is chosen on the validation split that `adapt` holds out; the test set is read once,
by `ksm-edge eval`, when the pack is written. Each run is a fresh process with one thread. Results are added to the file
as they come, and runs that are there with the same data, backbone, seed and settings are not done again.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import grid
from measure import (
    KSM_EDGE,
    RESULTS,
    add_backbone,
    backbone,
    condition,
    disturbance,
    fresh_json,
    machine,
    print_table,
)

SIZE = 160
# Logistic regression on standardised features of the same frozen backbone at the same size, its best C of three: from
# the README.md of the data folder, not measured here.
LINEAR_PROBE = {"flowers5": 0.893, "trashnet": 0.857, "pacs_sketch7": 0.824, "gtsrb43": 0.621}
FLOOR = {"flowers5": 0.915, "trashnet": 0.88, "pacs_sketch7": 0.91, "gtsrb43": 0.92}
QUESTION = __doc__.split("\n")[0]


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_backbone(parser)
    parser.add_argument("--tasks", nargs="+", default=list(FLOOR), help="of the data folder (default: %(default)s)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument("--epochs", type=int, help="(default: that of `ksm-edge adapt`)")
    parser.add_argument("--fresh", action="store_true", help="do runs again that are in the file")
    parser.add_argument("--packs", type=Path, help="folder to keep the packs in (default: they are thrown away)")
    parser.add_argument("--out", type=Path, default=RESULTS / "accuracy.json", help="(default: results/accuracy.json)")
    return parser


def main() -> int:
    options = arguments().parse_args()
    paths = {task: grid.task_data(task) for task in options.tasks}
    with backbone(options.bundle, SIZE, random=False) as bundle, _packs(options.packs) as packs:
        for seed in options.seeds:  # one seed of everything first: an interrupted grid then says most
            for task, path in paths.items():
                wanted = identity(path, bundle, seed, options.epochs)
                if not options.fresh and grid.has(options.out, wanted):
                    print(f"{task}, seed {seed}: there already", file=sys.stderr)
                    continue
                print(f"{task}, seed {seed}: {wanted['settings']['epochs']} epochs ...", file=sys.stderr)
                run = {
                    "identity": wanted,
                    "default_settings": options.epochs is None,
                    **_measure(path, bundle, packs, wanted),
                }
                keep(options.out, run)
                print(f"{task}, seed {seed}: {run['test_accuracy']:.2%} on test", file=sys.stderr)
    settings = identity(next(iter(paths.values())), None, 0, options.epochs)["settings"]
    _show(summary([run for run in grid.runs(options.out) if run["identity"]["settings"] == settings]))
    print(f"\nraw values: {options.out}")
    return 0


def identity(data: Path, bundle: Path | None, seed: int, epochs: int | None) -> dict[str, Any]:
    """What makes two runs the same run; not the state of the code, which is recorded beside it."""
    from ksm_edge.bundle.load import load_bundle
    from ksm_edge.data.image_set import open_image_set
    from ksm_edge.device import Device
    from ksm_edge.training.settings import Settings

    given: dict[str, Any] = {} if epochs is None else {"epochs": epochs}
    settings = asdict(Settings(batch=Device.load("host").batch, **given))  # as `ksm-edge adapt` takes them
    settings.pop("seed")
    images = open_image_set(data)
    loaded = load_bundle(bundle) if bundle else None
    return {
        "task": images.name,
        "data_digest": images.digest(),
        "backbone_digest": loaded.digest if loaded else None,
        "size": loaded.input.size if loaded else None,
        "resize": loaded.input.resize if loaded else None,
        "seed": seed,
        "settings": settings,
    }


def summary(runs: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """For each task the figures over its seeds."""
    by_task: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        by_task.setdefault(run["identity"]["task"], []).append(run)
    return {task: _row(task, of_task) for task, of_task in by_task.items()}


def reported(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs that stand for the project: those with the default settings, as they were at the latest such run."""
    default = [run for run in runs if run["default_settings"]]
    return [run for run in default if run["identity"]["settings"] == default[-1]["identity"]["settings"]]


def _row(task: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    test = [run["test_accuracy"] for run in runs]
    return {
        "seeds": sorted(run["identity"]["seed"] for run in runs),
        "test_accuracy": statistics.fmean(test),
        "test_accuracy_range": [min(test), max(test)],
        "validation_accuracy": statistics.fmean(run["validation_accuracy"] for run in runs),
        "pack_bytes": statistics.fmean(run["pack_bytes"] for run in runs),
        "wall_seconds": statistics.fmean(run["wall_seconds"] for run in runs),
        "peak_rss_bytes": max(run["peak_rss_bytes"] for run in runs),
        "linear_probe": LINEAR_PROBE.get(task),
        "floor": FLOOR.get(task),
    }


def _measure(data: Path, bundle: Path, packs: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    from ksm_edge.pack.files import load_pack

    before, seed = condition(), wanted["seed"]
    pack = packs / f"{wanted['task']}-{seed}.ksm"
    learned = fresh_json(
        [*KSM_EDGE, "adapt", str(data), "--bundle", str(bundle), "--out", str(pack), "--threads", "1",
         "--epochs", str(wanted["settings"]["epochs"]), "--seed", str(seed), "--json"],
        quiet=False,
    )  # fmt: skip
    used = dict(load_pack(pack).record["settings"])
    if used != {**wanted["settings"], "seed": seed}:
        raise SystemExit(f"{data.stem}: `ksm-edge adapt` used the settings {used}, expected were {wanted['settings']}")
    judged = fresh_json([*KSM_EDGE, "eval", str(pack), str(data), "--bundle", str(bundle), "--threads", "1", "--json"])
    if judged["split"] != "test":
        raise SystemExit(f"{data}: has no test/ to judge by")
    after = condition()
    names = ("validation_accuracy", "best_epoch", "epochs", "steps", "step_ms_p50", "data_wait_ms_p50", "pack_bytes",
             "peak_rss_bytes", "wall_seconds", "history", "skipped")  # fmt: skip
    return {
        "test_accuracy": judged["accuracy"],
        "test_images": judged["n"],
        "per_class": judged["per_class"],
        **{name: learned[name] for name in names},
        "threads": 1,
        "machine": machine(),
        "before": before,
        "after": after,
        "warnings": disturbance(before) + disturbance(after),
    }


def keep(path: Path, run: dict[str, Any]) -> None:
    """Add a run to the file."""
    grid.keep(path, {"benchmark": "accuracy", "question": QUESTION}, run, summary, reported)


@contextmanager
def _packs(given: Path | None) -> Any:
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="ksm-edge-packs-") as folder:
        yield Path(folder)


def _show(result: dict[str, Any]) -> None:
    heads = ("test, % (mean)", "range", "seeds", "validation", "wanted", "linear probe", "pack, kB", "minutes")
    rows: list[tuple[str, ...]] = [("task", *heads, "peak RSS, MiB")]
    for task, row in result.items():
        rows.append(
            (
                task,
                f"{100 * row['test_accuracy']:.2f}",
                " - ".join(f"{100 * end:.2f}" for end in row["test_accuracy_range"]),
                " ".join(map(str, row["seeds"])),
                *(
                    "" if row[n] is None else f"{100 * row[n]:.1f}"
                    for n in ("validation_accuracy", "floor", "linear_probe")
                ),
                f"{row['pack_bytes'] / 1e3:.1f}",
                f"{row['wall_seconds'] / 60:.1f}",
                f"{row['peak_rss_bytes'] / 2**20:.0f}",
            )
        )
    print_table(rows)
    print("linear probe: on the same frozen features, from the data folder's README.md, not measured here")


if __name__ == "__main__":
    sys.exit(grid.resumable(main))
