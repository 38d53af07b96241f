"""One driver for every runtime: the same case gives the oracle's numbers, or the same exception."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from tiny import tiny_bundle, tiny_graph, tiny_pack

from ksm_edge.bundle.layers import Bundle
from ksm_edge.errors import UnsupportedError, UsageError
from ksm_edge.fuse import fuse
from ksm_edge.runtimes import DEFAULT, RUNTIMES, load_runtime
from ksm_edge.runtimes.reference import Session as Reference


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return tiny_bundle(tmp_path)


# ExecuTorch runs a program of its bundle's and images of one size: tests/runtimes/test_executorch.py has its cases.
@pytest.fixture(params=[name for name in RUNTIMES if name != "executorch"])
def runtime(request: pytest.FixtureRequest) -> ModuleType:
    module = importlib.import_module(RUNTIMES[request.param])
    if (reason := module.available()) is not None:
        pytest.skip(reason)
    return module


def images(count: int, height: int = 16, width: int = 16) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 3, height, width)).astype(np.float32)


@pytest.mark.parametrize("pack", [None, tiny_pack(cut=0.5), tiny_pack("group:3"), tiny_pack(statistics="batch")])
@pytest.mark.parametrize("as_bytes", [False, True])
def test_features_are_the_float64_oracles(runtime: ModuleType, bundle: Bundle, pack, as_bytes: bool) -> None:
    weights = fuse(bundle, pack)
    oracle = Reference(bundle.graph_path, {name: array.astype(np.float64) for name, array in weights.items()})
    session = runtime.Session(bundle.graph_path.read_bytes() if as_bytes else bundle.graph_path, weights, 1)
    for batch in (images(1), images(3), images(2, 24, 20)):
        features = session.run(batch)
        assert features.shape == (len(batch), bundle.features)
        assert features.dtype == np.float32
        np.testing.assert_allclose(features, oracle.run(batch.astype(np.float64)), rtol=1e-5, atol=1e-6)


def test_tasks_do_not_disturb_each_other(runtime: ModuleType, bundle: Bundle) -> None:
    packs = [None, tiny_pack(seed=1), tiny_pack(seed=2)]
    sessions = [runtime.Session(bundle.graph_path, fuse(bundle, pack)) for pack in packs]
    first = [session.run(images(2)) for session in sessions]
    for session, before in zip(reversed(sessions), reversed(first), strict=True):
        np.testing.assert_array_equal(session.run(images(2)), before)
    assert not np.allclose(first[0], first[1])
    assert not np.allclose(first[1], first[2])


def test_a_session_has_its_own_copy_of_the_weights(runtime: ModuleType, bundle: Bundle) -> None:
    weights = fuse(bundle, None)
    session = runtime.Session(bundle.graph_path, weights)
    expected = session.run(images(1))
    for array in weights.values():
        array.fill(np.nan)
    np.testing.assert_array_equal(session.run(images(1)), expected)


@pytest.mark.parametrize("fault", ["missing", "unknown", "shape"])
def test_weights_that_do_not_fit_the_graph_are_refused(runtime: ModuleType, bundle: Bundle, fault: str) -> None:
    weights = fuse(bundle, None)
    if fault == "missing":
        del weights["dw.bias"]
    elif fault == "unknown":
        weights["stranger.weight"] = np.zeros((1, 1, 1, 1), np.float32)
    else:
        weights["dw.bias"] = np.zeros(9, np.float32)
    # Older releases of ONNX Runtime name the place of a weight that is missing rather than the weight.
    with pytest.raises(UnsupportedError, match=r"dw\.bias|stranger\.weight|dimensions|given-at-session-creation"):
        runtime.Session(bundle.graph_path, weights)


def test_an_operator_that_is_not_there_is_refused_by_name(runtime: ModuleType, bundle: Bundle) -> None:
    model = tiny_graph()
    model.graph.node[1].op_type = "Reluu"
    with pytest.raises(UnsupportedError, match="Reluu"):
        runtime.Session(model.SerializeToString(), fuse(bundle, None))


def test_an_unknown_runtime_is_refused_naming_those_there_are() -> None:
    with pytest.raises(
        UsageError, match="'tensorrt' is not known: choose from executorch, onnxruntime, pytorch, reference"
    ):
        load_runtime("tensorrt")


def test_a_runtime_that_is_not_installed_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(RUNTIMES[DEFAULT])
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"cannot run here: .* pip install onnxruntime"):
        load_runtime(DEFAULT)
