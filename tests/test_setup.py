"""What the C is compiled with, whichever the compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Writes down what it is asked for, and makes files of nothing.
COMPILER = """#!/bin/sh
case "$*" in *ldp-fusion*) {answer} ;; esac
echo "$@" >> {log}
for word; do [ "$before" = -o ] && : > "$word"; before=$word; done
exit 0
"""


def compilations(folder: Path, answer: str) -> list[str]:
    """How each source is compiled by one that answers so to the flags that only some know."""
    compiler, log = folder / "cc", folder / "log"
    compiler.write_text(COMPILER.format(answer=answer, log=log))
    compiler.chmod(0o755)
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(folder), "--build-temp", str(folder)]
    environment = {**os.environ, "CC": str(compiler)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    return [line for line in log.read_text().splitlines() if " -c " in f" {line} "]


@pytest.mark.parametrize(("answer", "is_given"), [("true", True), ("exit 1", False)])
def test_loads_and_stores_are_not_paired_by_a_compiler_that_could(answer: str, is_given: bool, tmp_path: Path) -> None:
    found = compilations(tmp_path, answer)
    assert {"ksm_edge/_native.c", "ksm_edge/_operators.c"} <= {word for line in found for word in line.split()}
    for line in found:
        assert ("-mno-early-ldp-fusion" in line) == ("-mno-late-ldp-fusion" in line) == is_given
