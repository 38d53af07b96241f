"""How few bits do a pack's scales, batch-norm and head need before a task loses accuracy?

    python benchmarks/bits.py                     # three tasks, three seeds: half an hour on a quiet core
    python benchmarks/bits.py --small             # the same of tasks that were thinned for the small setting

Each task is learned once. What the last step left is judged on the validation split with every number as training has
it, then with one part at a time in fewer bits, then with all parts as `adapt` and `adapt --small` write them. So the
rows of a run differ by their bits alone. The test sets are not read.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grid
from measure import RESULTS, add_backbone, backbone, condition, disturbance, machine, print_table
from tasks import task_data

if TYPE_CHECKING:
    import numpy as np

    from ksm_edge.adapt.job import Job
    from ksm_edge.pack.record import Pack

SIZE = 96
TASKS = ("trashnet", "pacs_sketch7", "gtsrb43")
FEWER = {"scale": (8, 6, 5, 4, 3, 2, 1), "norm": (8, 6, 5, 4, 3, 2), "head": (8, 6, 5, 4, 3, 2)}
EXACT = "unquantized"
MOST_BITS = {"scale_bits": 8, "norm_bits": 8, "head_bits": 8}
# Of each setting the runs that are like the last one in all but task and seed.
STANDING = grid.latest(
    lambda run: run["setting"],
    lambda run: (
        {name: value for name, value in run["identity"]["settings"].items() if name not in ("seed", "amplify")},
        run["identity"]["size"],
        run["identity"]["backbone_digest"],
    ),
    task=lambda run: (run["setting"], run["identity"]["task"]),
)
QUESTION = __doc__.split("\n")[0]


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_backbone(parser)
    parser.add_argument("--small", action="store_true", help="learn as `adapt --small` does")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help="of the data folder (default: %(default)s)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument("--epochs", type=int, help="(default: that of `ksm-edge adapt`)")
    parser.add_argument("--out", type=Path, default=RESULTS / "bits.json", help="(default: results/bits.json)")
    return parser


def main() -> int:
    options = arguments().parse_args()
    paths = [task_data(task) for task in options.tasks]
    with backbone(options.bundle, SIZE, random=False) as bundle:
        for seed in options.seeds:
            for path in paths:
                _run(options, bundle, path, seed)
    _show(summary(STANDING(grid.runs(options.out))))
    print(f"\nraw values: {options.out}")
    return 0


def _run(options: argparse.Namespace, bundle_path: Path, data: Path, seed: int) -> None:
    """One training, kept in the file; none where that is there."""
    from ksm_edge.adapt.journey import prepared
    from ksm_edge.bundle.load import load_bundle
    from ksm_edge.data.image_set import open_image_set
    from ksm_edge.training.settings import SMALL, Settings

    # What is judged here must not have been learned from.
    given: dict[str, Any] = {"seed": seed, "join_at": 1.0, **(SMALL if options.small else {})}
    given |= {} if options.epochs is None else {"epochs": options.epochs}
    settings, bundle, images = Settings(**given), load_bundle(bundle_path), open_image_set(data)
    identity = {
        "task": images.name,
        "data_digest": images.digest(),
        "backbone_digest": bundle.digest,
        "size": bundle.input.size,
        "settings": asdict(settings),
    }
    if grid.has(options.out, identity):
        print(f"{images.name}, seed {seed}: there already", file=sys.stderr)
        return
    print(f"{images.name}, seed {seed}: {settings.epochs} epochs ...", file=sys.stderr)
    before = condition()
    with (
        tempfile.TemporaryDirectory(prefix="ksm-edge-bits-") as folder,
        prepared(bundle, images, Path(folder, "checkpoint"), settings) as job,
    ):
        job.run()
        found = {"setting": "small" if options.small else "default", "validation_images": len(job.held_out)}
        found["rows"] = measured(job)
    warnings = disturbance(before)
    run = {"identity": identity, **found, "machine": machine(), "before": before, "after": condition()}
    head = {"benchmark": "bits", "question": QUESTION}
    grid.keep(options.out, head, {**run, "warnings": warnings}, summary, STANDING)
    print(f"{images.name}, seed {seed}: {found['rows'][EXACT]['accuracy']:.2%}", file=sys.stderr)


def measured(job: Job) -> dict[str, Any]:
    """Accuracy, mean cross-entropy and pack bytes of what the job has learned, in more and fewer bits."""
    from ksm_edge.pack.format import encode
    from ksm_edge.pack.reader import decode
    from ksm_edge.training.packing import unquantized
    from ksm_edge.training.settings import SMALL, Settings

    exact = unquantized(job.trainer, job.images.name, job.images.classes)
    images, labels = _held_out(job)
    default = Settings().pack_bits
    together = {
        "8 bits": MOST_BITS,
        "default": default,
        "small": {name: SMALL[name] for name in default},
    }

    def row(pack: Pack, data: bytes) -> dict[str, Any]:
        return {**_judged(job.judge.logits(pack, images), labels), "pack_bytes": len(data), **_parts(data)}

    def encoded(bits: dict[str, int]) -> bytes:
        """Where kernels are amplified, which takes a bit, 7 of a scale stand for 8."""
        most = 7 if exact.amplifies else 8
        return encode(exact, **{**bits, "scale_bits": min(bits["scale_bits"], most)})

    rows = {EXACT: row(exact, encoded(MOST_BITS))}  # there is no such file: the size is that at 8 bits
    for part, counts in FEWER.items():
        for bits in counts:
            data = encoded({**MOST_BITS, f"{part}_bits": bits})
            rows[f"{part} {bits}"] = row(with_part(exact, decode(data), part), data)
    for name, bits in together.items():
        data = encoded(bits)
        rows[name] = row(decode(data), data)
    return rows


def with_part(exact: Pack, coarse: Pack, part: str) -> Pack:
    """The pack `exact` with one part, scale, norm or head, from `coarse`."""
    if part == "head":
        return replace(exact, head_weight=coarse.head_weight)
    names = ("mask",) if part == "scale" else ("gamma_delta", "beta_delta")
    layers = {
        layer: replace(state, **{name: getattr(coarse.layers[layer], name) for name in names})
        for layer, state in exact.layers.items()
    }
    return replace(exact, layers=layers)


def _held_out(job: Job) -> tuple[np.ndarray, np.ndarray]:
    import numpy as np

    from ksm_edge.data.batches import evaluation_batches

    batches = list(evaluation_batches(job.cache, job.held_out, job.bundle.input, batch=32))
    return np.concatenate([b.images for b in batches]), np.concatenate([b.labels for b in batches])


def _judged(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    import numpy as np

    rows = np.arange(len(labels))
    log_total = np.logaddexp.reduce(logits.astype(np.float64), axis=1)
    return {
        "accuracy": float((logits.argmax(axis=1) == labels).mean()),
        "cross_entropy": float((log_total - logits[rows, labels]).mean()),
    }


def _parts(data: bytes) -> dict[str, int]:
    from ksm_edge.pack.budget import budget

    return {f"{part}_bytes": count for part, count in budget(data).items()}


def summary(runs: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """For each setting and each row the mean over its runs, and the mean change against the exact row of the same run
    with its standard error."""
    by_setting: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        by_setting.setdefault(run["setting"], []).append(run)
    return {
        setting: {
            "runs": len(of_setting),
            "tasks": sorted({run["identity"]["task"] for run in of_setting}),
            "rows": {name: _row(name, of_setting) for name in of_setting[0]["rows"]},
        }
        for setting, of_setting in by_setting.items()
    }


def _row(name: str, runs: list[Mapping[str, Any]]) -> dict[str, float]:
    mean = {key: statistics.fmean(run["rows"][name][key] for run in runs) for key in runs[0]["rows"][name]}
    for key in ("accuracy", "cross_entropy"):
        changes = [run["rows"][name][key] - run["rows"][EXACT][key] for run in runs]
        mean[f"{key}_change"] = statistics.fmean(changes)
        if len(changes) > 1:
            mean[f"{key}_change_error"] = statistics.stdev(changes) / len(changes) ** 0.5
    return mean


def _show(result: dict[str, Any]) -> None:
    for setting, found in result.items():
        print(f"learned as {setting}: {found['runs']} runs of {', '.join(found['tasks'])}")
        lines = [("bits", "validation, %", "change, points", "cross-entropy", "change", "pack, kB")]
        for name, row in found["rows"].items():
            lines.append(
                (
                    name,
                    f"{100 * row['accuracy']:.2f}",
                    f"{100 * row['accuracy_change']:+.2f} +- {100 * row.get('accuracy_change_error', 0):.2f}",
                    f"{row['cross_entropy']:.4f}",
                    f"{row['cross_entropy_change']:+.4f} +- {row.get('cross_entropy_change_error', 0):.4f}",
                    f"{row['pack_bytes'] / 1e3:.1f}",
                )
            )
        print_table(lines)
        print()


if __name__ == "__main__":
    sys.exit(grid.resumable(main))
