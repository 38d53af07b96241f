"""Imports only point down: the floors of the design, held by reading every import statement."""

from __future__ import annotations

import ast
from pathlib import Path

import ksm_edge

ROOT = Path(ksm_edge.__file__).parent
# From the top. What stands on one line must not import each other, and nothing imports a line above its own.
FLOORS = """
__main__
cli
exporter
adapt app profiler
training
runtimes
autodiff
fuse
bundle pack data
mask coding device limits
resources atomic resident native child cores
errors known_answers
"""
LEVEL = {part: level for level, line in enumerate(FLOORS.split("\n")) for part in line.split()}
# Each exception with its reason.
ALLOWED = {
    ("pack", "bundle"): "a pack carries the input contract, a record of the bundle's",
    ("data", "bundle"): "preprocessing follows the input contract, a record of the bundle's",
}


def imports_of(source: str) -> set[str]:
    """The parts of ksm_edge that some code imports, wherever in it and for whatever purpose."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("ksm_edge.")}


def upward(part: str, source: str) -> list[str]:
    return [
        f"{part} imports {other}"
        for other in sorted(imports_of(source) - {part, "__version__"})
        if LEVEL[other] <= LEVEL[part] and (part, other) not in ALLOWED
    ]


def test_every_import_points_down() -> None:
    faults = []
    for path in sorted(ROOT.rglob("*.py")):
        part = path.relative_to(ROOT).with_suffix("").parts[0]
        if part != "__init__":
            faults += [f"{path.relative_to(ROOT)}: {fault}" for fault in upward(part, path.read_text())]
    assert not faults


def test_every_part_has_its_floor() -> None:
    parts = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert parts - {"__init__", "embedded", "recipes", "devices"} <= LEVEL.keys()


def test_that_check_can_fail() -> None:
    assert upward("autodiff", "from ksm_edge.mask import expand") == []
    assert upward("mask", "def f():\n    from ksm_edge.fuse import fuse") == ["mask imports fuse"]
    assert upward("app", "import ksm_edge.adapt.journey") == ["app imports adapt"]
    assert upward("runtimes", "from ksm_edge import exporter") == ["runtimes imports exporter"]
    assert upward("pack", "from ksm_edge.data.image import open_rgb") == ["pack imports data"]
