"""What the C is compiled with, whichever the compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Writes down what it is asked for, and makes files of nothing.
COMPILER = """#!/bin/sh
for word; do case $word in {unknown}) exit 1 ;; esac; done
echo "$@" >> {log}
for word; do [ "$before" = -o ] && : > "$word"; before=$word; done
exit 0
"""
IN_PAIRS = ["-mno-early-ldp-fusion", "-mno-late-ldp-fusion"]
STRICT = ["-Werror"]  # where a distribution's own flags are warned of
OF_GCC = ["-fno-tree-loop-distribute-patterns", "-Wno-psabi"]
SOURCES = {f"ksm_edge/{name}.c" for name in ("_native", "_operators", "_halves_plain", "_loops_avx2")}


def flags_of_sources(folder: Path, unknown: Sequence[str]) -> dict[str, set[str]]:
    """What each is compiled with by a compiler that refuses those flags."""
    compiler, log = folder / "cc", folder / "log"
    compiler.write_text(COMPILER.format(unknown="|".join(unknown), log=log))
    compiler.chmod(0o755)
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(folder), "--build-temp", str(folder)]
    environment = {**os.environ, "CC": str(compiler)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    compilations = [line.split() for line in log.read_text().splitlines()]
    return {source: set(words) for words in compilations for source in SOURCES & set(words)}


@pytest.mark.parametrize(
    "unknown",
    [["-none"], IN_PAIRS, [*IN_PAIRS, *OF_GCC], STRICT, [*STRICT, *IN_PAIRS]],
    ids=["gcc 14, Arm", "gcc", "clang", "gcc 14, Arm, with warnings", "gcc with warnings"],
)
def test_a_compiler_is_asked_for_all_that_it_knows(unknown: list[str], tmp_path: Path) -> None:
    found = flags_of_sources(tmp_path, unknown)
    assert found.keys() == SOURCES
    for source, flags in found.items():
        wanted = {"-O3", "-fno-math-errno", *IN_PAIRS}
        wanted |= {"-ffp-contract=off"} if source == "ksm_edge/_native.c" else set(OF_GCC)
        assert wanted - set(unknown) <= flags
        assert not flags & set(unknown)


def test_what_another_compiler_made_is_made_again(tmp_path: Path) -> None:
    for unknown in ([*IN_PAIRS, *OF_GCC], IN_PAIRS):
        (tmp_path / "log").unlink(missing_ok=True)
        found = flags_of_sources(tmp_path, unknown)
        assert found.keys() == SOURCES
    assert set(OF_GCC) <= found["ksm_edge/_operators.c"]
