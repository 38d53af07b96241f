"""Does a task, once it is fused, cost anything at inference against the plain backbone?

    python benchmarks/latency.py

Three sessions in one process, one image and one thread each, in random order: the plain backbone, the backbone with a
task fused into it, and the plain backbone a second time, which shows what difference is none.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measure import CUT, Record, add_backbone, add_output, backbone, output, print_table, random_pack, share_warning

if TYPE_CHECKING:
    import numpy as np

    from ksm_edge.bundle.layers import Bundle

LEAST_FOR_P95 = 100
WARM_UP = 5


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_backbone(parser)
    parser.add_argument("--pack", type=Path, help=f"a pack (default: a random one that cuts {CUT:.0%}% of the kernels)")
    parser.add_argument("--size", type=int, default=224, help="pixels; only without --bundle (default: 224)")
    parser.add_argument(
        "--runs", type=int, default=200, help=f"of each session, at least {LEAST_FOR_P95} (default: 200)"
    )
    add_output(parser)
    return parser


def main() -> int:
    parser = arguments()
    options = parser.parse_args()
    if options.quick:
        options.runs = LEAST_FOR_P95
    if options.runs < LEAST_FOR_P95:
        parser.error(f"--runs {options.runs}: a 95th percentile takes at least {LEAST_FOR_P95}")
    if options.pack and not options.bundle:
        parser.error("--pack needs the --bundle that it belongs to")
    with backbone(options.bundle, options.size) as path:
        from ksm_edge.bundle.load import load_bundle

        bundle = load_bundle(path)
        settings = {
            "size": bundle.input.size,
            "runs": options.runs,
            "threads": 1,
            "images": 1,
            "pack": str(options.pack or "random"),
        }
        record = Record("latency", __doc__.split("\n")[0], settings)
        latency_ms, share = _measure(bundle, options.pack, options.runs)
    record.runs = [{"session": name, "latency_ms": values} for name, values in latency_ms.items()]
    record.summary = summary(latency_ms)
    _show(record.summary)
    record.warn(share_warning("inference", [share]))
    record.finish(output(options, "latency"))
    return 0


def summary(latency_ms: dict[str, list[float]]) -> dict[str, Any]:
    """Percentiles of each session, and their ratios to the plain backbone's."""
    rows = {name: {"p50_ms": _percentile(v, 50), "p95_ms": _percentile(v, 95)} for name, v in latency_ms.items()}
    for row in rows.values():
        row["p50_ratio"] = row["p50_ms"] / rows["plain"]["p50_ms"]
        row["p95_ratio"] = row["p95_ms"] / rows["plain"]["p95_ms"]
    return {"sessions": rows}


def _percentile(values: list[float], percent: int) -> float:
    """The smallest value that is not below `percent` % of them."""
    return sorted(values)[max(0, -(-len(values) * percent // 100) - 1)]


def _measure(bundle: Bundle, pack_path: Path | None, runs: int) -> tuple[dict[str, list[float]], float]:
    import numpy as np

    from ksm_edge.bundle.golden import golden_images
    from ksm_edge.fuse import fuse
    from ksm_edge.pack.files import load_pack, require_backbone
    from ksm_edge.runtimes.onnxruntime import Session

    pack = load_pack(pack_path) if pack_path else random_pack(bundle)
    require_backbone(pack, bundle)
    tasks = {"plain": None, "fused": pack, "plain again": None}
    sessions = {name: Session(bundle.graph_path, fuse(bundle, task), 1) for name, task in tasks.items()}
    image = golden_images(bundle.input, 1)
    order = [name for name in tasks for _ in range(runs)]
    random.Random(0).shuffle(order)
    for session in sessions.values():
        for _ in range(WARM_UP):
            session.run(image)
    latency_ms: dict[str, list[float]] = {name: [] for name in tasks}
    cpu, wall = time.process_time(), time.perf_counter()
    for name in order:
        began = time.perf_counter()
        sessions[name].run(image)
        latency_ms[name].append(round((time.perf_counter() - began) * 1e3, 4))
    share = (time.process_time() - cpu) / (time.perf_counter() - wall)
    _check({name: session.run(image) for name, session in sessions.items()}, np.isfinite)
    return latency_ms, share


def _check(features: dict[str, np.ndarray], isfinite: Any) -> None:
    """That a task was timed at all: its features are numbers, and others than the backbone's."""
    if not all(isfinite(values).all() for values in features.values()):
        raise SystemExit("WRONG ANSWER: features that are not finite")
    if not (features["plain"] == features["plain again"]).all():
        raise SystemExit("WRONG ANSWER: the plain backbone differs from itself")
    if (features["plain"] == features["fused"]).all():
        raise SystemExit("WRONG ANSWER: the fused task answers as the plain backbone does")


def _show(result: dict[str, Any]) -> None:
    rows = [("session", "p50, ms", "p95, ms", "p50 / plain", "p95 / plain")]
    for name, row in result["sessions"].items():
        rows.append(
            (
                name,
                *(f"{row[k]:.2f}" for k in ("p50_ms", "p95_ms")),
                *(f"{row[k]:.3f}" for k in ("p50_ratio", "p95_ratio")),
            )
        )
    print_table(rows)


if __name__ == "__main__":
    sys.exit(main())
