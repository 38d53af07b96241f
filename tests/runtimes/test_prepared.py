"""A prepared graph gives the very features of a session that ONNX Runtime optimises itself."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from tiny import saved_tiny_bundle, tiny_pack

from ksm_edge.app.app import App
from ksm_edge.bundle.layers import Bundle
from ksm_edge.bundle.load import load_bundle
from ksm_edge.errors import KsmEdgeError, UnsupportedError
from ksm_edge.fuse import fuse
from ksm_edge.runtimes import prepared as preparing
from ksm_edge.runtimes.onnxruntime import Session
from ksm_edge.runtimes.prepared import LAYOUTS, Layout, prepare, prepare_graph, prepared


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    monkeypatch.setenv("KSM_EDGE_CACHE", str(tmp_path / "cache"))
    return saved_tiny_bundle(tmp_path / "bundle")


def images(bundle: Bundle, count: int) -> np.ndarray:
    shape = (count, 3, bundle.input.size, bundle.input.size)
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("seed", [1, 2])
def test_features_are_the_same_bit_for_bit(bundle: Bundle, seed: int) -> None:
    weights = fuse(bundle, tiny_pack(seed=seed, cut=0.3, changes={"backbone": bundle.digest}))
    expected = Session(bundle.graph_path, weights)
    found = prepare(bundle).session(weights)
    for count in (1, 3):
        x = images(bundle, count)
        np.testing.assert_array_equal(found.run(x), expected.run(x))


def test_the_embedded_backbone_is_prepared_too(bundle: Bundle) -> None:
    embedded = load_bundle("embedded")
    weights, x = fuse(embedded, None), images(embedded, 2)
    expected = Session(embedded.graph_path, weights).run(x)
    np.testing.assert_array_equal(prepare(embedded).session(weights).run(x), expected)


def test_a_graph_is_prepared_once_and_found_from_then_on(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    assert prepared(bundle) is None
    first = prepare(bundle)
    monkeypatch.setattr("ksm_edge.runtimes.cache.make_in_child", None)
    assert prepare(bundle) == prepared(bundle) == first
    assert len(first.model) < 100_000  # no weights are in it


@pytest.mark.parametrize("name", ["graph.json", "graph.onnx"])
@pytest.mark.parametrize("left", [b"", b"{}", None])
def test_half_a_graph_is_none(bundle: Bundle, tmp_path: Path, name: str, left: bytes | None) -> None:
    prepare(bundle)
    (path,) = (tmp_path / "cache").rglob(name)
    path.unlink() if left is None else path.write_bytes(left)
    assert prepared(bundle) is None
    assert prepare(bundle).initializers


def test_weights_that_the_optimiser_changes_are_refused(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "LAYOUTS", (Layout(7, 1),))
    with pytest.raises(UnsupportedError, match=r"makes something else of the weights here: .*weight"):
        prepare_graph(bundle, tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("shape", [(16, 32, 1, 1), (5, 3, 3, 3), (40, 1, 3, 3), (33, 17, 1, 2)])
def test_layouts_put_each_weight_in_its_block_and_zeros_elsewhere(layout: Layout, shape: tuple[int, ...]) -> None:
    weight = np.arange(1, np.prod(shape) + 1, dtype=np.float32).reshape(shape)
    layout.lay(weight, out := np.full(layout.shape(shape), np.nan, np.float32))
    O, I, kh, kw = out.shape
    blocks = out.reshape(O // layout.filters, I // layout.channels, kh, kw, layout.channels, layout.filters)
    for o, i, y, x in np.ndindex(out.shape):
        expected = weight[o, i, y, x] if o < shape[0] and i < shape[1] else 0
        place = o // layout.filters, i // layout.channels, y, x, i % layout.channels, o % layout.filters
        assert blocks[place] == expected


def test_a_bias_is_filled_up() -> None:
    layout = Layout(4, 4)
    layout.lay(np.array([1, 2, 3, 4, 5], np.float32), out := np.full(layout.shape((5,)), np.nan, np.float32))
    assert out.tolist() == [1, 2, 3, 4, 5, 0, 0, 0]


def test_a_graph_that_was_found_outlives_its_place_in_the_cache(bundle: Bundle, tmp_path: Path) -> None:
    found = prepare(bundle)
    shutil.rmtree(tmp_path / "cache")
    assert found.session(fuse(bundle, None)).run(images(bundle, 1)).shape == (1, bundle.features)


@pytest.mark.parametrize("is_faster", [True, False])
def test_an_app_takes_the_way_that_was_measured_to_be_faster(bundle: Bundle, tmp_path: Path, is_faster: bool) -> None:
    prepare(bundle)
    (path,) = (tmp_path / "cache").rglob("graph.json")
    table = json.loads(path.read_text())
    assert min(table["session_ms"], table["optimised_session_ms"]) > 0
    path.write_text(json.dumps({**table, "session_ms": 1.0, "optimised_session_ms": 2.0 if is_faster else 0.5}))
    with App(bundle, threads=1) as app:
        app.prepare()
        app.load(tiny_pack(changes={"backbone": bundle.digest}))
        with patch.object(preparing.PreparedGraph, "session", autospec=True, side_effect=RuntimeError) as session:
            with nullcontext() if not is_faster else pytest.raises(RuntimeError):
                app.logits(images(bundle, 1))
            assert session.called == is_faster


def test_a_cache_that_cannot_be_made_is_said(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("KSM_EDGE_CACHE", str(tmp_path / "file"))
    with pytest.raises(KsmEdgeError, match=r"cannot be written.*KSM_EDGE_CACHE"):
        prepare(bundle)
