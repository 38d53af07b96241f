"""How far are predicted latencies from those that others measured on boards?

    python benchmarks/prediction.py            # measure this machine, fit, validate, write
    python benchmarks/prediction.py --no-fit   # keep ksm_edge/profiler/kernels.toml as it is

The model of `ksm_edge.profiler.roofline` is fitted to the rows of `published.toml` and to this machine's own ONNX
Runtime, and validated by leaving out a whole board each time: fitted on the others and this machine, it predicts the
one that it has not seen. Training with PyTorch was published for one board, so there one network is left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measure import ROOT, Record, add_output, backbone, fresh_json, optimizer_steps, output, print_table, share_warning

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    import numpy as np

    from ksm_edge.profiler.roofline import Kernels, Machine
    from ksm_edge.profiler.work import Work

PUBLISHED = Path(__file__).with_name("published.toml")
SIZE = 224
HOST = "this machine"
STEP_NETWORKS, STEP_BATCH = ("mobilenet_v2", "mobilenet_v3_large", "resnet18"), 8
HOST_NETWORKS = ("mobilenet_v2", "mobilenet_v3_large", "resnet50", "vgg16_bn")
# Linear layers behind the features of a network with ImageNet's 1000 classes: inputs, then outputs of each.
HEADS = {
    "mobilenet_v2": (1280, 1000),
    "mobilenet_v2_half": (1280, 1000),
    "mobilenet_v3_large": (960, 1280, 1000),
    "resnet50": (2048, 1000),
    "vgg16_bn": (25088, 4096, 4096, 1000),
}


@dataclass(frozen=True)
class Row:
    """One published or measured time."""

    board: str
    kernels: str
    threads: int
    network: str
    ms: float
    half: bool = False
    training: bool = False  # all weights, against the forward pass alone
    source: str = ""


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
    steps = measure_steps(3 if options.quick else 10)
    record.runs = [host, steps]
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
    record.summary = summary(left_out, others, on_host, trained)
    record.summary["adaptation"] = adaptation(steps, fitting, fitted)
    _show(record.summary)
    if not (options.no_fit or options.quick):
        _write_kernels(fitted, eager.fit(training), record.summary)
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


# Published rows


def read_published() -> tuple[list[Row], list[Row]]:
    """Latencies, and training times an image."""
    table = tomllib.loads(PUBLISHED.read_text())
    rows = []
    for entry in table["rows"]:
        for network in HEADS.keys() & entry.keys():
            for threads, ms in zip(entry["threads"], entry[network], strict=True):
                half = entry.get("half", False)
                rows.append(Row(entry["board"], entry["kernels"], threads, network, ms, half, source=entry["source"]))
    training = []
    for entry in table["training"]:
        for network in HEADS.keys() & entry.keys():
            for all_weights, seconds in zip((True, False), entry[network], strict=True):
                ms = 1e3 * seconds / entry["batch"]
                row = Row(entry["board"], entry["kernels"], entry["threads"], network, ms, source=entry["source"])
                training.append(replace(row, training=all_weights))
    order = lambda row: (row.source, row.network, row.threads, not row.training)  # noqa: E731
    return sorted(rows, key=order), sorted(training, key=order)


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


def measure_steps(steps: int) -> dict[str, Any]:
    """Optimizer steps of several networks, by one thread."""
    found = {}
    for network in STEP_NETWORKS:
        with backbone(None, SIZE, recipe=network) as path:
            found[network] = {**optimizer_steps(path, steps, STEP_BATCH), **_counted(path)}
    return {"batch": STEP_BATCH, "steps": found}


def _counted(path: Path) -> dict[str, Any]:
    """The operators of a step: of one micro-batch, and of the update."""
    from ksm_edge.bundle.load import load_bundle
    from ksm_edge.profiler.predict import gradient_work, update_work
    from ksm_edge.training.planner import make_plan
    from ksm_edge.training.settings import Settings

    bundle, settings = load_bundle(path), Settings(batch=STEP_BATCH)
    plan = make_plan(bundle, 10, settings, threads=1, budget_bytes=None)
    works = {"gradient": gradient_work(bundle, plan), "update": update_work(bundle, settings)}
    return {name: [list(vars(work).values()) for work in listed] for name, listed in works.items()}


def adaptation(steps: dict[str, Any], fitting: Fitting, numbers: dict[str, float]) -> dict[str, Any]:
    """Gradients' time over what is predicted from their operators, network by network."""
    from ksm_edge.profiler.roofline import seconds
    from ksm_edge.profiler.work import Work

    rows, kernels = {}, as_kernels(numbers, "onnxruntime")
    for network, found in steps["steps"].items():
        works = [Work(*fields) for fields in found["gradient"]]
        counted = 1e3 * sum(seconds(works, fitting.machine(HOST), kernels, 1))
        counted *= -(-steps["batch"] // found["micro_batch"])
        measured = statistics.median(found["forward_ms"]) + statistics.median(found["backward_ms"])
        rows[network] = {"measured_ms": measured, "counted_ms": counted, "ratio": measured / counted}
    return {"rows": rows, "factor": statistics.median(row["ratio"] for row in rows.values())}


# Work


@cache
def work_of(network: str, eager: bool, with_head: bool) -> tuple[Work, ...]:
    """Of one image through a whole network, from its recipe's weightless graph."""
    import onnx

    from ksm_edge.bundle.recipe import load_recipe
    from ksm_edge.profiler.work import graph_work, linear_work

    model = onnx.load(load_recipe(network.removesuffix("_half")).graph_path)
    if network.endswith("_half"):
        _halve(model)
    works = [work for work in graph_work(model, SIZE, eager=eager) if work.operator != "Gemm"]
    sides = HEADS[network] if with_head else ()
    return (*works, *(linear_work(f"head.{i}", *pair) for i, pair in enumerate(itertools.pairwise(sides))))


def _halve(model: Any) -> None:
    """MobileNetV2 of half the width: channels halved and rounded to 8 as its authors do, the last ones kept.

    A block widens its input six times, so it is the input that is rounded.
    """
    filters = {}
    for value in model.graph.input[1:]:
        sides = value.type.tensor_type.shape.dim
        widened = re.match(r"features\.(?!1\.)\d+\.conv\.([012])\.", value.name)
        for place, side in enumerate(sides[:2]):
            inside = widened is not None and (place == 1) == (widened[1] == "2")
            if side.dim_value not in (1, 3, 1280):
                side.dim_value = 6 * _rounded(side.dim_value / 12) if inside else _rounded(side.dim_value / 2)
        filters[value.name] = sides[0].dim_value
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "group" and attribute.i > 1:
                attribute.i = filters[node.input[1]]


def _rounded(channels: float) -> int:
    whole = max(8, int(channels + 4) // 8 * 8)
    return whole + 8 if whole < 0.9 * channels else whole


# Fitting


@dataclass(frozen=True)
class Prior:
    """What is thought of a number before any row is seen, and by what factor it may well be off."""

    value: float
    factor: float


# In-order cores: a 128-bit load takes the only load pipe two cycles, so that half the peak is what can be hoped for.
PRIORS = {
    "dense": Prior(0.8, 2),
    "pointwise": Prior(0.5, 2),
    "depthwise": Prior(0.2, 2.7),
    "traffic": Prior(1, 2.7),
    "overhead_cycles": Prior(10_000, 1.6),
    "in_order": Prior(0.5, 1.3),
    "onnxruntime": Prior(1, 1.6),  # its shares, all but that of dense convs, as a multiple of ncnn's
    "onnxruntime.dense": Prior(1, 1.6),
}
# torch multiplies matrices with BLAS, which reaches 0.41 of this board's peak in HPL (11.9 of 28.8 GFLOP/s in FP64).
EAGER = {
    "dense": Prior(0.41, 1.5),  # of 1x1 convs too: both are matrix products
    "depthwise": Prior(0.02, 2.7),
    "traffic": Prior(2, 1.65),
    "overhead_cycles": Prior(50_000, 1.65),
    "backward": Prior(1.2, 1.35),
}
ROW_FACTOR = 1.28  # that a row may well be off by


class Fitting:
    """The model's numbers by least squares on the logarithms of times, with priors."""

    def __init__(self, machines: dict[str, Machine], priors: dict[str, Prior] = PRIORS) -> None:
        self._machines, self._priors = machines, priors

    def fit(self, rows: Sequence[Row]) -> dict[str, float]:
        """Gauss-Newton with damping."""
        import numpy as np

        start = np.array([math.log(prior.value) for prior in self._priors.values()])
        widths = np.array([math.log(prior.factor) for prior in self._priors.values()])

        def residuals(x: np.ndarray) -> np.ndarray:
            numbers = self._numbers(x)
            off = [math.log(self.predicted(row, numbers) / row.ms) / math.log(ROW_FACTOR) for row in rows]
            return np.array([*off, *((x - start) / widths)])

        x, found, damping = start, residuals(start), 1e-3
        for _ in range(60):
            slopes = np.array([(residuals(x + step) - found) / 1e-4 for step in 1e-4 * np.eye(len(x))]).T
            step = np.linalg.solve(slopes.T @ slopes + damping * np.eye(len(x)), -slopes.T @ found)
            tried = residuals(x + step)
            if tried @ tried < found @ found:
                x, found, damping = x + step, tried, damping / 3
            else:
                damping *= 4
        return self._numbers(x)

    def leave_one_out(
        self, rows: Sequence[Row], group: Callable[[Row], str], keep: str | None = None
    ) -> list[tuple[Row, float]]:
        """Each row with its prediction by a fit without its group; `keep` names a group that is always fitted on."""
        pairs = []
        for name in dict.fromkeys(map(group, rows)):
            if name != keep:
                numbers = self.fit([row for row in rows if group(row) != name])
                pairs += [(row, self.predicted(row, numbers)) for row in rows if group(row) == name]
        return pairs

    def predicted(self, row: Row, numbers: dict[str, float]) -> float:
        """Milliseconds."""
        from ksm_edge.profiler.roofline import seconds

        kernels = as_kernels(numbers, row.kernels)
        machine = self._halved(row)
        works = work_of(row.network, kernels.eager, row.board != HOST)
        forward = 1e3 * sum(seconds(works, machine, kernels, row.threads))
        return forward * (1 + kernels.backward if row.training else 1)

    def machine(self, board: str) -> Machine:
        """Of a board's profile, or measured."""
        from ksm_edge.device import Device
        from ksm_edge.profiler.roofline import Machine

        if board not in self._machines:
            self._machines[board] = Machine.of(Device.load(board))
        return self._machines[board]

    def _halved(self, row: Row) -> Machine:
        machine = self.machine(row.board)
        if not row.half:
            return machine
        # Twice the operations a cycle, and half the bytes.
        rates = {name: 2 * getattr(machine, name) for name in ("flop_per_second", "bytes_per_second")}
        return replace(machine, **rates)

    def _numbers(self, x: np.ndarray) -> dict[str, float]:
        return {name: math.exp(value) for name, value in zip(self._priors, x, strict=True)}


def as_kernels(numbers: dict[str, float], name: str, **more: Any) -> Kernels:
    """The numbers as one engine's."""
    from ksm_edge.profiler.roofline import Kernels

    if "backward" in numbers:
        shares = {"dense": numbers["dense"], "pointwise": numbers["dense"], "depthwise": numbers["depthwise"]}
        more |= {"backward": numbers["backward"], "eager": True}
    else:
        scale = numbers["onnxruntime"] if name == "onnxruntime" else 1.0
        dense = numbers["onnxruntime.dense"] if name == "onnxruntime" else 1.0
        shares = {
            "dense": dense * numbers["dense"],
            "pointwise": scale * numbers["pointwise"],
            "depthwise": scale * numbers["depthwise"],
        }
    rest = {"traffic": numbers["traffic"], "overhead_cycles": numbers["overhead_cycles"]}
    given = {"describes": "", "fitted_on": "", "spread": 1.0, "in_order": numbers.get("in_order", 0.5), **more}
    return Kernels(name, **shares, **rest, **given)


ENGINES_DIFFER = 1.4  # two good engines on one board: ncnn and XNNPACK, MobileNetV2, Raspberry Pi 4


def _write_kernels(fitted: dict[str, float], eager: dict[str, float], found: dict[str, Any]) -> None:
    """`kernels.toml`, to four digits."""
    spread = found["left_out"]["spread"]
    parts = [
        as_kernels(fitted, "ncnn", spread=spread, describes="ncnn, FP32, with Winograd's convs, on Arm",
                   fitted_on="published rows of Raspberry Pi Zero 2 W, 4 and Jetson Nano, and one x86-64 machine"),
        as_kernels(fitted, "onnxruntime", spread=spread * ENGINES_DIFFER, adaptation=found["adaptation"]["factor"],
                   describes="ONNX Runtime's own CPU kernels, FP32",
                   fitted_on="one x86-64 machine, beside ncnn's rows of Arm boards: on Arm it was never measured"),
        as_kernels(eager, "pytorch", spread=found["training"]["spread"],
                   describes="PyTorch 1.13 in eager mode, FP32, data loading included",
                   fitted_on="published rows of Raspberry Pi 4"),
    ]  # fmt: skip
    lines = ["# Written by benchmarks/prediction.py; what the numbers mean: ksm_edge/profiler/roofline.py."]
    for kernels in parts:
        lines += ["", f"[{kernels.name}]"]
        for name, value in vars(kernels).items():
            if name != "name":
                lines.append(f"{name} = {json.dumps(float(f'{value:.4g}') if isinstance(value, float) else value)}")
    (ROOT / "ksm_edge" / "profiler" / "kernels.toml").write_text("\n".join(lines) + "\n")


# The result


def _show(found: dict[str, Any]) -> None:
    head = ("board", "threads", "network", "published, ms", "predicted, ms", "ratio")
    for title, rows in (
        ("each board predicted from the others and this machine", found["left_out"]["rows"]),
        ("reported only: half precision, other kernels", found["reported"]),
        ("this machine, ONNX Runtime, part of the fit", found["this_machine"]["rows"]),
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
