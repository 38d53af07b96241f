"""How small is a task pack, part by part, and how long does it take from its bytes to fused weights?

    python benchmarks/accuracy.py --packs packs        # any folder of packs will do
    python benchmarks/pack.py --packs packs

Sizes are those of the given packs. Keep bits are held against two figures: their entropy when each layer cuts at a rate
of its own, and the code length of the best model found, which predicts every bit from those of its row and its column
that came before. Times are of random packs, for one thread: decoding and fusing into ready buffers, against making an
ONNX Runtime session for the same network, alternating in one process.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measure import CUT, Record, add_backbone, add_output, backbone, output, print_table, random_pack, share_warning

if TYPE_CHECKING:
    import numpy as np

    from ksm_edge.pack.record import Pack

RECIPES = ("mobilenet_v2", "resnet50")
FLOOR = {"mobilenet_v2": 0.25, "resnet50": 0.5}
SIZE = 224
PRIORS = (20, 60, 200, 1000)  # how many bits the layer's rate counts as beside a row's or a column's own


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_backbone(parser)
    parser.add_argument("--packs", type=Path, help="folder of *.ksm files (default: no sizes, times alone)")
    parser.add_argument("--repeats", type=int, default=15, help="of each time (default: 15)")
    add_output(parser)
    return parser


def main() -> int:
    options = arguments().parse_args()
    repeats = 3 if options.quick else options.repeats
    record = Record("pack", __doc__.split("\n")[0], {"repeats": repeats, "threads": 1, "cut": CUT})
    sizes = [size_of(path) for path in sorted(options.packs.glob("*.ksm"))] if options.packs else []
    times = []
    for recipe in RECIPES:
        given = options.bundle if recipe == RECIPES[0] else None
        with backbone(given, SIZE, recipe=recipe) as path:
            times.append({"recipe": recipe, **_time(path, repeats)})
    record.warn(share_warning("decoding, fusing and making sessions", [row.pop("share") for row in times]))
    record.runs = sizes + times
    record.summary = {"times": {row["recipe"]: medians(row) for row in times}, "sizes": summary(sizes)}
    _show(record.summary)
    record.finish(output(options, "pack"))
    return 0


def size_of(path: Path) -> dict[str, Any]:
    """The bytes of one pack's parts, and what its keep bits would take at best."""
    from ksm_edge.pack.budget import budget
    from ksm_edge.pack.files import load_pack_and_bytes

    pack, data = load_pack_and_bytes(path)
    masks = [state.mask for state in pack.layers.values() if state.mask is not None]
    tables = [~mask.keep.reshape(len(mask.keep), -1) for mask in masks]
    return {
        "pack": path.name,
        "classes": len(pack.classes),
        "bytes": len(data),
        "parts": budget(data),
        "scores": _scores(pack),
        "cut": sum(mask.cut.size for mask in masks),
        "layer_entropy_bytes": sum(map(layer_entropy, tables)) / 8,
        "best_model_bytes": sum(map(best_model, tables)) / 8,
    }


def _scores(pack: Pack) -> int:
    import math

    from ksm_edge.mask import score_shape

    return sum(math.prod(score_shape(shape, pack.granularity)) for shape in pack.weight_shapes.values())


def layer_entropy(cut: np.ndarray) -> float:
    """Bits for a layer (O, X) that cuts at one rate."""
    import numpy as np

    share = cut.mean()
    return float(-cut.size * sum(p * np.log2(p) for p in (share, 1 - share) if p > 0))


def best_model(cut: np.ndarray) -> float:
    """Bits for a layer (O, X) when each bit's odds are those of its row so far times those of its column so far.

    Both rates are drawn to the layer's own by a prior; of all pairs of priors the best is taken.
    """
    import numpy as np

    O, X = cut.shape
    rate = (cut.sum() + 0.5) / (cut.size + 1)
    row, column = np.cumsum(cut, axis=1) - cut, np.cumsum(cut, axis=0) - cut
    before_row, before_column = np.arange(X)[None, :], np.arange(O)[:, None]
    by_row, by_column = (
        [_logit((count + prior * rate) / (seen + prior)) for prior in PRIORS]
        for count, seen in ((row, before_row), (column, before_column))
    )
    lengths = []
    for left in by_row:
        for right in by_column:
            odds = left + right - _logit(rate)
            lengths.append(float(np.logaddexp(0, np.where(cut, -odds, odds)).sum() / np.log(2)))
    return min(lengths)


def _logit(p: Any) -> Any:
    import numpy as np

    return np.log(p / (1 - p))


def _time(path: Path, repeats: int) -> dict[str, Any]:
    """Milliseconds of each repetition, for one bundle."""
    from ksm_edge.bundle.load import load_bundle
    from ksm_edge.fuse import fuse
    from ksm_edge.pack.format import encode
    from ksm_edge.pack.reader import decode
    from ksm_edge.runtimes.onnxruntime import Session

    bundle = load_bundle(path)
    data = encode(random_pack(bundle))
    pack = decode(data)
    ready = fuse(bundle, pack)
    work: dict[str, Callable[[], object]] = {
        "decode_ms": lambda: decode(data),
        "fuse_ms": lambda: fuse(bundle, pack, ready),
        "session_ms": lambda: Session(bundle.graph_path, ready, 1),
    }
    values: dict[str, Any] = {name: [] for name in work}
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(repeats + 1):
        for name, call in work.items():
            began = time.perf_counter()
            call()
            values[name].append(round((time.perf_counter() - began) * 1e3, 3))
    share = (time.process_time() - cpu) / (time.perf_counter() - wall)
    return {name: each[1:] for name, each in values.items()} | {"share": share}  # the first one warms up


def medians(row: dict[str, Any]) -> dict[str, float]:
    """Medians, and the ratio in question."""
    middle = {name: statistics.median(row[name]) for name in ("decode_ms", "fuse_ms", "session_ms")}
    return middle | {"ratio": (middle["decode_ms"] + middle["fuse_ms"]) / middle["session_ms"]}


def summary(sizes: list[dict[str, Any]]) -> dict[str, Any]:
    """For each task, as a pack's name has it in front of the seed, the means over its packs."""
    by_task: dict[str, list[dict[str, Any]]] = {}
    for row in sizes:
        by_task.setdefault(row["pack"].rpartition("-")[0] or row["pack"], []).append(row)
    return {
        task: {
            "packs": len(rows),
            "classes": rows[0]["classes"],
            "bytes": statistics.fmean(row["bytes"] for row in rows),
            "parts": {part: statistics.fmean(row["parts"][part] for row in rows) for part in rows[0]["parts"]},
            "cut": statistics.fmean(row["cut"] / row["scores"] for row in rows),
            "bits_per_score": statistics.fmean(8 * row["parts"]["keep_bits"] / row["scores"] for row in rows),
            "against_layer_entropy": _against(rows, "layer_entropy_bytes"),
            "against_best_model": _against(rows, "best_model_bytes"),
        }
        for task, rows in by_task.items()
    }


def _against(rows: list[dict[str, Any]], name: str) -> float:
    return statistics.fmean(row["parts"]["keep_bits"] / row[name] if row[name] else 1.0 for row in rows)


def _show(result: dict[str, Any]) -> None:
    rows = [("network", "decode, ms", "fuse, ms", "session, ms", "ratio", "wanted")]
    for recipe, row in result["times"].items():
        times = (f"{row[name]:.1f}" for name in ("decode_ms", "fuse_ms", "session_ms"))
        rows.append((recipe, *times, f"{row['ratio']:.2f}", f"<= {FLOOR[recipe]}"))
    print_table(rows)
    if not result["sizes"]:
        return
    print()
    parts = list(next(iter(result["sizes"].values()))["parts"])
    head = ("task", "classes", "kB", *parts, "cut", "bits a score", "/ layer entropy", "/ best model")
    lines = [head]
    for task, row in result["sizes"].items():
        share = (f"{row['cut']:.2%}", f"{row['bits_per_score']:.3f}")
        against = (f"{row['against_layer_entropy']:.3f}", f"{row['against_best_model']:.3f}")
        each = (f"{row['parts'][part] / 1e3:.1f}" for part in parts)
        lines.append((task, str(row["classes"]), f"{row['bytes'] / 1e3:.1f}", *each, *share, *against))
    print_table(lines)


if __name__ == "__main__":
    sys.exit(main())
