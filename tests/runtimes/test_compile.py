"""Compiled graphs: kept, told apart, and made again where a power cut has left half of one."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from tiny import saved_tiny_bundle

from ksm_edge.autodiff.spec import GradientSpec
from ksm_edge.bundle.layers import Bundle
from ksm_edge.errors import KsmEdgeError
from ksm_edge.fuse import fuse
from ksm_edge.runtimes import cache
from ksm_edge.runtimes.compile import compile_graph, compiled
from ksm_edge.runtimes.gradient import GradientSession
from ksm_edge.runtimes.onnxruntime import Session

SPEC = GradientSpec(micro_batch=1, size=16, classes=3, trained=frozenset({"plain"}))
IN_CHILD = cache.make_in_child  # for which other tests have something else


@pytest.fixture(autouse=True)
def _compiled_in_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "make_in_child", IN_CHILD)


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    monkeypatch.setenv("KSM_EDGE_CACHE", str(tmp_path / "cache"))
    return saved_tiny_bundle(tmp_path / "bundle")


def test_a_graph_is_compiled_once(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    first = compiled(bundle, SPEC)

    def again(*_: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(cache, "make_in_child", again)
    assert compiled(bundle, SPEC) == first
    assert [path.name for path in first.path.parent.parent.iterdir()] == [first.path.parent.name]


@pytest.mark.parametrize("name", ["graph.json", "graph.onnx", "constants"])
@pytest.mark.parametrize("left", [b"", b"{}", None])
def test_half_a_graph_is_made_again(bundle: Bundle, name: str, left: bytes | None) -> None:
    first = compiled(bundle, SPEC)
    path = first.path.with_name(name)
    if name == "constants" and left is None and not path.exists():
        pytest.skip("without AVX-512 this network's constants are few enough to stay in the graph")
    path.unlink() if left is None else path.write_bytes(left)
    assert compiled(bundle, SPEC) == first
    assert onnx.load(first.path).graph.node


def test_a_compiled_graph_has_the_constants_that_it_was_given(bundle: Bundle) -> None:
    """None of them is left in a file that is no longer there, and all layers together give the same features."""
    graph = compiled(bundle, replace(SPEC, trained=frozenset(), backward=False, classes=0))
    for tensor in onnx.load(graph.path, load_external_data=False).graph.initializer:
        for entry in tensor.external_data:
            assert entry.key != "location" or entry.value == cache.CONSTANTS
    session, plain = GradientSession(graph, {}), Session(bundle.graph_path, fuse(bundle, None))
    session.image[:] = np.random.default_rng(0).standard_normal(session.image.shape)
    session.run()
    np.testing.assert_allclose(session.output("features"), plain.run(session.image), rtol=1e-4, atol=1e-5)


def test_another_release_of_the_runtime_has_its_own_graphs(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    assert onnxruntime.__version__ in cache._runtime()
    key = cache.key_of(bundle)
    monkeypatch.setattr(cache, "_runtime", lambda: "another")
    assert cache.key_of(bundle) != key


def test_other_graphs_have_other_places(bundle: Bundle) -> None:
    other = GradientSpec(micro_batch=2, size=16, classes=3, trained=SPEC.trained)
    assert compiled(bundle, SPEC).path != compiled(bundle, other).path


def test_graphs_that_were_used_last_are_kept_and_no_more(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "KEPT", 2)
    first, second, third = (replace(SPEC, classes=classes) for classes in (3, 4, 5))
    folders = {}
    for age, spec in ((300, first), (200, second)):
        folders[spec] = compiled(bundle, spec).path.parent
        then = time.time() - age
        os.utime(folders[spec], (then, then))
    compiled(bundle, first)  # now the one used last
    folders[third] = compiled(bundle, third).path.parent
    assert set(folders[first].parent.iterdir()) == {folders[first], folders[third]}


def test_fewer_graphs_than_may_be_are_all_kept(bundle: Bundle) -> None:
    graphs = Path(os.environ["KSM_EDGE_CACHE"], "graphs")
    others = {graphs / str(number) for number in range(cache.KEPT - 1)}
    for folder in others:
        folder.mkdir(parents=True)
    made = compiled(bundle, SPEC).path.parent
    assert set(graphs.iterdir()) == {made, *others}


def test_a_graph_is_kept_while_a_training_has_it(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "KEPT", 1)
    held = compiled(bundle, SPEC)
    another_process = "import sys, pathlib; from ksm_edge.runtimes import cache; cache.KEPT = 1; "
    another_process += "cache._evict(pathlib.Path(sys.argv[1]))"
    (newer := held.path.parent.with_name("newer")).mkdir()
    evict = [sys.executable, "-c", another_process, str(newer)]
    subprocess.run(evict, check=True)
    assert held.path.exists()
    folder = held.path.parent
    del held
    gc.collect()
    subprocess.run(evict, check=True)
    assert not folder.exists()


def test_a_clock_that_was_set_back_does_not_cost_the_graph_just_made(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "KEPT", 2)
    graphs, later = Path(os.environ["KSM_EDGE_CACHE"], "graphs"), time.time() + 3600
    for name, at in (("a", later), ("b", later + 1), (".new-x", 1.0)):  # the last one left by a power cut
        (graphs / name).mkdir(parents=True)
        os.utime(graphs / name, (at, at))
    made = compiled(bundle, SPEC).path.parent
    assert set(graphs.iterdir()) == {made, graphs / "b"}


def make_marker(folder: Path, text: str = "ours") -> None:
    folder.mkdir(exist_ok=True)
    (folder / cache.DESCRIPTION).write_text(text)


def read_marker(folder: Path) -> str:
    text = (folder / cache.DESCRIPTION).read_text()
    if text == "half":
        raise ValueError(text)
    return text


def test_what_another_process_has_made_meanwhile_is_taken(bundle: Bundle) -> None:
    graphs = Path(os.environ["KSM_EDGE_CACHE"], "graphs")

    def make(folder: Path) -> None:
        make_marker(folder)
        make_marker(graphs / "key", "theirs")

    assert cache.found_or_made("key", read_marker, make) == "theirs"
    assert [path.name for path in graphs.iterdir()] == ["key"]


@pytest.mark.parametrize("there", ["half a graph", "a file"])
def test_what_is_not_whole_is_replaced(bundle: Bundle, there: str) -> None:
    graphs = Path(os.environ["KSM_EDGE_CACHE"], "graphs")
    graphs.mkdir(parents=True)
    if there == "a file":
        (graphs / "key").write_text("no folder")
    else:
        make_marker(graphs / "key", "half")
    assert cache.found_or_made("key", read_marker, make_marker) == "ours"
    assert [path.name for path in graphs.iterdir()] == ["key"]


def test_a_cache_that_may_only_be_read_is_said(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(**_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(cache.tempfile, "TemporaryDirectory", read_only)
    with pytest.raises(
        KsmEdgeError, match=r"cannot be written: Read-only file system; give another one as KSM_EDGE_CA"
    ):
        compiled(bundle, SPEC)


def test_what_goes_wrong_in_the_child_is_said_here(bundle: Bundle) -> None:
    (bundle.path / "backbone.onnx").write_bytes(b"no graph")
    with pytest.raises(KsmEdgeError, match=r"backbone\.onnx"):
        compiled(bundle, SPEC)


def test_a_disk_without_room_is_said_before_anything_is_written(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100, total=1000))
    (folder := tmp_path / "made").mkdir()
    with pytest.raises(
        KsmEdgeError, match=r"takes 1 MiB of the disk under .*, of which 0 MiB are free.*KSM_EDGE_CACHE"
    ):
        compile_graph(bundle, SPEC, folder)
    assert list(folder.iterdir()) == []


def test_a_disk_that_fills_up_meanwhile_is_an_error_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def make() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path))

    assert cache.in_child(make) == KsmEdgeError.exit_code
    assert capsys.readouterr().err == f"{tmp_path}: No space left on device\n"
