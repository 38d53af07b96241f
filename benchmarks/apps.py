"""What does a task cost an app: to load it, to switch to it, and to keep many of them?

    python benchmarks/apps.py

From a pack on disk to the first answer, part by part, beside the way without packs: an ONNX file for each task, with
all its weights, opened by ONNX Runtime. All alternate in one process, one image and one thread. Then, in fresh
processes: what a loaded task adds to resident memory, whether switching among many leaks (under the memory budget of
the smallest board, held by a watchdog that ends the process above it), and what processes share of one backbone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measure import (
    Record,
    add_backbone,
    add_output,
    backbone,
    fresh_json,
    output,
    print_table,
    random_pack,
    share_warning,
)

if TYPE_CHECKING:
    from ksm_edge.bundle.layers import Bundle

BOARD = "raspberry-pi-zero-2w"
TASKS = 50
LIMIT = 3  # sessions that the app keeps while it switches among all tasks
PARTS = ("read", "decode", "fuse", "session", "first run")
MIB = 1 << 20


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_backbone(parser)
    parser.add_argument("--pack", type=Path, help="a pack of that bundle (default: a random one)")
    parser.add_argument("--size", type=int, default=224, help="pixels; only without --bundle (default: 224)")
    parser.add_argument("--repeats", type=int, default=30, help="of each way to load (default: 30)")
    parser.add_argument("--switches", type=int, default=10_000, help="among all tasks (default: 10000)")
    parser.add_argument("--child", nargs=4, metavar="X", help=argparse.SUPPRESS)
    add_output(parser)
    return parser


def main() -> int:
    options = arguments().parse_args()
    if options.child:
        name, *given = options.child
        print(json.dumps(CHILDREN[name](*given)))
        return 0
    repeats, switches = (5, 300) if options.quick else (options.repeats, options.switches)
    with backbone(options.bundle, options.size) as path, tempfile.TemporaryDirectory(prefix="ksm-edge-") as folder:
        from ksm_edge.bundle.load import load_bundle
        from ksm_edge.pack.files import save_pack

        bundle, pack = load_bundle(path), options.pack
        if pack is None:
            pack = Path(folder, "task.ksm")
            save_pack(random_pack(bundle), pack)
        settings = {"size": bundle.input.size, "repeats": repeats, "switches": switches, "tasks": TASKS, "threads": 1}
        record = Record("apps", __doc__.split("\n")[0], settings)
        os.environ["KSM_EDGE_CACHE"] = str(Path(folder, "cache"))
        ways, share = _loads(bundle, pack, Path(folder, "whole.onnx"), repeats)
        record.warn(share_warning("loading", [share]))
        memory = _child("memory", path, pack, TASKS)
        leak = _switching(path, pack, switches)
        shared = _sharing(path, pack, 3)
    record.runs = [{"way": name, **values} for name, values in ways.items()]
    record.runs += [{"part": "memory", **memory}, {"part": "switching", **leak}, {"part": "processes", **shared}]
    record.summary = summary(ways, memory, leak, shared)
    _show(record.summary)
    record.finish(output(options, "apps"))
    return 0


# Loading


def _loads(bundle: Bundle, pack: Path, whole: Path, repeats: int) -> tuple[dict[str, dict[str, Any]], float]:
    """Milliseconds of each part, repetition by repetition, for each way to load a task."""
    import numpy as np

    from ksm_edge.bundle.golden import golden_images
    from ksm_edge.fuse import fuse
    from ksm_edge.pack.reader import decode
    from ksm_edge.runtimes.onnxruntime import Session
    from ksm_edge.runtimes.prepared import prepare

    graph, image, features = prepare(bundle), golden_images(bundle.input, 1), {}
    _write_whole(bundle, fuse(bundle, decode(pack.read_bytes())), whole)

    def from_pack(open_session: Callable[[dict[str, np.ndarray]], Session]) -> Iterator[object]:
        data = pack.read_bytes()
        yield
        decoded = decode(data)
        yield
        weights = fuse(bundle, decoded)
        yield
        session = open_session(weights)
        yield
        yield session.run(image)

    def from_file() -> Iterator[object]:
        yield from (None, None, None)  # reading is part of making the session
        session = Session(whole, {}, 1)
        yield
        yield session.run(image)

    ways: dict[str, Callable[[], Iterator[object]]] = {
        "pack, prepared graph": lambda: from_pack(lambda weights: graph.session(weights, 1)),
        "pack, graph optimised each time": lambda: from_pack(lambda w: Session(bundle.graph_path, w, 1)),
        "an ONNX file for each task": from_file,
    }
    values: dict[str, dict[str, Any]] = {name: {part: [] for part in PARTS} for name in ways}
    cpu, wall = time.process_time(), time.perf_counter()
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            for part, result in zip(PARTS, way(), strict=True):
                now = time.perf_counter()
                if repeat:  # the first one warms up
                    values[name][part].append(round((now - began) * 1e3, 3))
                began, features[name] = now, result
    share = (time.process_time() - cpu) / (time.perf_counter() - wall)
    first, *others = features.values()
    if not all(np.array_equal(first, other) for other in others) or not np.isfinite(first).all():
        raise SystemExit("WRONG ANSWER: the ways to load a task do not give the same features")
    for name in ways:
        values[name]["bytes"] = (pack if name.startswith("pack") else whole).stat().st_size
    return values, share


def _write_whole(bundle: Bundle, weights: dict[str, Any], path: Path) -> None:
    """One plain ONNX file with the task's weights inside."""
    import onnx

    from ksm_edge.app.standalone import put_inside

    model = onnx.load(bundle.graph_path, load_external_data=False)
    put_inside(model, weights)
    onnx.save(model, path)


# Fresh processes


def _child(name: str, bundle: Path, pack: Path, number: int) -> dict[str, Any]:
    return fresh_json([sys.executable, __file__, "--child", name, str(bundle), str(pack), str(number)])


def _memory(bundle: str, pack: str, number: str) -> dict[str, Any]:
    """What so many loaded tasks, none of them used, add to this process."""
    from ksm_edge import App
    from ksm_edge.resident import rss_bytes

    with App(bundle, threads=1) as app:
        app.load(pack, "first")
        app.load(pack, "second")
        before = rss_bytes()
        for index in range(int(number)):
            app.load(pack, f"task {index}")
        return {"tasks": int(number), "before_bytes": before, "after_bytes": rss_bytes()}


def _switch(bundle: str, pack: str, number: str) -> dict[str, Any]:
    """Switch among all tasks so often; resident memory along the way, and how long a ready task takes."""
    from ksm_edge import App
    from ksm_edge.bundle.golden import golden_images
    from ksm_edge.resident import peak_rss_bytes, rss_bytes

    switches, rss = int(number), []
    with App(bundle, threads=1, limit=LIMIT) as app:
        names = [app.load(pack, f"task {index}") for index in range(TASKS)]
        image = golden_images(app.bundle.input, 1)
        for index in range(switches):
            app.switch(names[index % TASKS])
            if index % 100 == 0:
                app.logits(image)
                rss.append([index, rss_bytes()])
        ready, seconds = app.ready, []
        for index in range(200):
            began = time.perf_counter()
            app.switch(ready[index % LIMIT])
            seconds.append(time.perf_counter() - began)
    return {
        "switches": switches,
        "rss_bytes": rss,
        "peak_rss_bytes": peak_rss_bytes(),
        "ready_switch_ms": 1e3 * statistics.median(seconds),
    }


def _switching(bundle: Path, pack: Path, switches: int) -> dict[str, Any]:
    """`_switch` in a process that is ended when its resident memory passes the board's budget."""
    import psutil

    from ksm_edge.device import Device

    budget = Device.load(BOARD).memory_budget_bytes
    command = [sys.executable, __file__, "--child", "switch", str(bundle), str(pack), str(switches)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    process = psutil.Process(child.pid)
    while child.poll() is None:
        if process.memory_info().rss > budget:
            child.kill()
            raise SystemExit(f"{TASKS} tasks do not fit: over {budget / MIB:.0f} MiB resident on {BOARD}'s budget")
        time.sleep(0.01)
    if child.returncode:
        raise SystemExit(f"exit status {child.returncode} from {' '.join(command)}")
    assert child.stdout is not None
    found = dict(json.loads(child.stdout.read().splitlines()[-1]))
    return {
        **found,
        "board": BOARD,
        "budget_bytes": budget,
        "emulated": True,
        "enforced": "watchdog on resident memory",
    }


def _hold(bundle: str, pack: str, number: str) -> dict[str, Any]:
    """An app with one task that has answered, one of `number` processes; a line on stdin is the next step."""
    from ksm_edge import App
    from ksm_edge.bundle.golden import golden_images
    from ksm_edge.resident import shared_bytes

    with App(bundle, threads=1) as app:
        app.load(pack)
        app.logits(golden_images(app.bundle.input, 1))
        print("ready", flush=True)
        sys.stdin.readline()  # all are ready
        found = shared_bytes()
        print("measured", flush=True)
        sys.stdin.readline()  # all have measured
        return found


def _sharing(bundle: Path, pack: Path, most: int) -> dict[str, Any]:
    """RSS and PSS a process, alone and among several."""
    found = {}
    for number in (1, most):
        command = [sys.executable, __file__, "--child", "hold", str(bundle), str(pack), str(number)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        children = [subprocess.Popen(command, **pipes) for _ in range(number)]
        for _ in range(2):
            for child in children:
                child.stdout.readline()
            for child in children:
                child.stdin.write("\n")
                child.stdin.flush()
        rows = [json.loads(child.communicate()[0].splitlines()[-1]) for child in children]
        found[str(number)] = {key: statistics.fmean(row[key] for row in rows) for key in rows[0]}
    return {"by_processes": found}


CHILDREN: dict[str, Callable[[str, str, str], dict[str, Any]]] = {"memory": _memory, "switch": _switch, "hold": _hold}


# The result


def summary(
    ways: dict[str, dict[str, Any]], memory: dict[str, Any], leak: dict[str, Any], shared: dict[str, Any]
) -> dict[str, Any]:
    """Medians of each part, and the ratios in question."""
    rows = {name: {part: statistics.median(values[part]) for part in PARTS} for name, values in ways.items()}
    for name, row in rows.items():
        row["total"] = statistics.median(map(sum, zip(*(ways[name][part] for part in PARTS), strict=True)))
        row["bytes"] = ways[name]["bytes"]
    whole = rows["an ONNX file for each task"]
    for row in rows.values():
        row["ratio"], row["bytes_ratio"] = row["total"] / whole["total"], row["bytes"] / whole["bytes"]
    pack_bytes = rows["pack, prepared graph"]["bytes"]
    each = (memory["after_bytes"] - memory["before_bytes"]) / memory["tasks"]
    return {
        "loads": rows,
        "loaded_task_bytes": each,
        "loaded_task_ratio": each / pack_bytes,
        "ready_switch_ms": leak["ready_switch_ms"],
        "leak_bytes_per_switch": slope(leak["rss_bytes"]),
        "peak_rss_bytes": leak["peak_rss_bytes"],
        "budget_bytes": leak["budget_bytes"],
        "board": leak["board"],
        "switches": leak["switches"],
        "by_processes": shared["by_processes"],
    }


def slope(points: list[list[int]]) -> float:
    """Of the least-squares line through the later half of (switch, bytes): the first half fills caches."""
    later = points[len(points) // 2 :]
    if len(later) < 2:
        return 0.0
    x, y = zip(*later, strict=True)
    return float(statistics.linear_regression(x, y).slope)


def _show(result: dict[str, Any]) -> None:
    rows = [("from disk to the first answer, ms", *PARTS, "total", "ratio", "bytes read")]
    for name, row in result["loads"].items():
        times = (f"{row[part]:.1f}" for part in (*PARTS, "total"))
        rows.append((name, *times, f"{row['ratio']:.2f}", f"{row['bytes']} ({row['bytes_ratio']:.3f})"))
    print_table(rows)
    print()
    alone, among = result["by_processes"].values()
    print_table(
        [
            ("memory", "MiB", ""),
            ("a task that is loaded", f"{result['loaded_task_bytes'] / MIB:.3f}",
             f"{result['loaded_task_ratio']:.2f} x its pack"),
            (f"{TASKS} tasks, {LIMIT} ready, {result['switches']} switches: peak",
             f"{result['peak_rss_bytes'] / MIB:.0f}",
             f"budget of {result['board']}, emulated: {result['budget_bytes'] / MIB:.0f}"),
            ("growth per 1000 switches", f"{1000 * result['leak_bytes_per_switch'] / MIB:.4f}", ""),
            ("one process: RSS / PSS", f"{alone['rss_bytes'] / MIB:.0f} / {alone['pss_bytes'] / MIB:.0f}", ""),
            ("each of three: RSS / PSS", f"{among['rss_bytes'] / MIB:.0f} / {among['pss_bytes'] / MIB:.0f}", ""),
        ]
    )  # fmt: skip
    print(f"\nswitch to a ready task: {result['ready_switch_ms']:.4f} ms")


if __name__ == "__main__":
    sys.exit(main())
