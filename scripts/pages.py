"""Write the tables of pages under docs/ from what the benchmarks measured, each between its two marker lines.

    python scripts/pages.py            # write them
    python scripts/pages.py --check    # exit status 1 where a page says something else

Every number comes from benchmarks/results/; nothing is measured here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from readme_table import ROOT, between, load, machines

sys.path.insert(0, str(ROOT / "benchmarks"))
import accuracy_tables  # found by the line above
from levers import ERRORS
from methods import METHODS, title

DOCS = ROOT / "docs"
RESULTS = ROOT / "benchmarks" / "results"
MIB = 1 << 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where a page differs")
    options = parser.parse_args()
    differing = []
    for name, tables in PAGES.items():
        page = DOCS / name
        wanted = text = page.read_text()
        for marker, (result, table) in tables.items():
            wanted = between(wanted, marker, table(load(RESULTS, result)), page)
        if wanted != text:
            differing.append(page)
            if not options.check:
                page.write_text(wanted)
    if options.check and differing:
        print(f"{', '.join(map(str, differing))}: not the tables of {RESULTS}: run python scripts/pages.py")
        return 1
    return 0


def bits_tables(content: Mapping[str, Any]) -> str:
    """A table for each setting that tasks were learned with."""
    parts = []
    for setting, found in content["summary"].items():
        lines = [
            f"Learned as `adapt --join-at 1{'' if setting == 'default' else ' --small'}` does, {found['runs']} runs "
            f"({', '.join(found['tasks'])}; mean accuracy {100 * found['rows']['unquantized']['accuracy']:.2f} %, "
            f"cross-entropy {found['rows']['unquantized']['cross_entropy']:.4f}):",
            "",
            "| bits | accuracy, points | cross-entropy | pack, kB |",
            "|---|---|---|---|",
        ]
        for name, row in found["rows"].items():
            if name != "unquantized":
                lines.append(f"| {name} | {_change(row, 'accuracy', 100, 2)} | {_change(row, 'cross_entropy', 1, 4)} | "
                             f"{row['pack_bytes'] / 1e3:.1f} |")  # fmt: skip
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, _origin(content)])


def _change(row: Mapping[str, Any], name: str, factor: float, digits: int) -> str:
    change, error = factor * row[f"{name}_change"], factor * row.get(f"{name}_change_error", 0)
    return f"{change:+.{digits}f} ± {error:.{digits}f}"


# The backbones that a task's bytes are set against accuracy on.
BYTES_OF = ("mobilenet_v2, 96 px", "resnet20_cifar10, 32 px")
BYTES_TASKS = ("gtsrb43", "pacs_sketch7", "trashnet")


def pareto_tables(content: Mapping[str, Any]) -> str:
    """A table for each backbone: test accuracy and kB of each method on each task."""
    parts = []
    for backbone in BYTES_OF:
        tasks = content["summary"][backbone]
        names = [name for name in BYTES_TASKS if name in tasks]
        lines = [f"{backbone}:", "", f"| test accuracy, kB | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
        for key in METHODS:
            rows = [tasks[name].get(key) for name in names]
            if any(rows):
                name = title(key, {setting for row in rows if row for setting in row["earlier"]})
                lines.append(f"| {name} | {' | '.join(map(_cell, rows))} |")
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, _origin(content)])


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "not measured"
    seeds = f" ({len(row['seeds'])} seeds)" if len(row["seeds"]) > 1 else ""
    return f"{100 * row['test_accuracy']:.1f} %, {row['pack_bytes'] / 1e3:,.1f}{seeds}"


def app_tables(content: Mapping[str, Any]) -> str:
    """Loading part by part, and memory."""
    found = content["summary"]
    parts = [part for part in content["runs"][0] if part not in ("way", "bytes")]
    lines = [
        f"From disk to the first answer, MobileNetV2, {content['settings']['size']} px, one thread, ms:",
        "",
        f"| a task as | {' | '.join(parts)} | total | ratio | bytes read |",
        f"|---|{'---|' * len(parts)}---|---|---|",
    ]
    for name, row in found["loads"].items():
        times = " | ".join(f"{row[part]:.1f}" for part in (*parts, "total"))
        lines.append(f"| {name} | {times} | {row['ratio']:.2f} | {row['bytes'] / 1e3:,.0f} kB |")
    alone, *_, among = found["by_processes"].values()
    count = list(found["by_processes"])[-1]
    lines += [
        "",
        "| | |",
        "|---|---|",
        f"| switch to a task that is ready | {found['ready_switch_ms']:.3f} ms |",
        f"| memory of a task that is loaded | {found['loaded_task_ratio']:.2f} x its pack |",
        f"| {content['settings']['tasks']} tasks, {found['switches']:,} switches among all of them, peak RSS | "
        f"{found['peak_rss_bytes'] / MIB:.0f} MiB of the {found['budget_bytes'] / MIB:.0f} MiB budget of "
        f"{found['board']} (emulated: a watchdog on resident memory held it) |",
        f"| growth per 1000 of those switches | {1e3 * found['leak_bytes_per_switch'] / 1024:.1f} KiB |",
        f"| a process with one task ready, alone: RSS, PSS | {_mib(alone)} |",
        f"| each of {count} such processes on one bundle: RSS, PSS | {_mib(among)} |",
    ]
    return "\n".join([*lines, "", _origin(content)])


def prediction_tables(content: Mapping[str, Any]) -> str:
    """Predicted beside published, of boards that took no part in the fit."""
    found = content["summary"]
    left_out, training = found["left_out"], found["training"]
    lines = [
        f"Each board predicted by a fit that has not seen it: median error {left_out['median_error']:.0%}, "
        f"worst factor {left_out['worst_factor']:.2f}.",
        "",
        *_prediction_rows(left_out["rows"]),
        "",
        "Reported apart: half precision, which the fit has no row of, and another engine's kernels.",
        "",
        *_prediction_rows(found["reported"]),
        "",
        f"The one GPU that figures are published of, each network predicted from its other three alone: median error "
        f"{found['gpu']['median_error']:.0%}, worst factor {found['gpu']['worst_factor']:.2f}. No runtime of this "
        "project uses a GPU, so `--predict` has none.",
        "",
        *_prediction_rows(found["gpu"]["rows"]),
        "",
        f"Training with PyTorch 1.13, ms an image, each network predicted from the other three: worst error "
        f"{training['worst_error']:.0%}.",
        "",
        *_prediction_rows(training["rows"]),
        "",
        "Gradients of a step of 8 images on this machine, against what their operators would take at inference: the",
        f"median of the ratios, {found['adaptation']['factor']:.2f}, is what predictions of adaptation are multiplied "
        "by.",
        "",
        "| network | measured, ms | counted, ms | ratio |",
        "|---|---|---|---|",
    ]
    for name, row in found["adaptation"]["rows"].items():
        lines.append(f"| {name} | {row['measured_ms']:.0f} | {row['counted_ms']:.0f} | {row['ratio']:.2f} |")
    return "\n".join([*lines, "", _origin(content)])


def _prediction_rows(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["| board | threads | network | published, ms | predicted, ms | ratio |", "|---|---|---|---|---|---|"]
    for row in rows:
        network = row["network"] + (", all weights" if row["training"] else "")
        lines.append(f"| {row['board']} | {row['threads']} | {network} | {row['ms']:.1f} | {row['predicted_ms']:.1f} | "
                     f"{row['ratio']:.2f} |")  # fmt: skip
    return lines


def memory_tables(content: Mapping[str, Any]) -> str:
    """Expected and measured peaks of whole adaptations."""
    found = content["summary"]
    lines = [
        f"Expected over measured: {found['least']:.2f} to {found['most']:.2f}; every run was held to what was "
        f"expected, and {found['exceeded'] or 'none'} was stopped.",
        "",
        "| backbone | pixels | `adapt` with | expected, MiB | measured, MiB |",
        "|---|---|---|---|---|",
    ]
    for run in content["runs"]:
        sizes = " | ".join(f"{run[name] / MIB:.0f}" for name in ("expected_bytes", "peak_rss_bytes"))
        lines.append(f"| {run['recipe']} | {run['size']} | {' '.join(run['options'])} | {sizes} |")
    return "\n".join([*lines, "", _origin(content)])


def lever_tables(content: Mapping[str, Any]) -> str:
    """Time and memory of each network by each way."""
    settings = content["settings"]
    lines = [
        f"Steps of {settings['batch']} images at {settings['size']} px, one thread:",
        "",
        "| network | what is changed | step, ms | / as usual | peak RSS, MiB | gradients err by | at most |",
        "|---|---|---|---|---|---|---|",
    ]
    for recipe, levers in content["summary"].items():
        for lever, row in levers.items():
            errors = (f"{row[name]:.0e}".replace("0e+00", "0") if name in row else "" for name in ERRORS)
            lines.append(f"| {recipe} | {lever} | {row['step_ms']:.0f} | {row['time_ratio']:.2f} | "
                         f"{row['peak_rss_bytes'] / MIB:.0f} | {' | '.join(errors)} |")  # fmt: skip
    return "\n".join([*lines, "", _origin(content)])


def step_tables(content: Mapping[str, Any]) -> str:
    """A step of every network by every rival."""
    lines = [
        "| network | px | images | threads | by | step, ms | / torch, full fine-tuning | of the arithmetic bound | "
        "peak RSS, MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in content["summary"]["cases"]:
        rival = row["rival"] + ("" if row.get("learns", True) else " (its loss did not fall)")
        case = [row["recipe"], *(str(row[name]) for name in ("size", "batch", "threads")), rival]
        if "absent" in row:
            cells = ["not measured", row["absent"], "", ""]
        else:
            ratio = f"{row['time_ratio']:.2f}" if "time_ratio" in row else ""
            share = f"{row['bound_ms'] / row['step_ms']:.0%}" if "bound_ms" in row else ""
            memory = f"{row['peak_rss_bytes'] / MIB:.0f}"
            cells = [f"{row['step_ms']:.0f}", ratio, share, memory]
        lines.append(f"| {' | '.join([*case, *cells])} |")
    return "\n".join([*lines, "", _origin(content)])


def layer_tables(content: Mapping[str, Any]) -> str:
    """What is lost where only some layers change."""
    lines = [
        "MobileNetV2 at 96 px, accuracy on the 30 % of the images that were held out throughout, over tasks and seeds, "
        "against the same runs with all layers:",
        "",
        "| options | runs | accuracy | change, points | pack, kB |",
        "|---|---|---|---|---|",
    ]
    for way, row in content["summary"].items():
        change = "" if row["accuracy_change_error"] is None else _change(row, "accuracy", 100, 2)
        lines.append(f"| {_way(way)} | {row['runs']} | {100 * row['accuracy']:.2f} % | {change} | "
                     f"{row['pack_bytes'] / 1e3:.1f} |")  # fmt: skip
    return "\n".join([*lines, "", _origin(content)])


def layer_step_tables(content: Mapping[str, Any]) -> str:
    """What it saves."""
    lines = [
        "A step of 8 images of 224 px with one thread, and in it the time that views take, shared out over 8 epochs:",
        "",
        "| options | step, ms | / torch, full fine-tuning | peak RSS, MiB |",
        "|---|---|---|---|",
    ]
    for way, row in content["summary"].items():
        lines.append(f"| {_way(way)} | {row['step_ms']:.0f} | {row['ratio']:.2f} | {row['peak_rss_bytes'] / MIB:.0f} |")
    return "\n".join([*lines, "", _origin(content)])


def _way(way: str) -> str:
    """Options of `adapt` as benchmarks/layers.py has them, or a rival's name."""
    words = " ".join(f"--{part.replace('=', ' ')}" for part in way.split())
    return f"`{words}`" if "=" in way else way or "all layers"


def runtime_tables(content: Mapping[str, Any]) -> str:
    """Opening, keeping and running tasks, way by way."""
    lines = [
        f"MobileNetV2, {content['settings']['size']} px, one core, one image:",
        "",
        "| | first task, ms | next ones, ms | an answer, ms | RSS before any task | with 1, 2, 5 tasks |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in content["summary"]["ways"].items():
        times = " | ".join(f"{row[key]:.1f}" for key in ("first_ms", "next_ms", "run_ms"))
        rss = ", ".join(f"{value / MIB:.0f}" for value in row["rss_bytes"].values())
        lines.append(f"| {name} | {times} | {row['before_bytes'] / MIB:.0f} MiB | {rss} MiB |")
    return "\n".join([*lines, "", _origin(content)])


def _mib(row: Mapping[str, float]) -> str:
    return f"{row['rss_bytes'] / MIB:.0f} MiB, {row['pss_bytes'] / MIB:.0f} MiB"


def _origin(content: Mapping[str, Any]) -> str:
    return (
        f"{'; '.join(sorted(machines(content)))}; {content['after']['time'][:10]}; raw values in `benchmarks/results/`."
    )


def forgetting_tables(content: Mapping[str, Any]) -> str:
    """The suite learned in its order, each task judged twice."""
    found = content["summary"]
    lines = [
        "| task | when it was learned, % | behind the last task, % | pack, kB |",
        "|---|---|---|---|",
        *(
            f"| {run['task']} | {100 * run['after_learning']:.2f} | {100 * run['after_all']:.2f} | "
            f"{run['pack_bytes'] / 1e3:.1f} |"
            for run in content["runs"]
        ),
        f"| mean; all {found['tasks']} packs | {100 * found['after_learning']:.2f} | {100 * found['after_all']:.2f} | "
        f"{found['pack_bytes'] / 1e3:.0f} |",
        "",
        f"Largest loss of any task: {100 * found['largest_loss']:.2f} points. {found['digests_compared']} times a "
        "task's pack and fused weights were compared with what they were when it was learned, by SHA-256.",
    ]
    return "\n".join([*lines, "", _origin(content)])


# Of each page its markers, and the result and function that each one's table comes from.
Table = Callable[[Mapping[str, Any]], str]
PAGES: dict[str, dict[str, tuple[str, Table]]] = {
    "accuracy.md": {
        "methods": ("accuracy", accuracy_tables.method_tables),
        "few": ("accuracy", accuracy_tables.few_tables),
        "counts": ("accuracy", accuracy_tables.count_tables),
        "suite": ("accuracy", accuracy_tables.suite_tables),
        "forgetting": ("forgetting", forgetting_tables),
        "ablations": ("accuracy", accuracy_tables.ablation_tables),
        "crops": ("accuracy", accuracy_tables.crop_tables),
    },
    "pack-size.md": {"bits": ("bits", bits_tables), "pareto": ("accuracy", pareto_tables)},
    "engine.md": {
        "steps": ("adaptation", step_tables),
        "steps-avx2": ("adaptation-avx2", step_tables),
        "levers": ("levers", lever_tables),
        "layers": ("layers", layer_tables),
        "layer-steps": ("layer-steps", layer_step_tables),
    },
    "app.md": {"costs": ("apps", app_tables)},
    "mobile.md": {"runtimes": ("runtimes", runtime_tables)},
    "boards.md": {"prediction": ("prediction", prediction_tables), "memory": ("memory", memory_tables)},
}


if __name__ == "__main__":
    sys.exit(main())
