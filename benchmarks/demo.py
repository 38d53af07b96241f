"""What does the embedded default give, `ksm-edge adapt --device jetson` with nothing else?

    python benchmarks/demo.py

Handwritten digits on the backbone that comes with the package, with the threads of the board as far as this machine has
cores. The board is emulated: its threads and memory budget, not its speed. The digits' test part plays no part in the
learning and is read once, when the pack is written.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import KSM_EDGE, ROOT, Record, add_output, fresh, fresh_json, output, print_table

DEVICE = "jetson"
FLOOR = {"wall_seconds": 120, "test_accuracy": 0.95, "pack_bytes": 100_000}


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="processes (default: 3)")
    parser.add_argument("--judge", type=Path, help=argparse.SUPPRESS)
    add_output(parser)
    return parser


def main() -> int:
    options = arguments().parse_args()
    if options.judge:
        print(json.dumps(_judge(options.judge)))
        return 0
    record = Record(
        "demo", __doc__.split("\n")[0], {"device": DEVICE, "repeats": 1 if options.quick else options.repeats}
    )
    with tempfile.TemporaryDirectory(prefix="ksm-edge-demo-") as folder:
        for _ in range(record.settings["repeats"]):
            record.runs.append(_run(Path(folder, "digits.ksm")))
            Path(folder, "digits.ksm").unlink()
        transcript = _transcript(Path(folder))
    record.summary = summary(record.runs) | {"transcript": transcript}
    _show(record.summary)
    record.finish(output(options, "demo"))
    return 0


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The median time; of the other figures, which should not differ, the worst."""
    return {
        "wall_seconds": statistics.median(run["wall_seconds"] for run in runs),
        "pack_bytes": max(run["pack_bytes"] for run in runs),
        "validation_accuracy": min(run["validation_accuracy"] for run in runs),
        "test_accuracy": min(run["test_accuracy"] for run in runs),
        "peak_rss_bytes": max(run["peak_rss_bytes"] for run in runs),
        "floor": FLOOR,
    }


def _run(pack: Path) -> dict[str, Any]:
    # A cache of its own: a bare machine has to compile the graphs first.
    os.environ["KSM_EDGE_CACHE"] = tempfile.mkdtemp(dir=pack.parent)
    said, seconds = fresh([*KSM_EDGE, "adapt", "--device", DEVICE, "--out", str(pack), "--json"], threads=None)
    report = json.loads(said)
    judged = fresh_json([sys.executable, __file__, "--judge", str(pack)])
    names = ("validation_accuracy", "pack_bytes", "peak_rss_bytes", "steps", "epochs", "step_ms_p50", "emulated")
    return {
        "wall_seconds": round(seconds, 3),  # of the whole process, from outside
        **{name: report[name] for name in names},
        "test_accuracy": judged["accuracy"],
        "test_images": judged["n"],
        "backbone_digest": report["backbone_digest"],
    }


def _transcript(folder: Path) -> list[str]:
    """What the command says to a person, line by line, without the progress bar."""
    command = [*KSM_EDGE, "adapt", "--device", DEVICE]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    said = done.stderr.replace("\r", "\n").splitlines()
    return [line.rstrip() for line in said if line.strip() and "img" not in line] + done.stdout.splitlines()


def _judge(pack: Path) -> dict[str, Any]:
    """In a process of its own: accuracy on the digits' test part."""
    from ksm_edge.app.app import App
    from ksm_edge.app.evaluation import evaluate
    from ksm_edge.data.digits import digits

    with App("embedded", threads=1) as app:
        app.load(pack)
        report = evaluate(app, digits())
    assert report["split"] == "test"
    return {name: report[name] for name in ("accuracy", "n")}


def _show(result: dict[str, Any]) -> None:
    print_table(
        [
            ("", "measured", "wanted"),
            ("wall time, s", f"{result['wall_seconds']:.1f}", f"< {FLOOR['wall_seconds']}"),
            ("accuracy on validation, %", f"{100 * result['validation_accuracy']:.2f}", ""),
            (
                "accuracy on held-out test, %",
                f"{100 * result['test_accuracy']:.2f}",
                f"> {100 * FLOOR['test_accuracy']:.0f}",
            ),
            ("pack, kB", f"{result['pack_bytes'] / 1e3:.1f}", f"< {FLOOR['pack_bytes'] / 1e3:.0f}"),
            ("peak RSS, MiB", f"{result['peak_rss_bytes'] / 2**20:.0f}", ""),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
