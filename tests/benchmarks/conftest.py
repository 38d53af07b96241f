from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Import a script that is no part of the package, by name."""
    there = set(sys.modules)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.syspath_prepend(ROOT / "scripts")
    yield importlib.import_module
    scripts = {path.stem for folder in ("benchmarks", "scripts") for path in (ROOT / folder).glob("*.py")}
    for name in scripts & (set(sys.modules) - there):
        del sys.modules[name]
