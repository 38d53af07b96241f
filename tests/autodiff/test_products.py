"""Products in half precision: of rounded numbers, summed in float32, whatever their shapes."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from test_fast_forms import Gradients, steps
from whole_network import random_bundle

from ksm_edge import native
from ksm_edge.autodiff import own, products
from ksm_edge.autodiff.gradient_graph import build
from ksm_edge.autodiff.graph import OWN, Emitter
from ksm_edge.bundle.layers import Bundle, Layer
from ksm_edge.bundle.load import load_bundle
from ksm_edge.errors import UsageError
from ksm_edge.resident import rss_bytes
from ksm_edge.runtimes import trial
from ksm_edge.runtimes.onnxruntime import gradient_session_options
from ksm_edge.training.planner import make_plan
from ksm_edge.training.settings import Settings
from ksm_edge.training.trainer import forward_spec, front_spec, gradient_spec

Shapes = dict[str, tuple[int, ...]]

pytestmark = pytest.mark.skipif(native.operators is None, reason="installed without a C compiler")


def every_way() -> list[str]:
    if native.operators is None:
        return []
    from ksm_edge import _operators

    return list(_operators.halves())


@pytest.fixture(params=every_way())
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """One after the other of those that the processor here can go."""
    from ksm_edge import _operators

    _operators.halve_with(request.param)
    yield request.param
    _operators.halve_with(every_way()[0])


def rounded(array: np.ndarray) -> np.ndarray:
    """To the nearest bfloat16, of two the even one, in float64."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32).astype(np.uint64)
    kept = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16
    return kept.astype(np.uint32).view(np.float32).astype(np.float64)


def run(emit: Emitter, given: dict[str, np.ndarray], made: Shapes) -> list[np.ndarray]:
    session = session_of(emit, {name: array.shape for name, array in given.items()}, made)
    return list(session.run(list(made), given))


def session_of(emit: Emitter, given: Shapes, made: Shapes) -> onnxruntime.InferenceSession:
    for name, shape in given.items():
        emit.input(name, shape)
    for name, shape in made.items():
        emit.output(name, shape)
    model = emit.model()
    own.declare_shapes(model)
    return onnxruntime.InferenceSession(
        model.SerializeToString(), gradient_session_options(1), providers=["CPUExecutionProvider"]
    )


# Fewer than a register, and than the rows and columns that are worked on at once, and more; odd sums, and long ones.
SIZES = [(1, 1, 1), (5, 3, 33), (17, 13, 16), (24, 12, 49), (31, 40, 300), (7, 515, 20), (3, 1030, 513)]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("images", [1, 3, 40])
@pytest.mark.parametrize(("O", "I", "P"), SIZES)
def test_products_are_those_of_rounded_numbers(O: int, I: int, P: int, images: int) -> None:
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    layer, emit = Layer("a", (O, I, 1, 1), 1, 0.0, False), Emitter(half_products=True)
    x, dz, weight, bias = draw(images, I, 1, P), draw(images, O, 1, P), draw(O, I, 1, 1), draw(O)
    before = draw(O, I)
    products.pointwise(emit, layer, "x", x.shape, "y")
    dx = products.pointwise_input_gradient(emit, layer, "dz", dz.shape)
    products.accumulated(emit, "before", "dz", "x", (images, O, I, P), "total")
    given = {"x": x, "dz": dz, "a.weight": weight, "a.bias": bias, "before": before}
    found = run(emit, given, {"y": dz.shape, dx: x.shape, "total": (O, I)})
    V = rounded(weight[..., 0, 0])
    expected = [
        np.einsum("oi,nihp->nohp", V, rounded(x)) + bias[:, None, None],
        np.einsum("oi,nohp->nihp", V, rounded(dz)),
        before + np.einsum("nohp,nihp->oi", rounded(dz), rounded(x)),
    ]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, 3.4e38])
def test_what_is_no_number_stays_none(value: float) -> None:
    emit, one = Emitter(half_products=True), np.ones((1, 1), np.float32)
    products.accumulated(emit, "before", "rows", "columns", (1, 1, 1, 1), "total")
    (total,) = run(emit, {"before": one, "rows": one, "columns": one * np.float32(value)}, {"total": (1, 1)})
    assert not np.isfinite(total)  # the last one is rounded up


def test_rooms_are_given_back_in_however_many_threads() -> None:
    emit, I = Emitter(half_products=True), 2000
    products.pointwise(emit, Layer("a", (8, I, 1, 1), 1, 0.0, False), "x", (1, I, 1, 8), "y")
    shapes = {"x": (1, I, 1, 8), "a.weight": (8, I, 1, 1), "a.bias": (8,)}
    session = session_of(emit, shapes, {"y": (1, 8, 1, 8)})
    given = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    room = own.room_bytes(emit.model())
    assert room == 4 * (8 + products.COLUMNS_KEPT) * products.DEEPEST // 2
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: session.run(["y"], given), range(40)))
        before = rss_bytes()
        list(pool.map(lambda _: session.run(["y"], given), range(400)))
    assert rss_bytes() - before < 20 * room


def test_the_ways_are_told_and_others_refused() -> None:
    from ksm_edge import _operators

    assert _operators.halves()[-1] == "plain"
    assert native.halves() == (None if every_way() == ["plain"] else every_way()[0])
    with pytest.raises(ValueError, match="'fp8': no products in half precision"):
        _operators.halve_with("fp8")


@pytest.fixture(scope="module", params=[("mobilenet_v2", 96), ("resnet18", 64)], ids=lambda given: given[0])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    recipe, size = request.param
    return random_bundle(recipe, size, tmp_path_factory.mktemp(recipe))


def test_gradients_of_whole_networks_err_by_what_is_rounded(bundle: Bundle, tmp_path: Path) -> None:
    """In networks of random weights, where every layer makes more of an error, the ways are still nearly the same."""
    whole, half = (next(steps(bundle, tmp_path / str(on), half_products=on)) for on in (False, True))
    assert 0.95 < _likeness(whole, half) < 1 - 1e-9


def _likeness(whole: Gradients, half: Gradients) -> float:
    """The cosine of the angle between the gradients of each layer, the median one."""
    cosines = [np.vdot(half[n], g) / np.linalg.norm(half[n]) / np.linalg.norm(g) for n, g in whole.items()]
    return float(np.median(cosines))


def test_only_where_it_is_asked_for_and_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    embedded, asked = load_bundle("embedded"), Settings(product_bits=16)

    def is_so(settings: Settings) -> bool:
        return gradient_spec(embedded, 5, settings, 1).half_products

    monkeypatch.setattr(native, "halves", lambda: "avx1024_bf16")
    assert is_so(asked)
    assert not is_so(Settings())
    assert not is_so(replace(asked, statistics="batch"))
    monkeypatch.setattr(native, "halves", lambda: None)
    assert not is_so(asked)


def test_a_training_goes_on_only_where_its_products_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    embedded, settings = load_bundle("embedded"), Settings(product_bits=16)
    monkeypatch.setattr(native, "halves", lambda: "avx1024_bf16")
    monkeypatch.setattr(trial, "trial", lambda: trial.Trial(0.0, 0.0))
    before = make_plan(embedded, 5, settings, threads=1, budget_bytes=None).choices
    assert before["half_products"]
    whole = make_plan(embedded, 5, settings, threads=1, budget_bytes=None, before={**before, "half_products": False})
    assert not whole.graph.spec.half_products
    monkeypatch.setattr(native, "halves", lambda: None)
    with pytest.raises(UsageError, match="begun with products in half precision"):
        make_plan(embedded, 5, settings, threads=1, budget_bytes=None, before=before)


def test_judging_multiplies_as_apps_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "halves", lambda: "avx1024_bf16")
    spec = gradient_spec(load_bundle("embedded"), 5, Settings(product_bits=16), 1)
    assert not forward_spec(spec, {}).half_products
    assert front_spec(spec).half_products


def test_every_product_of_1x1_layers_is_one(tmp_path: Path) -> None:
    bundle = random_bundle("mobilenet_v2", 96, tmp_path)
    spec = replace(gradient_spec(bundle, 5, Settings(), 1), half_products=True, widened=False)
    model = build(onnx.load(bundle.graph_path, load_external_data=False), bundle.layers, spec).model
    of_ours = [node for node in model.graph.node if node.domain == OWN and node.op_type in products.OPERATORS]
    pointwise = sum(layer.weight_shape[2:] == (1, 1) and layer.groups == 1 for layer in bundle.layers)
    assert len(of_ours) == 3 * pointwise + 1  # and the stem's for its weight
    # What is left is the head's.
    assert [node.output[0] for node in model.graph.node if node.op_type == "Gemm"] == ["logits", "head:dweight"]
