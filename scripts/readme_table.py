"""Write the README's results table and demo from what the benchmarks measured, each between its two marker lines.

    python scripts/readme_table.py            # write it
    python scripts/readme_table.py --check    # exit status 1 where the README says something else

Every number comes from benchmarks/results/*.json; nothing is measured here.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from methods import remark  # noqa: E402

DEMO_COMMAND = "pip install '.[demo]' && ksm-edge adapt --device jetson"
OURS, FULL = "ksm_edge", "torch, full fine-tuning"
NARROWER = "adaptation-avx2"  # the same steps on a processor with half as wide registers
BENCHMARKS = (
    "adaptation", NARROWER, "accuracy", "forgetting", "latency", "pack", "prediction", "memory", "demo", "startup",
)  # fmt: skip
TASKS = ("flowers5", "trashnet", "pacs_sketch7", "gtsrb43", "omniglot_small1")
SEEDS = (0, 1, 2)  # at least
BACKBONE = "mobilenet_v2, 160 px"  # as results name it
FORMAT_VERSION = 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where the table differs")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="(default: README.md)")
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks" / "results", help="(default: benchmarks/results)"
    )
    options = parser.parse_args()
    text = options.readme.read_text()
    results = {name: load_whole(options.results, name) for name in BENCHMARKS}
    wanted = between(text, "results", table(results), options.readme)
    wanted = between(wanted, "demo", demo(results["demo"]["summary"]["transcript"]), options.readme)
    if wanted == text:
        return 0
    if options.check:
        print(f"{options.readme}: its results are not those of {options.results}: run python scripts/readme_table.py")
        return 1
    options.readme.write_text(wanted)
    return 0


def load(results: Path, name: str) -> dict[str, Any]:
    """One benchmark's file; where it cannot be used, which benchmark to run."""
    path, run = results / f"{name}.json", f"run python benchmarks/{name}.py"
    if name == NARROWER:
        run = f"run python benchmarks/adaptation.py --out {path}"
    if not path.is_file():
        raise SystemExit(f"{path} is missing: {run}")
    content: dict[str, Any] = json.loads(path.read_text())
    if content["version"] != FORMAT_VERSION:
        raise SystemExit(f"{path} has the format version {content['version']}, not {FORMAT_VERSION}: {run}")
    return content


def load_whole(results: Path, name: str) -> dict[str, Any]:
    """The same for one with all that the README shows."""
    path, run, content = results / f"{name}.json", f"run python benchmarks/{name}.py", load(results, name)
    if name in ("adaptation", NARROWER) and len(_usual_step(content["summary"])) < 2:
        raise SystemExit(f"{path} lacks a rival: {run}")
    if name == "accuracy":
        for task in TASKS:
            found = content["summary"].get(BACKBONE, {}).get(task, {}).get("ksm", {})
            lacking = sorted(set(SEEDS) - set(found.get("seeds", ())))
            if lacking:
                raise SystemExit(f"{path} lacks {task} with seed {', '.join(map(str, lacking))}: {run}")
    return content


def between(text: str, name: str, content: str, path: Path) -> str:
    """The README's text with `content` between the markers of `name`; refuses one without exactly one pair of them."""
    opening, closing = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, start, rest = text.partition(opening)
    _, end, after = rest.partition(closing)
    if not (start and end) or text.count(opening) != 1 or text.count(closing) != 1:
        raise SystemExit(f"{path}: needs the lines {opening} and {closing}, in this order and once each")
    return f"{before}{opening}\n{content}\n{closing}{after}"


def demo(transcript: list[str]) -> str:
    """The first command and what it said, as a code block."""
    return "\n".join(["```", f"$ {DEMO_COMMAND}", *transcript, "```"])


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown, from all files' summaries."""
    summaries = {name: content["summary"] for name, content in results.items()}
    rows = [
        *_step_rows(summaries["adaptation"]),
        *_narrower_rows(summaries[NARROWER]),
        *_accuracy_rows(summaries["accuracy"]),
        *_forgetting_rows(summaries["forgetting"]),
        *_latency_rows(summaries["latency"]),
        *_pack_rows(summaries["pack"]),
        *_plan_rows(summaries["prediction"], summaries["memory"]),
        *_start_rows(summaries["startup"]),
        *_demo_rows(summaries["demo"]),
    ]
    lines = ["| measured | ksm_edge | beside it |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join([*lines, "", _origin(results)])


Row = tuple[str, str, str]


def _usual_step(adaptation: dict[str, Any], threads: int = 1) -> dict[str, Any]:
    """Of the case that the README shows the rows of its two rivals, by name."""
    wanted = {"recipe": "mobilenet_v2", "size": 224, "batch": 8, "threads": threads}
    rows = [row for row in adaptation["cases"] if all(row[name] == value for name, value in wanted.items())]
    return {row["rival"]: row for row in rows if row["rival"] in (OURS, FULL)}


def _step_rows(adaptation: dict[str, Any]) -> list[Row]:
    rows = []
    for threads in (1, 2):
        rivals = _usual_step(adaptation, threads)
        if len(rivals) < 2:
            continue
        ours, torch = rivals[OURS], rivals[FULL]
        time, memory = (f"{FULL}: not measured ({torch.get('absent')})",) * 2
        if "absent" not in torch:
            time = f"{FULL}: {torch['step_ms']:.0f} ms (ratio {ours['time_ratio']:.2f})"
            memory = f"torch: {_mib(torch)} MiB (ratio {ours['memory_ratio']:.2f})"
        what = f"Training step, MobileNetV2, 224 px, 8 images a step, {threads} thread{'s' if threads > 1 else ''}"
        rows += [
            (what, f"{ours['step_ms']:.0f} ms", time),
            ("Peak RSS of that whole process", f"{_mib(ours)} MiB", memory),
        ]
    return rows


def _narrower_rows(adaptation: dict[str, Any]) -> list[Row]:
    ours, torch = (_usual_step(adaptation)[rival] for rival in (OURS, FULL))
    what = "With 1 thread on a processor that has AVX2 and no AVX-512"
    time = f"{FULL}: {torch['step_ms']:.0f} ms (ratio {ours['time_ratio']:.2f})"
    return [(what, f"{ours['step_ms']:.0f} ms, {_mib(ours)} MiB", time)]


def _accuracy_rows(accuracy: dict[str, Any]) -> list[Row]:
    tasks = accuracy[BACKBONE]
    rows = []
    for task in TASKS:
        row, linear = tasks[task]["ksm"], tasks[task].get("linear")
        low, high = (f"{100 * end:.1f}" for end in row["test_accuracy_range"])
        spread = f" ({low} to {high}, {len(row['seeds'])} seeds)" if len(row["seeds"]) > 1 else " (one seed)"
        value = f"{100 * row['test_accuracy']:.1f} %{spread}"
        beside = "classifier only: " + ("not measured" if linear is None else _with_remark(linear))
        what = f"Test accuracy, {task}, 160 px" + remark(row["earlier"])
        rows.append((what, value, beside))
    sizes = [tasks[task]["ksm"]["pack_bytes"] / 1e3 for task in TASKS]
    minutes = [tasks[task]["ksm"]["wall_seconds"] / 60 for task in TASKS]
    pack = (
        f"{min(sizes):.0f} to {max(sizes):.0f} kB",
        f"learned in {min(minutes):.0f} to {max(minutes):.0f} minutes each",
    )
    return [*rows, ("Task pack of those", *pack), *_few_rows(tasks)]


def _with_remark(row: dict[str, Any]) -> str:
    return f"{100 * row['test_accuracy']:.1f} %{remark(row['earlier'])}"


def _few_rows(tasks: dict[str, Any]) -> list[Row]:
    """From ten images a class, where all five were learned."""
    few = [tasks.get(f"{task}@10", {}) for task in TASKS]
    ours, linear = ([found.get(method) for found in few] for method in ("ksm", "linear"))
    if None in (*ours, *linear):
        return []
    mean, beside = (100 * sum(row["test_accuracy"] for row in rows) / len(rows) for rows in (ours, linear))
    seeds = min(len(row["seeds"]) for row in ours)
    value = f"{mean:.1f} % ({seeds} seeds)" if seeds > 1 else f"{mean:.1f} % (one seed)"
    what = "The same five from ten images a class, mean" + remark({name for row in ours for name in row["earlier"]})
    earlier = {name for row in linear for name in row["earlier"]}
    return [(what, value, f"classifier only: {beside:.1f} %{remark(earlier)}")]


def _forgetting_rows(found: dict[str, Any]) -> list[Row]:
    what = f"{found['tasks']} tasks learned one after the other: largest loss of any of them behind the last"
    value = f"{100 * found['largest_loss']:.2f} points of {100 * found['after_learning']:.1f} %"
    return [(what, value, f"all their packs together: {found['pack_bytes'] / 1e3:.0f} kB")]


def _latency_rows(latency: dict[str, Any]) -> list[Row]:
    fused, plain = latency["sessions"]["fused"], latency["sessions"]["plain"]
    beside = f"plain backbone: {plain['p50_ms']:.1f} ms (ratio {fused['p50_ratio']:.2f})"
    return [("Inference with a task fused, p50", f"{fused['p50_ms']:.1f} ms", beside)]


def _pack_rows(pack: dict[str, Any]) -> list[Row]:
    times = pack["times"]["mobilenet_v2"]
    beside = f"making an ONNX Runtime session: {times['session_ms']:.0f} ms (ratio {times['ratio']:.2f})"
    return [
        ("A task from its pack's bytes to fused weights", f"{times['decode_ms'] + times['fuse_ms']:.1f} ms", beside)
    ]


def _plan_rows(prediction: dict[str, Any], memory: dict[str, Any]) -> list[Row]:
    left_out = prediction["left_out"]
    boards = len({row["board"] for row in left_out["rows"]})
    error = f"median error {left_out['median_error']:.0%}, worst factor {left_out['worst_factor']:.2f}"
    held = f"held to what was expected: {memory['exceeded'] or 'none'} stopped"
    peaks = f"{memory['least']:.2f} to {memory['most']:.2f} of what was measured"
    return [
        (f"Latency predicted for each of {boards} boards that the fit has not seen", error, "as others published it"),
        ("Peak memory that adaptation is planned with", peaks, held),
    ]


def _start_rows(startup: dict[str, Any]) -> list[Row]:
    commands = startup["commands"]
    row = commands["ksm-edge --help"]
    heavy = [name for name in ("torch", "onnxruntime") if name in row["heavy_imports"]]
    imports = f"imports {' and '.join(heavy)}" if heavy else "no torch, no onnxruntime"
    beside = f"Python alone: {commands['python alone']['seconds']:.2f} s; {imports}"
    return [("`ksm-edge --help`", f"{row['seconds']:.2f} s", beside)]


def _demo_rows(demo: dict[str, Any]) -> list[Row]:
    value = f"{100 * demo['test_accuracy']:.1f} % of held-out digits in {demo['wall_seconds']:.0f} s"
    beside = f"pack {demo['pack_bytes'] / 1e3:.0f} kB, peak RSS {_mib(demo)} MiB"
    return [("`ksm-edge adapt --device jetson` (emulated)", value, beside)]


def _mib(row: dict[str, Any]) -> str:
    return f"{row['peak_rss_bytes'] / 2**20:.0f}"


def machines(content: Mapping[str, Any]) -> set[str]:
    """What a file of results was measured on: each run of a grid may have had a machine of its own."""
    of_runs = [run.get("machine") for run in content.get("runs", []) if isinstance(run, Mapping)]
    return {_named(machine) for machine in (content["machine"], *of_runs) if machine and "cpu" in machine}


def _named(machine: Mapping[str, Any]) -> str:
    cores = machine["cores"]
    return f"{machine['cpu']}, {cores} core{'s' if cores > 1 else ''}"


def _origin(results: dict[str, dict[str, Any]]) -> str:
    """Where and when, and whether the machine was disturbed."""
    used = sorted(set().union(*map(machines, results.values())))
    days = sorted({content["after"]["time"][:10] for content in results.values()})
    disturbed = [name for name, content in results.items() if content["warnings"]]
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    busy = f" Something else ran on the machine during: {', '.join(disturbed)}." if disturbed else ""
    tasks = results["accuracy"]["summary"][BACKBONE]
    shown = [tasks.get(task + few, {}) for task in TASKS for few in ("", "@10")]
    changed = any(found[method]["earlier"] for found in shown for method in ("ksm", "linear") if method in found)
    since = " In brackets: what has changed since a task was learned ([more](docs/accuracy.md))." if changed else ""
    return (
        f"{'; '.join(used)}; {when}.{busy} Written by `scripts/readme_table.py` from `benchmarks/results/`. "
        f"Classifier only: logistic regression on the features of the same frozen backbone.{since}"
    )


if __name__ == "__main__":
    sys.exit(main())
