"""How far are predicted latencies from those that others measured on boards?

    python benchmarks/prediction.py            # measure this machine, fit, validate, write
    python benchmarks/prediction.py --no-fit   # keep ksm_edge/profiler/kernels.toml as it is

The model of `ksm_edge.profiler.roofline` is fitted to the rows of `published.toml` and to this machine's own ONNX
Runtime, and validated by leaving out a whole board each time: fitted on the others and this machine, it predicts the
one that it has not seen. Training with PyTorch was published for one board, so there one network is left out.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fitting import (
    EAGER,
    GPU,
    GRAPHICS,
    HOST,
    SIZE,
    Fitting,
    Row,
    as_kernels,
    gpu_machine,
    read_gpu,
    read_published,
)
from measure import ROOT, Record, add_output, backbone, fresh_json, optimizer_steps, output, print_table, share_warning

if sys.version_info >= (3, 11):
    pass
else:
    pass

if TYPE_CHECKING:
    from ksm_edge.profiler.roofline import Machine
    from ksm_edge.profiler.work import Work

STEP_NETWORKS, STEP_BATCH = ("mobilenet_v2", "mobilenet_v3_large", "resnet18"), 8
HOST_NETWORKS = ("mobilenet_v2", "mobilenet_v3_large", "resnet50", "vgg16_bn")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-fit", action="store_true", help="validate, but leave the numbers in use as they are")
    parser.add_argument("--runs", type=int, default=25, help="of each network on this machine (default: 25)")
    parser.add_argument("--child", metavar="BUNDLE", help=argparse.SUPPRESS)
    add_output(parser)
    return parser


def main() -> int:
    options = arguments().parse_args()
    if options.child:
        print(json.dumps(_host_times(Path(options.child), options.runs)))
        return 0
    record = Record("prediction", __doc__.split("\n")[0], {"size": SIZE, "runs": options.runs})
    host = measure_host(5 if options.quick else options.runs)
    record.warn(share_warning("inference", host.pop("cpu_shares")))
    steps, works = measure_steps(3 if options.quick else 10)
    record.runs = [host, {"batch": STEP_BATCH, "steps": steps}]
    published, training = read_published()
    rows = [row for row in published if row.kernels == "ncnn" and not row.half]
    host_rows = [Row(HOST, "onnxruntime", *key, ms) for key, ms in _host_rows(host)]
    fitting = Fitting({HOST: _machine(host["machine"])})
    left_out = fitting.leave_one_out([*rows, *host_rows], lambda row: row.board, keep=HOST)
    fitted = fitting.fit([*rows, *host_rows])
    others = [(row, fitting.predicted(row, fitted)) for row in published if row not in rows]
    on_host = [(row, fitting.predicted(row, fitted)) for row in host_rows]
    eager = Fitting({}, EAGER)
    trained = eager.leave_one_out(training, lambda row: row.network)
    graphics = Fitting({GPU: gpu_machine()}, GRAPHICS)
    on_gpu = graphics.leave_one_out(read_gpu(), lambda row: row.network)
    record.summary = summary(left_out, others, on_host, trained)
    record.summary["gpu"] = {**_errors(on_gpu), "rows": list(map(_as_json, on_gpu))}
    record.summary["adaptation"] = adaptation(steps, works, fitting, fitted)
    record.summary["kernels"] = kernels_of(fitted, eager.fit(training), record.summary)
    _show(record.summary)
    if not (options.no_fit or options.quick):
        _write_kernels(record.summary["kernels"])
    record.finish(output(options, "prediction"))
    return 0


def summary(
    left_out: Sequence[tuple[Row, float]],
    others: Sequence[tuple[Row, float]],
    on_host: Sequence[tuple[Row, float]],
    trained: Sequence[tuple[Row, float]],
) -> dict[str, Any]:
    """Each row with its prediction, and how far off they are together."""
    return {
        "left_out": {**_errors(left_out), "rows": list(map(_as_json, left_out))},
        "reported": list(map(_as_json, others)),
        "this_machine": {**_errors(on_host), "rows": list(map(_as_json, on_host))},
        "training": {**_errors(trained), "rows": list(map(_as_json, trained))},
        "floors": {"median_error": 0.25, "worst_factor": 2.0, "training_worst_error": 0.35},
    }


def _errors(pairs: Sequence[tuple[Row, float]]) -> dict[str, float]:
    errors = [abs(found / row.ms - 1) for row, found in pairs]
    factors = sorted(math.exp(abs(math.log(found / row.ms))) for row, found in pairs)
    return {
        "median_error": statistics.median(errors),
        "worst_error": max(errors),
        "worst_factor": factors[-1],
        "spread": factors[int(0.8 * len(factors))],  # four of five are within
    }


def _as_json(pair: tuple[Row, float]) -> dict[str, Any]:
    row, found = pair
    return {**vars(row), "predicted_ms": found, "ratio": found / row.ms}


# This machine


def measure_host(runs: int) -> dict[str, Any]:
    """Its peaks, and its latencies by network and threads."""
    found: dict[str, Any] = {"latency_ms": {}, "cpu_shares": []}
    for network in HOST_NETWORKS:
        with backbone(None, SIZE, recipe=network) as path:
            part = fresh_json([sys.executable, __file__, "--child", str(path), f"--runs={runs}"])
        found["latency_ms"][network] = part["latency_ms"]
        found["cpu_shares"].append(part["cpu_share"])
        found["machine"] = part["machine"]
    return found


def _host_times(path: Path, runs: int) -> dict[str, Any]:
    import os

    from ksm_edge.bundle.golden import golden_images
    from ksm_edge.bundle.load import load_bundle
    from ksm_edge.device import this_machine
    from ksm_edge.fuse import fuse
    from ksm_edge.profiler.roofline import Machine
    from ksm_edge.runtimes.onnxruntime import Session

    bundle = load_bundle(path)
    weights, image = fuse(bundle, None), golden_images(bundle.input, 1)
    latency, shares = {}, []
    for threads in range(1, len(os.sched_getaffinity(0)) + 1):
        session, times = Session(bundle.graph_path, weights, threads), []
        for _ in range(3):
            session.run(image)
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(runs):
            began = time.perf_counter()
            session.run(image)
            times.append(1e3 * (time.perf_counter() - began))
        shares.append((time.process_time() - cpu) / (time.perf_counter() - wall))
        latency[str(threads)] = times
    machine = Machine.measured(this_machine().clock_mhz * 1e6)
    return {"latency_ms": latency, "cpu_share": shares[0], "machine": vars(machine)}


def _host_rows(host: dict[str, Any]) -> Iterator[tuple[tuple[int, str], float]]:
    for network, by_threads in host["latency_ms"].items():
        for threads, times in by_threads.items():
            yield (int(threads), network), statistics.median(times)


def _machine(fields: dict[str, Any]) -> Machine:
    from ksm_edge.profiler.roofline import Machine

    return Machine(**fields)


def measure_steps(steps: int) -> tuple[dict[str, Any], dict[str, list[Work]]]:
    """Optimizer steps of several networks, by one thread, and the operators of one micro-batch's gradients."""
    found, works = {}, {}
    for network in STEP_NETWORKS:
        with backbone(None, SIZE, recipe=network) as path:
            found[network], works[network] = optimizer_steps(path, steps, STEP_BATCH), _counted(path)
    return found, works


def _counted(path: Path) -> list[Work]:
    from ksm_edge.bundle.load import load_bundle
    from ksm_edge.profiler.predict import gradient_work
    from ksm_edge.training.planner import make_plan
    from ksm_edge.training.settings import Settings

    bundle = load_bundle(path)
    return gradient_work(bundle, make_plan(bundle, 10, Settings(batch=STEP_BATCH), threads=1, budget_bytes=None))


def adaptation(
    steps: dict[str, Any], works: dict[str, list[Work]], fitting: Fitting, numbers: dict[str, float]
) -> dict[str, Any]:
    """Gradients' time over what is predicted from their operators, network by network."""
    from ksm_edge.profiler.roofline import seconds

    rows, kernels = {}, as_kernels(numbers, "onnxruntime")
    for network, found in steps.items():
        counted = 1e3 * sum(seconds(works[network], fitting.machine(HOST), kernels, 1))
        counted *= -(-STEP_BATCH // found["micro_batch"])
        measured = statistics.median(found["gradient_ms"])
        rows[network] = {"measured_ms": measured, "counted_ms": counted, "ratio": measured / counted}
    ratios = [row["ratio"] for row in rows.values()]
    factor = statistics.median(ratios)
    return {"rows": rows, "factor": factor, "worst_factor": max(max(r / factor, factor / r) for r in ratios)}


ENGINES_DIFFER = 1.4  # two good engines on one board: ncnn and XNNPACK, MobileNetV2, Raspberry Pi 4


def kernels_of(fitted: dict[str, float], eager: dict[str, float], found: dict[str, Any]) -> dict[str, Any]:
    """What `kernels.toml` is to say, to four digits."""
    spread = found["left_out"]["spread"]
    parts = [
        as_kernels(fitted, "ncnn", spread=spread, describes="ncnn, FP32, with Winograd's convs, on Arm",
                   fitted_on="published rows of Raspberry Pi Zero 2 W, 4 and Jetson Nano, and one x86-64 machine"),
        as_kernels(fitted, "onnxruntime", spread=spread * ENGINES_DIFFER, adaptation=found["adaptation"]["factor"],
                   adaptation_spread=spread * ENGINES_DIFFER * found["adaptation"]["worst_factor"],
                   describes="ONNX Runtime's own CPU kernels, FP32",
                   fitted_on="one x86-64 machine, beside ncnn's rows of Arm boards: on Arm it was never measured"),
        as_kernels(eager, "pytorch", spread=found["training"]["spread"],
                   describes="PyTorch 1.13 in eager mode, FP32, full fine-tuning, data loading included",
                   fitted_on="published rows of Raspberry Pi 4"),
    ]  # fmt: skip
    return {
        kernels.name: {
            name: float(f"{value:.4g}") if isinstance(value, float) else value
            for name, value in vars(kernels).items()
            if name != "name"
        }
        for kernels in parts
    }


def _write_kernels(kernels: dict[str, Any]) -> None:
    lines = ["# Written by benchmarks/prediction.py; what the numbers mean: ksm_edge/profiler/roofline.py."]
    for name, numbers in kernels.items():
        lines += ["", f"[{name}]", *(f"{field} = {json.dumps(value)}" for field, value in numbers.items())]
    (ROOT / "ksm_edge" / "profiler" / "kernels.toml").write_text("\n".join(lines) + "\n")


# The result


def _show(found: dict[str, Any]) -> None:
    head = ("board", "threads", "network", "published, ms", "predicted, ms", "ratio")
    for title, rows in (
        ("each board predicted from the others and this machine", found["left_out"]["rows"]),
        ("reported only: half precision, other kernels", found["reported"]),
        ("this machine, ONNX Runtime, part of the fit", found["this_machine"]["rows"]),
        ("one GPU, each network predicted from its others", found["gpu"]["rows"]),
        ("PyTorch, training an image, each network predicted from the others", found["training"]["rows"]),
    ):
        print(f"\n{title}")
        print_table([head, *(_line(row) for row in rows)])
    print("\ngradients of a step of 8 images on this machine, against what their operators would take at inference")
    rows = ((name, f"{row['measured_ms']:.0f}", f"{row['counted_ms']:.0f}", f"{row['ratio']:.2f}")
            for name, row in found["adaptation"]["rows"].items())  # fmt: skip
    print_table([("network", "measured, ms", "counted, ms", "ratio"), *rows])
    left_out, training = found["left_out"], found["training"]
    print(
        f"\nleft out: median error {left_out['median_error']:.1%}, worst factor {left_out['worst_factor']:.2f}; "
        f"training: worst error {training['worst_error']:.1%}"
    )


def _line(row: dict[str, Any]) -> tuple[str, ...]:
    network = row["network"] + (", all weights" if row["training"] else "")
    times = (f"{row['ms']:.1f}", f"{row['predicted_ms']:.1f}", f"{row['ratio']:.2f}")
    return row["board"], str(row["threads"]), network, *times


if __name__ == "__main__":
    sys.exit(main())
