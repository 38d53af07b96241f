"""Write the tables of docs/pack-size.md from what the benchmarks measured, each between its two marker lines.

    python scripts/pack_size_page.py            # write them
    python scripts/pack_size_page.py --check    # exit status 1 where the page says something else

Every number comes from benchmarks/results/bits.json and pareto.json; nothing is measured here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import Any

from readme_table import ROOT, between, load

sys.path.insert(0, str(ROOT / "benchmarks"))
from pareto import METHODS, SIZES  # found by the line above

PAGE = ROOT / "docs" / "pack-size.md"
RESULTS = ROOT / "benchmarks" / "results"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where the page differs")
    options = parser.parse_args()
    text = PAGE.read_text()
    bits, pareto = (load(RESULTS, name) for name in ("bits", "pareto"))
    wanted = between(text, "bits", bits_tables(bits), PAGE)
    wanted = between(wanted, "pareto", pareto_tables(pareto), PAGE)
    if wanted == text:
        return 0
    if options.check:
        print(f"{PAGE}: its tables are not those of {RESULTS}: run python scripts/pack_size_page.py")
        return 1
    PAGE.write_text(wanted)
    return 0


def bits_tables(content: Mapping[str, Any]) -> str:
    """A table for each setting that tasks were learned with."""
    parts = []
    for setting, found in content["summary"].items():
        lines = [
            f"Learned as `adapt{'' if setting == 'default' else ' --small'}` does, {found['runs']} runs "
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


def pareto_tables(content: Mapping[str, Any]) -> str:
    """A table for each backbone: test accuracy and kB of each method on each task."""
    parts = []
    for recipe, tasks in content["summary"].items():
        names = sorted(tasks)
        lines = [f"{recipe}, {SIZES[recipe]} px:", "", f"| test accuracy, kB | {' | '.join(names)} |",
                 f"|---|{'---|' * len(names)}"]  # fmt: skip
        for key, method in METHODS.items():
            rows = [tasks[name].get(key) for name in names]
            if any(rows):
                lines.append(f"| {method.title} | {' | '.join(map(_cell, rows))} |")
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, _origin(content)])


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "not measured"
    seeds = f" ({len(row['seeds'])} seeds)" if len(row["seeds"]) > 1 else ""
    return f"{100 * row['test_accuracy']:.1f} %, {row['pack_bytes'] / 1e3:,.1f}{seeds}"


def _origin(content: Mapping[str, Any]) -> str:
    machine, day = content["machine"], content["after"]["time"][:10]
    return f"{machine['cpu']}, {machine['cores']} cores; {day}; raw values in `benchmarks/results/`."


if __name__ == "__main__":
    sys.exit(main())
