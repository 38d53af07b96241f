"""What `import ksm_edge` hands on, and what it must not cost."""

from __future__ import annotations

import importlib.metadata
import inspect
import subprocess
import sys

import pytest

import ksm_edge

HEAVY = ("onnxruntime", "torch", "onnx", "PIL", "numpy")


def imported_by(statement: str) -> set[str]:
    """Top-level modules that a fresh process holds after `statement`."""
    code = f"import sys; {statement}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_public_names_are_these() -> None:
    assert sorted(ksm_edge.__all__) == [
        "App",
        "Device",
        "KsmEdgeError",
        "Prediction",
        "Settings",
        "__version__",
        "adapt_task",
        "fuse_weights",
        "load_bundle",
        "load_pack",
        "open_image_set",
        "save_pack",
    ]
    assert dir(ksm_edge) == sorted(ksm_edge.__all__)
    assert {*ksm_edge._HOMES, "__version__"} == {*ksm_edge.__all__}


@pytest.mark.parametrize("name", sorted(set(ksm_edge.__all__) - {"__version__"}))
def test_every_public_name_is_there_and_documented(name: str) -> None:
    value = getattr(ksm_edge, name)
    assert value.__doc__
    assert value is getattr(ksm_edge, name)
    assert not inspect.ismodule(value), "a submodule of that name hides it"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'ksm_edge' has no attribute 'Model'"):
        _ = ksm_edge.Model


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert not imported_by("import ksm_edge") & set(HEAVY)


def test_that_check_can_fail() -> None:
    assert "onnxruntime" in imported_by("import ksm_edge, onnxruntime")
    assert "numpy" in imported_by("import ksm_edge; ksm_edge.load_pack")


def test_the_version_is_the_distributions() -> None:
    try:
        distribution = importlib.metadata.version("ksm-edge")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("ksm-edge is not installed, only on the path")
    assert distribution == ksm_edge.__version__
