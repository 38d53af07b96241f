"""How long until `import ksm_edge` and `ksm-edge --help` are done, and which heavy packages do they import?

    python benchmarks/startup.py

Every figure is that of a whole fresh process; the interpreter's own share stands in the first row.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
from typing import Any

from measure import KSM_EDGE, ROOT, Record, add_output, fresh, output, print_table

COMMANDS = {
    "python alone": (sys.executable, "-c", "pass"),
    "import ksm_edge": (sys.executable, "-c", "import ksm_edge"),
    "ksm-edge --help": (*KSM_EDGE, "--help"),
}
HEAVY = ("torch", "torchvision", "onnxruntime", "onnx", "scipy", "sklearn", "numpy", "PIL", "safetensors")
UNWANTED = ("torch", "onnxruntime")
FLOOR_SECONDS = 0.3


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10, help="processes for each command (default: 10)")
    add_output(parser)
    return parser


def main() -> int:
    options = arguments().parse_args()
    if options.quick:
        options.repeats = 3
    record = Record("startup", __doc__.split("\n")[0], {"repeats": options.repeats})
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for command in COMMANDS.values():
        fresh(command)  # the files come from the disk's cache from now on
    for _ in range(options.repeats):
        for name, command in COMMANDS.items():
            seconds[name].append(round(fresh(command)[1], 4))
    record.runs = [{"command": n, "seconds": seconds[n], "heavy_imports": heavy_imports(COMMANDS[n])} for n in COMMANDS]
    record.summary = summary(record.runs)
    _show(record.summary)
    record.finish(output(options, "startup"))
    return 0


def heavy_imports(command: tuple[str, ...]) -> list[str]:
    """The packages of HEAVY that a Python command imports, by what `-X importtime` lists."""
    python, *rest = command
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    done = subprocess.run(
        [python, "-X", "importtime", *rest], env=environment, capture_output=True, text=True, check=True
    )
    imported = set(re.findall(r"^import time:.*\|\s*(\w+)\s*$", done.stderr, re.MULTILINE))
    return [name for name in HEAVY if name in imported]


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    rows = {
        run["command"]: {
            "seconds": statistics.median(run["seconds"]),
            "seconds_range": [min(run["seconds"]), max(run["seconds"])],
            "heavy_imports": run["heavy_imports"],
        }
        for run in runs
    }
    return {"commands": rows, "floor_seconds": FLOOR_SECONDS}


def _show(result: dict[str, Any]) -> None:
    rows = [("command", "seconds (median)", "range", "torch, onnxruntime", "other heavy imports")]
    for name, row in result["commands"].items():
        low, high = row["seconds_range"]
        unwanted = ", ".join(n for n in row["heavy_imports"] if n in UNWANTED)
        others = ", ".join(n for n in row["heavy_imports"] if n not in UNWANTED)
        rows.append((name, f"{row['seconds']:.3f}", f"{low:.3f} - {high:.3f}", unwanted or "neither", others or "none"))
    rows.append(("wanted", f"< {FLOOR_SECONDS}", "", "neither", ""))
    print_table(rows)


if __name__ == "__main__":
    sys.exit(main())
