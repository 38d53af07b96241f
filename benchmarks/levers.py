"""What does each way to save memory, or time, save, and what does it cost?

    python benchmarks/levers.py

Optimizer steps of 8 images at 224 px, one thread, of several networks: as they are planned where memory is plenty, with
one thing changed at a time, and with all that saves memory together. What changes nothing for a network is left out.
Every figure is of a process of its own; the ways alternate. Gradients are those of the first step, of random images at
a random head, and are held against the usual plan's, layer by layer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measure import Record, add_output, backbone, fresh_json, output, print_table

if TYPE_CHECKING:
    from ksm_edge.bundle.layers import Bundle
    from ksm_edge.runtimes.compile import CompiledGraph
    from ksm_edge.training.settings import Settings
    from ksm_edge.training.trainer import Trainer

RECIPES = ("mobilenet_v2", "resnet18")
SIZE, BATCH, CLASSES = 224, 8, 10
ERRORS = ("gradient_error", "largest_gradient_error")
MIB = 1 << 20


@dataclass(frozen=True)
class Lever:
    """What it changes of a `GradientSpec`, and of `Settings`."""

    form: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    images: int = 1  # in a micro-batch


USUAL = "as usual"
LEVERS = {
    USUAL: Lever(),
    # Less memory.
    "weights once, stems tap by tap": Lever({"fast": False}),
    "forward pass computed twice": Lever({"recompute": True}),
    "activations in half precision": Lever(settings={"activation_bits": 16}),
    "k x k weights made when needed": Lever({"fast": False, "inside": True}),
    "moments in 8 bits": Lever(settings={"moment_bits": 8}),
    "all of these": Lever(
        {"fast": False, "inside": True, "recompute": True}, {"activation_bits": 16, "moment_bits": 8}
    ),
    # More time, which says what is gained by what they leave out.
    "without operators in C": Lever({"own": False, "tile_bytes": 0}),
    "without 1x1 convs done along": Lever({"widened": False}),
    "without 3x3 convs by tiles": Lever({"tile_bytes": 0}),
    "4 images at a time": Lever(images=4),
    # Less time, for errors.
    "products in half precision": Lever(settings={"product_bits": 16}),
}


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), help="(default: all)")
    parser.add_argument("--repeats", type=int, default=5, help="processes for each way (default: 5)")
    parser.add_argument("--steps", type=int, default=3, help="timed steps in each process (default: 3)")
    add_output(parser)
    return parser


def main() -> int:
    options = arguments().parse_args()
    if options.quick:
        options.repeats, options.steps, options.recipes = 1, 2, options.recipes[:1]
    settings = {"size": SIZE, "batch": BATCH, "threads": 1, "repeats": options.repeats, "steps": options.steps}
    record = Record("levers", __doc__.split("\n")[0], settings)
    out = output(options, "levers")
    for recipe in options.recipes:
        with backbone(None, SIZE, recipe=recipe) as path:
            for repeat in range(options.repeats):
                for lever, found in _measured_in_turn(path, options.steps):
                    record.runs.append({"recipe": recipe, "lever": lever, "repeat": repeat, **found})
                    record.summary = summary(record.runs)
                    record.save(out)
    _show(record.summary)
    record.finish(out)
    return 0


def _measured_in_turn(bundle: Path, steps: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Of each lever that changes something what a process of its own finds, and how far its gradients are off."""
    with tempfile.TemporaryDirectory(prefix="ksm-edge-") as folder:
        usual = Path(folder, "usual.npz")
        for name in _that_differ(bundle):
            gradients = usual if name == USUAL else Path(folder, "other.npz")
            given = {"bundle": str(bundle), "lever": name, "steps": steps, "gradients": str(gradients)}
            found = fresh_json([sys.executable, __file__, "--one", json.dumps(given)])
            yield name, found | ({} if name == USUAL else _errors(usual, gradients))


def _that_differ(path: Path) -> list[str]:
    """Of several levers that make the same graph, learned by in the same way, the first."""
    from ksm_edge.bundle.digest import file_sha256
    from ksm_edge.bundle.load import load_bundle

    bundle, seen = load_bundle(path), dict[tuple[str, Any], str]()
    for name, lever in LEVERS.items():
        settings, graph = _graph(bundle, lever)
        seen.setdefault((file_sha256(graph.path), settings.moment_bits), name)
    return list(seen.values())


def _graph(bundle: Bundle, lever: Lever) -> tuple[Settings, CompiledGraph]:
    from ksm_edge.runtimes.compile import compiled
    from ksm_edge.training.settings import Settings
    from ksm_edge.training.trainer import gradient_spec

    settings = Settings(batch=BATCH, **lever.settings)
    spec = gradient_spec(bundle, CLASSES, settings, lever.images)
    return settings, compiled(bundle, replace(spec, **lever.form))


def _one(given: Mapping[str, Any]) -> dict[str, Any]:
    """In this process: the times of a few steps, its peak of memory, and then the gradients of another first step."""
    import numpy as np

    from ksm_edge.bundle.load import load_bundle
    from ksm_edge.resident import peak_rss_bytes, use_compact_heap
    from ksm_edge.training.targets import target_rows
    from ksm_edge.training.trainer import Trainer

    use_compact_heap()
    bundle = load_bundle(Path(given["bundle"]))
    settings, graph = _graph(bundle, LEVERS[given["lever"]])
    rng, n = np.random.default_rng(0), graph.spec.micro_batch
    parts = [rng.standard_normal((n, *graph.inputs["image"][1:]), np.float32) for _ in range(BATCH // n)]
    targets = target_rows(np.arange(BATCH) % CLASSES, CLASSES, 0.0)

    def trainer() -> Trainer:
        return Trainer(bundle, graph, settings, steps=1000)

    learning, times = trainer(), list[float]()
    for _ in range(1 + given["steps"]):
        began = time.perf_counter()
        learning.step(parts, targets)
        times.append((time.perf_counter() - began) * 1e3)
    found = {"step_ms": times[1:], "peak_rss_bytes": peak_rss_bytes(), "activation_bytes": graph.activation_bytes}
    del learning
    first = trainer()
    first.run_head[:] = rng.standard_normal(first.run_head.shape)  # one of zeros lets nothing through
    first.accumulate(parts, targets)
    np.savez(given["gradients"], **{name: layer.gradients()["score"] for name, layer in first.layers.items()})
    return found


def _errors(usual: Path, other: Path) -> dict[str, float]:
    """Of the scores' gradients, as shares of their length: the median over the layers, and the largest."""
    import numpy as np

    with np.load(usual) as one, np.load(other) as two:
        shares = [float(np.linalg.norm(two[name] - one[name]) / np.linalg.norm(one[name])) for name in one.files]
    return {"gradient_error": statistics.median(shares), "largest_gradient_error": max(shares)}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over processes, and each lever against the usual plan of the same network."""
    rows: dict[str, Any] = {}
    for run in runs:
        rows.setdefault(run["recipe"], {}).setdefault(run["lever"], []).append(run)
    for levers in rows.values():
        for lever, of_lever in levers.items():
            levers[lever] = {
                "step_ms": statistics.median(statistics.median(run["step_ms"]) for run in of_lever),
                "peak_rss_bytes": max(run["peak_rss_bytes"] for run in of_lever),
                "activation_bytes": of_lever[0]["activation_bytes"],
            }
            for error in ERRORS:
                if error in of_lever[0]:
                    levers[lever][error] = max(run[error] for run in of_lever)
        for row in levers.values():
            row["time_ratio"] = row["step_ms"] / levers[USUAL]["step_ms"]
            row["saved_bytes"] = levers[USUAL]["peak_rss_bytes"] - row["peak_rss_bytes"]
    return rows


def _show(rows: dict[str, Any]) -> None:
    table = [
        ("network", "lever", "step, ms", "/ usual", "peak RSS, MiB", "activations, MiB", "gradients err by", "at most")
    ]
    for recipe, levers in rows.items():
        for lever, row in levers.items():
            sizes = (f"{row[name] / MIB:.0f}" for name in ("peak_rss_bytes", "activation_bytes"))
            errors = (f"{row[name]:.0e}" if name in row else "" for name in ERRORS)
            table.append((recipe, lever, f"{row['step_ms']:.0f}", f"{row['time_ratio']:.2f}", *sizes, *errors))
    print_table(table)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(_one(json.loads(sys.argv[2]))))
        sys.exit(0)
    sys.exit(main())
