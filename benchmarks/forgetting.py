"""What do tasks that are learned later cost those that were learned before?

    python benchmarks/forgetting.py     # the 20 tasks of caltech100, five classes each: an hour

One frozen backbone, MobileNetV2 at 96 px, and 20 tasks learned one after the other with the default settings. Behind
each of them the bundle and every pack so far are still the same bytes, and what each pack makes of the backbone still
has its digest; behind the last, every task is evaluated again. The runs also go into accuracy.json, where
`accuracy.py --tasks caltech100/0 caltech100/1 ... --size 96 --methods full linear` puts other ways beside them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import accuracy
from measure import RESULTS, Record, add_backbone, add_output, backbone, output, print_table
from methods import identity, judged
from tasks import suite, task_data

SUITE, SIZE, QUICK_TASKS = "caltech100", 96, 3


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_backbone(parser)
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    add_output(parser)
    return parser


def main() -> int:
    options = arguments().parse_args()
    count = QUICK_TASKS if options.quick else len(suite(SUITE))
    record = Record("forgetting", __doc__.split("\n")[0], {"suite": SUITE, "size": SIZE, "seed": options.seed})
    with (
        backbone(options.bundle, SIZE, random=False) as bundle,
        tempfile.TemporaryDirectory(prefix="ksm-edge-forgetting-") as folder,
    ):
        tasks = [task_data(f"{SUITE}/{number}", Path(folder)) for number in range(count)]
        before = _bundle_bytes(bundle)
        for number, data in enumerate(tasks):
            run = _learned(bundle, data, options.seed)
            if not options.quick:
                accuracy.keep(RESULTS / "accuracy.json", run)
            record.runs.append(
                {"task": data.stem, "after_learning": run["test_accuracy"], "pack_bytes": run["pack_bytes"],
                 "state": _state(bundle, data.with_suffix(".ksm"))}
            )  # fmt: skip
            _require_unchanged(record.runs, bundle, before, tasks[: number + 1])
            print(f"{number + 1} of {count}: {run['test_accuracy']:.2%}, all before it as they were", file=sys.stderr)
        for run, data in zip(record.runs, tasks, strict=True):
            run["after_all"] = judged(data.with_suffix(".ksm"), bundle, data)["test_accuracy"]
    record.summary = summary(record.runs)
    _show(record)
    record.finish(output(options, "forgetting"))
    return 1 if record.summary["largest_loss"] else 0


def _learned(bundle_path: Path, data: Path, seed: int) -> dict[str, Any]:
    """A run with the default settings, its pack left beside the data."""
    from ksm_edge.bundle.load import load_bundle
    from ksm_edge.data.image_set import open_image_set

    bundle, images = load_bundle(bundle_path), open_image_set(data)
    wanted = identity("ksm", bundle, images, seed)
    return accuracy.measured(wanted, bundle, images, data, data.with_suffix(".ksm"))


def _state(bundle_path: Path, pack_path: Path) -> dict[str, str]:
    """What must stay: the pack's bytes, and the weights that it makes of the backbone as it now is."""
    from ksm_edge.bundle.digest import file_sha256
    from ksm_edge.bundle.load import load_bundle
    from ksm_edge.fuse import digest_of
    from ksm_edge.pack.files import load_pack

    return {"pack": file_sha256(pack_path), "fused": digest_of(load_bundle(bundle_path), load_pack(pack_path))}


def _bundle_bytes(bundle: Path) -> dict[str, str]:
    from ksm_edge.bundle.digest import file_sha256

    return {str(path.relative_to(bundle)): file_sha256(path) for path in sorted(bundle.rglob("*")) if path.is_file()}


def _require_unchanged(runs: list[dict[str, Any]], bundle: Path, before: dict[str, str], tasks: list[Path]) -> None:
    if _bundle_bytes(bundle) != before:
        raise SystemExit(f"FORGOTTEN: learning {tasks[-1].stem} changed the bundle")
    for run, data in zip(runs, tasks, strict=True):
        if _state(bundle, data.with_suffix(".ksm")) != run["state"]:
            raise SystemExit(f"FORGOTTEN: learning {tasks[-1].stem} changed what {data.stem} had learned")


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Over all tasks."""
    return {
        "tasks": len(runs),
        "after_learning": statistics.fmean(run["after_learning"] for run in runs),
        "after_all": statistics.fmean(run["after_all"] for run in runs),
        "largest_loss": max(run["after_learning"] - run["after_all"] for run in runs),
        "pack_bytes": sum(run["pack_bytes"] for run in runs),
        "digests_compared": len(runs) * (len(runs) + 1) // 2,
    }


def _show(record: Record) -> None:
    rows = [("task", "when learned, %", "behind the last, %", "pack, kB")]
    for run in record.runs:
        accuracies = (f"{100 * run[name]:.2f}" for name in ("after_learning", "after_all"))
        rows.append((run["task"], *accuracies, f"{run['pack_bytes'] / 1e3:.1f}"))
    found = record.summary
    mean = (f"{100 * found[name]:.2f}" for name in ("after_learning", "after_all"))
    print_table([*rows, ("mean; all packs", *mean, f"{found['pack_bytes'] / 1e3:.1f}")])
    print(
        f"\nlargest loss of any task: {100 * found['largest_loss']:.2f} points; {found['digests_compared']} times a "
        "task's bytes and fused weights were compared with what they were, and the bundle behind each task"
    )


if __name__ == "__main__":
    sys.exit(main())
