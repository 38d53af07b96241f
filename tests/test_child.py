"""A part of the package in a process of its own: this very package, whatever lies in the working directory."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import ksm_edge
from ksm_edge.child import module_command


def run(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = module_command("ksm_edge", *words)
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("safe", [{}, {"PYTHONSAFEPATH": "1"}])
def test_words_arrive_and_the_exit_status_comes_back(tmp_path: Path, safe: dict[str, str]) -> None:
    assert run(tmp_path, "--version", **safe).stdout == f"ksm-edge {ksm_edge.__version__}\n"
    assert run(tmp_path, "inspect", "absent.ksm", **safe).returncode == 3


@pytest.mark.parametrize("name", ["json.py", "argparse.py", "ksm_edge.py"])
def test_nothing_in_the_working_directory_is_imported(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("raise SystemExit('imported from the working directory')\n")
    assert run(tmp_path, "--version").returncode == 0
