"""In which runtime, and in which way of it, is a task best opened, kept and run?

    python benchmarks/runtimes.py

MobileNetV2 on one core, one image. Every way in fresh processes that open one, two and five tasks: how long a task
takes from its fused weights to the first answer, what the tasks add to resident memory, and how long an answer takes
from then on. What the process holds before any task, the runtime and its Python package, is given apart.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measure import (
    Record,
    add_output,
    backbone,
    fresh,
    fresh_json,
    output,
    print_table,
    random_pack,
    share_warning,
)

if TYPE_CHECKING:
    import numpy as np

    from ksm_edge.bundle.layers import Bundle

    Weights = dict[str, np.ndarray]
    Run = Callable[[np.ndarray], np.ndarray]
    Open = Callable[[Weights], Run]

TASKS = (1, 2, 5)
TOLERANCE = 1e-4  # of the largest feature: runtimes add up in different orders
MIB = 1 << 20


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="one exported with --executorch (default: one made for this run)")
    parser.add_argument("--size", type=int, default=224, help="pixels; only without --bundle (default: 224)")
    parser.add_argument("--repeats", type=int, default=5, help="processes for each way and number (default: 5)")
    parser.add_argument("--runs", type=int, default=40, help="timed answers in each process (default: 40)")
    parser.add_argument("--child", nargs=2, metavar="X", help=argparse.SUPPRESS)
    add_output(parser)
    return parser


def main() -> int:
    options = arguments().parse_args()
    if options.child:
        print(json.dumps(_measured(options.bundle, options.child[0], int(options.child[1]), options.runs)))
        return 0
    if options.quick:
        options.repeats, options.runs = 1, 10
    with backbone(options.bundle, options.size) as path:
        if not (path / "executorch.json").is_file():
            if options.bundle is not None:
                raise SystemExit(f"{path} has no program for ExecuTorch: export it with --executorch")
            _write_program(path)
        size = json.loads((path / "manifest.json").read_text())["input"]["size"]
        settings = {"size": size, "repeats": options.repeats, "runs": options.runs, "cores": 1}
        record = Record("runtimes", __doc__.split("\n")[0], settings)
        for repeat in range(options.repeats):
            for name in WAYS if repeat % 2 == 0 else reversed(WAYS):
                for tasks in TASKS:
                    found = _child(path, name, tasks, options.runs)
                    record.runs.append({"way": name, "repeat": repeat, "tasks": tasks, **found})
    record.summary = summary(record.runs)
    _show(record.summary)
    for name in WAYS:
        record.warn(share_warning(name, [run["cpu_share"] for run in record.runs if run["way"] == name]))
    record.finish(output(options, "runtimes"))
    return 0


def _write_program(bundle: Path) -> None:
    """ExecuTorch's program, into a bundle of this run."""
    if any(importlib.util.find_spec(name) is None for name in ("torch", "executorch")):
        raise SystemExit("ExecuTorch is one of the rivals: pip install '.[export]'")
    code = (
        "import sys; from pathlib import Path; from ksm_edge.bundle.load import load_bundle;"
        "from ksm_edge.exporter.executorch import write_program; write_program(load_bundle(Path(sys.argv[1])))"
    )
    fresh([sys.executable, "-c", code, str(bundle)])


def _child(bundle: Path, way: str, tasks: int, runs: int) -> dict[str, Any]:
    words = ("--bundle", str(bundle), "--runs", str(runs), "--child", way, str(tasks))
    return fresh_json([sys.executable, __file__, *words])


# One process


def _measured(path: Path, way: str, tasks: int, runs: int) -> dict[str, Any]:
    """Open so many tasks one after the other, and run the last one."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # ExecuTorch takes as many threads as it sees cores
    import numpy as np

    from ksm_edge.bundle.golden import golden_images
    from ksm_edge.bundle.load import load_bundle
    from ksm_edge.fuse import fuse
    from ksm_edge.resident import give_back, rss_bytes

    bundle = load_bundle(path)
    image, weights = golden_images(bundle.input, 1), fuse(bundle, random_pack(bundle))
    open_task = WAYS[way](bundle)
    give_back()
    rss, first_ms, ready = [rss_bytes()], [], []
    for _ in range(tasks):
        began = time.perf_counter()
        run = open_task(weights)
        features = run(image)
        first_ms.append(1e3 * (time.perf_counter() - began))
        ready.append(run)
        give_back()
        rss.append(rss_bytes())
    run_ms, cpu, wall = [], time.process_time(), time.perf_counter()
    for _ in range(runs):
        began = time.perf_counter()
        run(image)
        run_ms.append(1e3 * (time.perf_counter() - began))
    share = (time.process_time() - cpu) / (time.perf_counter() - wall)
    _require_right(features, weights, bundle, image)
    assert np.array_equal(ready[0](image), features)  # the first task still answers, and as the last one
    return {"rss_bytes": rss, "first_ms": first_ms, "run_ms": run_ms, "cpu_share": share}


def _require_right(features: np.ndarray, weights: Weights, bundle: Bundle, image: np.ndarray) -> None:
    import numpy as np

    from ksm_edge.runtimes.onnxruntime import Session

    expected = Session(bundle.graph_path, weights, 1).run(image)
    error = float(np.abs(features - expected).max() / np.abs(expected).max())
    if not error <= TOLERANCE:
        raise SystemExit(f"WRONG ANSWER: features are off by {error:.1e} of the largest")


# The ways: of each, what is done once, and what for a task


def _optimised_each_time(bundle: Bundle) -> Open:
    import onnxruntime  # noqa: F401 - before memory is looked at

    from ksm_edge.runtimes.onnxruntime import Session

    return lambda weights: Session(bundle.graph_path, weights, 1).run


def _prepared(bundle: Bundle) -> Open:
    import onnxruntime  # noqa: F401 - before memory is looked at

    from ksm_edge.runtimes.prepared import prepare

    graph = prepare(bundle)
    return lambda weights: graph.session(weights, 1).run


def _not_optimised(bundle: Bundle) -> Open:
    import onnxruntime  # noqa: F401 - before memory is looked at

    from ksm_edge.runtimes.onnxruntime import Session

    return lambda weights: Session(bundle.graph_path, weights, 1, optimise=False).run


def _weights_as_inputs(bundle: Bundle) -> Open:
    """One session for all tasks; a task is a set of tensors that every run is given."""
    import onnx
    import onnxruntime

    from ksm_edge.runtimes.onnxruntime import session_options

    model = onnx.load(bundle.graph_path, load_external_data=False)
    outside = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    for tensor in outside:
        model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        model.graph.initializer.remove(tensor)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), session_options(1), providers=["CPUExecutionProvider"]
    )

    def open_task(weights: Weights) -> Run:
        binding = session.io_binding()
        for name, weight in weights.items():
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(weight.copy()))

        def run(image: np.ndarray) -> np.ndarray:
            binding.bind_cpu_input("image", image)
            binding.bind_output("features")
            session.run_with_iobinding(binding)
            features: np.ndarray = binding.copy_outputs_to_cpu()[0]
            return features

        return run

    return open_task


def _executorch(bundle: Bundle) -> Open:
    import torch
    from executorch.extension.pybindings import portable_lib  # noqa: F401 - before memory is looked at

    from ksm_edge.runtimes.executorch import Session

    torch.set_num_threads(1)
    return lambda weights: Session(bundle.graph_path, weights).run


WAYS: dict[str, Callable[[Bundle], Open]] = {
    "ONNX Runtime, prepared graph": _prepared,
    "ONNX Runtime, optimised for each task": _optimised_each_time,
    "ONNX Runtime, not optimised": _not_optimised,
    "ONNX Runtime, weights as inputs": _weights_as_inputs,
    "ExecuTorch, XNNPACK": _executorch,
}


# The result


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over processes; the first task of a process is told apart, as it warms up what the others share."""
    rows = {}
    for name in dict.fromkeys(run["way"] for run in runs):
        of_way = [run for run in runs if run["way"] == name]
        most = [run for run in of_way if run["tasks"] == max(run["tasks"] for run in of_way)]
        median = statistics.median
        rows[name] = {
            "before_bytes": median(run["rss_bytes"][0] for run in of_way),
            "rss_bytes": {
                str(tasks): median(run["rss_bytes"][-1] for run in of_way if run["tasks"] == tasks)
                for tasks in sorted({run["tasks"] for run in of_way})
            },
            "first_ms": median(run["first_ms"][0] for run in of_way),
            "next_ms": median(ms for run in most for ms in run["first_ms"][1:]),
            "run_ms": median(median(run["run_ms"]) for run in of_way),
        }
    return {"ways": rows}


def _show(result: dict[str, Any]) -> None:
    rows = [("", "first task, ms", "next ones, ms", "an answer, ms", "RSS before, MiB", "with 1 / 2 / 5 tasks, MiB")]
    for name, row in result["ways"].items():
        times = (f"{row[key]:.1f}" for key in ("first_ms", "next_ms", "run_ms"))
        rss = " / ".join(f"{value / MIB:.0f}" for value in row["rss_bytes"].values())
        rows.append((name, *times, f"{row['before_bytes'] / MIB:.0f}", rss))
    print_table(rows)


if __name__ == "__main__":
    sys.exit(main())
