"""What does one optimizer step cost, in time and memory, against full fine-tuning in torch?

    python benchmarks/step.py

MobileNetV2, one thread. Every figure comes from a process of its own, rivals alternating, the same 8 images at every
step: a loss that does not fall means that something else was timed than learning.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import Record, add_backbone, add_output, backbone, fresh_json, output, print_table, share_warning

CLASSES = 10
WARM_UP = 3  # steps: the allocators' first
FLOOR = {"ratio": 0.38, "peak_rss_bytes": 185 * 2**20}


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_backbone(parser)
    parser.add_argument("--size", type=int, default=224, help="pixels; only without --bundle (default: 224)")
    parser.add_argument("--batch", type=int, default=8, help="images a step (default: 8)")
    parser.add_argument("--repeats", type=int, default=5, help="processes for each rival (default: 5)")
    parser.add_argument("--steps", type=int, default=12, help="timed steps in each process (default: 12)")
    parser.add_argument("--rivals", nargs="+", choices=RIVALS, default=list(RIVALS), help="(default: all)")
    parser.add_argument("--child", choices=RIVALS, help=argparse.SUPPRESS)
    add_output(parser)
    return parser


def main() -> int:
    options = arguments().parse_args()
    if options.child:
        print(json.dumps(RIVALS[options.child](options)))
        return 0
    if options.quick:
        options.repeats, options.steps = 1, 4
    settings = {name: getattr(options, name) for name in ("size", "batch", "repeats", "steps")}
    with backbone(options.bundle, options.size) as bundle:
        settings["size"] = json.loads((bundle / "manifest.json").read_text())["input"]["size"]
        record = Record(
            "step", __doc__.split("\n")[0], {**settings, "threads": 1, "classes": CLASSES, "warm_up": WARM_UP}
        )
        for repeat in range(options.repeats):
            # Whatever drifts while this runs must not favour the one that always comes first.
            for rival in options.rivals if repeat % 2 == 0 else reversed(options.rivals):
                run = _run(rival, bundle, settings)
                record.runs.append({"rival": rival, "repeat": repeat, **run})
    record.summary = summary(record.runs)
    _show(record.summary)
    for rival in options.rivals:
        record.warn(
            share_warning(
                rival, [run["cpu_share"] for run in record.runs if run["rival"] == rival and "absent" not in run]
            )
        )
    record.finish(output(options, "step"))
    wrong = [name for name, row in record.summary["rivals"].items() if not row.get("answer_ok", True)]
    if wrong:
        print(f"WRONG ANSWER: the loss of {', '.join(wrong)} is not finite or does not fall", file=sys.stderr)
    return 1 if wrong else 0


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over processes, of the medians over their steps."""
    rivals: dict[str, Any] = {}
    for run in runs:
        rivals.setdefault(run["rival"], []).append(run)
    rows = {name: _row(of_rival) for name, of_rival in rivals.items()}
    ours, torch = rows.get("ksm_edge", {}), rows.get("torch", {})
    result: dict[str, Any] = {"rivals": rows, "floor": FLOOR}
    if "step_ms" in ours and "step_ms" in torch:
        result |= {f"{name}_ratio": ours[name] / torch[name] for name in ("step_ms", "peak_rss_bytes")}
    return result


def _row(runs: list[dict[str, Any]]) -> dict[str, Any]:
    if "absent" in runs[0]:
        return {"absent": runs[0]["absent"]}
    medians = [statistics.median(run["step_ms"]) for run in runs]
    return {
        "step_ms": statistics.median(medians),
        "step_ms_range": [min(medians), max(medians)],
        "peak_rss_bytes": max(run["peak_rss_bytes"] for run in runs),
        "answer_ok": all(falls(run["losses"]) for run in runs),
        "first_loss": runs[0]["losses"][0],
        "last_loss": runs[0]["losses"][-1],
    }


def falls(losses: list[float]) -> bool:
    """Whether something was learned."""
    return all(map(math.isfinite, losses)) and losses[-1] < losses[0]


def _run(rival: str, bundle: Path, settings: dict[str, Any]) -> dict[str, Any]:
    given = [f"--{name}={settings[name]}" for name in ("size", "batch", "steps")]
    return fresh_json([sys.executable, __file__, "--child", rival, "--bundle", str(bundle), *given])


def _show(result: dict[str, Any]) -> None:
    rows = [("", "step, ms (median)", "range of processes", "peak RSS, MiB", "loss first -> last")]
    for name, row in result["rivals"].items():
        if "absent" in row:
            rows.append((name, "not measured", row["absent"], "", ""))
            continue
        low, high = row["step_ms_range"]
        loss = f"{row['first_loss']:.2f} -> {row['last_loss']:.2f}" + ("" if row["answer_ok"] else " WRONG")
        rows.append(
            (name, f"{row['step_ms']:.1f}", f"{low:.1f} - {high:.1f}", f"{row['peak_rss_bytes'] / 2**20:.0f}", loss)
        )
    if "step_ms_ratio" in result:
        rows.append(("ratio", f"{result['step_ms_ratio']:.3f}", "", f"{result['peak_rss_bytes_ratio']:.3f}", ""))
    rows.append(("wanted", f"ratio <= {FLOOR['ratio']}", "", f"<= {FLOOR['peak_rss_bytes'] / 2**20:.0f}", ""))
    print_table(rows)


# Each rival, in a process of its own


def timed(step: Callable[[], float], steps: int) -> dict[str, Any]:
    """Milliseconds and losses of so many steps behind a few that warm up, and the process' peak of memory."""
    from ksm_edge.resident import peak_rss_bytes

    losses, step_ms = [step() for _ in range(WARM_UP)], []
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(steps):
        began = time.perf_counter()
        losses.append(step())
        step_ms.append(round((time.perf_counter() - began) * 1e3, 3))
    share = (time.process_time() - cpu) / (time.perf_counter() - wall)
    return {"step_ms": step_ms, "losses": losses, "peak_rss_bytes": peak_rss_bytes(), "cpu_share": round(share, 3)}


def _ksm_edge(options: argparse.Namespace) -> dict[str, Any]:
    """Default settings and the planner's own choice of micro-batch."""
    import numpy as np

    from ksm_edge.bundle.load import load_bundle
    from ksm_edge.training.planner import make_plan
    from ksm_edge.training.settings import Settings
    from ksm_edge.training.trainer import Trainer

    bundle, settings = load_bundle(options.bundle), Settings(batch=options.batch)
    plan = make_plan(bundle, CLASSES, settings, threads=1, budget_bytes=None)
    trainer = Trainer(bundle, plan.graph, plan.settings, steps=options.steps + WARM_UP, threads=1)
    rng, side = np.random.default_rng(0), bundle.input.size
    images = rng.standard_normal((options.batch, 3, side, side), dtype=np.float32)
    targets = np.eye(CLASSES, dtype=np.float32)[np.arange(options.batch) % CLASSES] / options.batch
    found = timed(lambda: float(trainer.step(images, targets).loss), options.steps)
    return {**found, "micro_batch": plan.micro_batch, "expected_peak_bytes": plan.expected_peak_bytes}


def _torch(options: argparse.Namespace) -> dict[str, Any]:
    """Every parameter learns, eagerly, in train mode, with Adam; torchvision's own random start."""
    try:
        import torch

        from ksm_edge.exporter.torchvision_shim import import_torchvision

        torchvision = import_torchvision()
    except ImportError as error:
        return {"absent": f"{error}; scripts/install_torch installs it"}
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = torchvision.models.mobilenet_v2(num_classes=CLASSES).train()
    adam = torch.optim.Adam(network.parameters(), 1e-4)
    images = torch.randn(options.batch, 3, options.size, options.size)
    labels = torch.arange(options.batch) % CLASSES

    def step() -> float:
        adam.zero_grad()
        loss = torch.nn.functional.cross_entropy(network(images), labels)
        loss.backward()
        adam.step()
        return float(loss)

    return timed(step, options.steps)


RIVALS = {"ksm_edge": _ksm_edge, "torch": _torch}

if __name__ == "__main__":
    sys.exit(main())
