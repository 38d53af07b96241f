"""Fixtures for all tests, and the folder of the tests' own modules (`tiny`, `signing`, `torch_oracle`) on the path."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from signing import KeyFiles

    from ksm_edge.bundle.layers import Bundle

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real datasets and pretrained weights, which a clone of the project does not have."""
    folder = Path(os.environ.get("KSM_EDGE_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set KSM_EDGE_DATA to a folder that has it")
    return folder


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Compiled graphs go into the run's own folder, so that no test sees an older run's."""
    os.environ["KSM_EDGE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True, scope="session")
def _compiled_here() -> Iterator[None]:
    """Graphs of tests are compiled by the tests' own process: a child would mostly be importing.

    In tests/runtimes/test_compile.py a child does it, and in whatever a test runs as a subprocess.
    """
    from ksm_edge.bundle.load import load_bundle
    from ksm_edge.runtimes import cache, compile

    in_child = cache.make_in_child

    def make(module: str, bundle: Bundle, folder: Path, given: str = "") -> None:
        if module != compile.__name__:
            in_child(module, bundle, folder, given)
            return
        compile.compile_graph(load_bundle(bundle.path), compile.spec_of(json.loads(given)), folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "make_in_child", make)
        yield


@pytest.fixture(scope="session")
def key_files(tmp_path_factory: pytest.TempPathFactory) -> KeyFiles:
    """Two pairs of Ed25519 keys in PEM files."""
    from signing import write_key_files

    return write_key_files(tmp_path_factory.mktemp("keys"))


@pytest.fixture(autouse=True, scope="session")
def _interruptible() -> None:
    """Signals do what they do in a terminal, also in the background or under nohup, which ignore some of them."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(params=["C", "numpy"], scope="module")
def each_form(request: pytest.FixtureRequest) -> Iterator[None]:
    """A module's tests once with the compiled loops and once with the numpy forms beside them."""
    from ksm_edge import native

    if request.param == "C" and native.loops is None:
        pytest.skip("no compiled loops: the package was installed without a C compiler")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "numpy":
            patch.setattr(native, "loops", None)
        yield
