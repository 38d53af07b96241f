"""Products of our own, of numbers as they are or rounded to half precision, whatever their shapes."""

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
from ksm_edge.autodiff.spec import FLOATS, HALVES, STANDARD
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


def every_way() -> list[tuple[str, str]]:
    """Precisions, and of each the ways that the processor here can go."""
    if native.operators is None:
        return []
    from ksm_edge import _operators

    return [(FLOATS, way) for way in _operators.loops()] + [(HALVES, way) for way in _operators.halves()]


@pytest.fixture(params=every_way(), ids=" ".join)
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    """Of each way, one after the other."""
    from ksm_edge import _operators

    found, way = request.param
    choose, ways = {
        FLOATS: (_operators.run_with, _operators.loops),
        HALVES: (_operators.halve_with, _operators.halves),
    }[found]
    choose(way)
    yield found
    choose(ways()[0])


def met(array: np.ndarray, precision: str) -> np.ndarray:
    """In float64 what is multiplied: the number, or the nearest bfloat16, of two the even one."""
    if precision == FLOATS:
        return array.astype(np.float64)
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


# Fewer than a register, and than the rows and columns that are worked on at once, and more; odd sums, and long ones; a
# column that is alone, of one image and of the last of seven; sums so long, and columns so many, that they are turned.
SIZES = [(1, 1, 1), (5, 3, 33), (17, 13, 16), (24, 12, 49), (31, 40, 300), (7, 515, 20), (3, 1030, 513), (9, 49, 700),
         (70, 25, 241), (12, 10, 7)]  # fmt: skip


@pytest.mark.parametrize("images", [1, 3, 7, 40])
@pytest.mark.parametrize(("O", "I", "P"), SIZES)
def test_products_are_those_of_numbers_as_they_are_met(O: int, I: int, P: int, images: int, precision: str) -> None:
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    layer, emit = Layer("a", (O, I, 1, 1), 1, 0.0, False), Emitter(products=precision)
    x, dz, weight, bias = draw(images, I, 1, P), draw(images, O, 1, P), draw(O, I, 1, 1), draw(O)
    before = draw(O, I)
    products.pointwise(emit, layer, "x", x.shape, "y")
    dx = products.pointwise_input_gradient(emit, layer, "dz", dz.shape)
    products.accumulated(emit, "before", "dz", "x", (images, O, I, P), "total")
    given = {"x": x, "dz": dz, "a.weight": weight, "a.bias": bias, "before": before}
    found = run(emit, given, {"y": dz.shape, dx: x.shape, "total": (O, I)})
    V, x, dz = (met(array, precision) for array in (weight[..., 0, 0], x, dz))
    expected = [
        np.einsum("oi,nihp->nohp", V, x) + bias[:, None, None],
        np.einsum("oi,nohp->nihp", V, dz),
        before + np.einsum("nohp,nihp->oi", dz, x),
    ]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, 3.4e38])
def test_what_is_no_number_stays_none(value: float, precision: str) -> None:
    emit, one = Emitter(products=precision), np.ones((1, 1), np.float32)
    products.accumulated(emit, "before", "rows", "columns", (1, 1, 1, 1), "total")
    (total,) = run(emit, {"before": one, "rows": one, "columns": one * np.float32(value)}, {"total": (1, 1)})
    assert np.isfinite(total) == (precision == FLOATS and np.isfinite(np.float32(value)))  # 3.4e38 is rounded up


def test_what_is_no_number_stays_with_its_own(precision: str) -> None:
    """A number of a product's own memory that nobody gave would show in its neighbours."""
    emit, images, O, I, P = Emitter(products=precision), 2, 6, 5, 27
    layer = Layer("a", (O, I, 1, 1), 1, 0.0, False)
    rng = np.random.default_rng(0)
    given = {"x": (images, I, 1, P), "a.weight": layer.weight_shape, "a.bias": (O,)}
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in given.items()}
    arrays["x"][1, :, 0, 13] = np.nan
    products.pointwise(emit, layer, "x", given["x"], "y")
    (y,) = run(emit, arrays, {"y": (images, O, 1, P)})
    expected = np.zeros(y.shape, bool)
    expected[1, :, 0, 13] = True
    assert np.array_equal(np.isnan(y), expected)


@pytest.mark.parametrize(("products_by", "rows"), [(FLOATS, 0), (HALVES, 8)])
def test_rooms_are_given_back_in_however_many_threads(products_by: str, rows: int) -> None:
    emit, I = Emitter(products=products_by), 2000
    products.pointwise(emit, Layer("a", (8, I, 1, 1), 1, 0.0, False), "x", (1, I, 1, 8), "y")
    shapes = {"x": (1, I, 1, 8), "a.weight": (8, I, 1, 1), "a.bias": (8,)}
    session = session_of(emit, shapes, {"y": (1, 8, 1, 8)})
    given = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    room = own.room_bytes(emit.model())
    assert room == 4 * (rows + products.COLUMNS_KEPT) * products.WORDS_KEPT
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: session.run(["y"], given), range(40)))
        before = rss_bytes()
        list(pool.map(lambda _: session.run(["y"], given), range(400)))
    assert rss_bytes() - before < 20 * room


@pytest.mark.parametrize(
    ("sides", "floats", "halves"),
    [
        ((1, 8, 100, 10), (0 + 256) * 10, (8 + 256) * 5),
        ((9, 80, 100, 40), (80 + 256) * 6 * 40, (80 + 256) * 9 * 20),  # six images at a time, or all
        ((1, 8, 100, 1000), (0 + 256) * 240 + 800, (100 + 256) * 240 + 800),  # sides change, and the result is turned
    ],
)
def test_rooms_are_for_what_is_put_in_order(sides: tuple[int, ...], floats: int, halves: int) -> None:
    attributes = {"sides": sides, "summed": [1]}
    assert products.room_words("ProductFrom", attributes) == floats
    assert products.room_words("HalfProductFrom", attributes) == halves


def test_the_ways_are_told_and_others_refused() -> None:
    from ksm_edge import _operators

    assert _operators.halves()[-1] == "plain"
    assert native.halves() == (None if _operators.halves() == ["plain"] else _operators.halves()[0])
    with pytest.raises(ValueError, match="'fp8': no products in half precision"):
        _operators.halve_with("fp8")


@pytest.fixture(scope="module", params=[("mobilenet_v2", 96), ("resnet18", 64)], ids=lambda given: given[0])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    recipe, size = request.param
    return random_bundle(recipe, size, tmp_path_factory.mktemp(recipe))


def test_gradients_of_whole_networks_err_by_what_is_rounded(bundle: Bundle, tmp_path: Path) -> None:
    """In networks of random weights, where every layer makes more of an error, the ways are still nearly the same."""
    standard, floats, halves = (next(steps(bundle, tmp_path / p, products=p)) for p in (STANDARD, FLOATS, HALVES))
    assert 0.95 < _likeness(standard, halves) < 1 - 1e-9
    assert _likeness(standard, floats) > 1 - 1e-9
    assert any(not np.array_equal(floats[name], array) for name, array in standard.items())


def _likeness(whole: Gradients, half: Gradients) -> float:
    """The cosine of the angle between the gradients of each layer, the median one."""
    cosines = [np.vdot(half[n], g) / np.linalg.norm(half[n]) / np.linalg.norm(g) for n, g in whole.items()]
    return float(np.median(cosines))


def test_halves_only_where_they_are_asked_for_and_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    embedded, asked = load_bundle("embedded"), Settings(product_bits=16)

    def products_of(settings: Settings) -> str:
        return gradient_spec(embedded, 5, settings, 1).products

    monkeypatch.setattr(native, "running", lambda: "avx1024")
    monkeypatch.setattr(native, "halves", lambda: "avx1024_bf16")
    assert products_of(asked) == HALVES
    assert products_of(Settings()) == products_of(replace(asked, statistics="batch")) == STANDARD
    monkeypatch.setattr(native, "halves", lambda: None)
    assert products_of(asked) == STANDARD


def test_floats_only_where_they_are_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    embedded = load_bundle("embedded")
    for running, expected in {"avx2": FLOATS, "avx512": STANDARD, "plain": STANDARD}.items():
        monkeypatch.setattr(native, "running", lambda running=running: running)
        assert gradient_spec(embedded, 5, Settings(), 1).products == expected
        for other in (Settings(statistics="batch"), Settings(method="head")):
            assert gradient_spec(embedded, 5, other, 1).products == STANDARD


def test_a_training_goes_on_only_where_its_products_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    embedded, settings = load_bundle("embedded"), Settings(product_bits=16)
    monkeypatch.setattr(native, "halves", lambda: "avx1024_bf16")
    monkeypatch.setattr(trial, "trial", lambda: trial.Trial(0.0, 0.0))
    before = make_plan(embedded, 5, settings, threads=1, budget_bytes=None).choices
    assert before["products"] == HALVES
    for other in (STANDARD, FLOATS):
        chosen = {**before, "products": other}
        plan = make_plan(embedded, 5, settings, threads=1, budget_bytes=None, before=chosen)
        assert plan.choices == chosen
    monkeypatch.setattr(native, "halves", lambda: None)
    with pytest.raises(UsageError, match="begun with products in half precision"):
        make_plan(embedded, 5, settings, threads=1, budget_bytes=None, before=before)


@pytest.mark.parametrize(("asked", "judged"), [(STANDARD, STANDARD), (FLOATS, FLOATS), (HALVES, STANDARD)])
def test_judging_multiplies_in_float32(asked: str, judged: str) -> None:
    spec = replace(gradient_spec(load_bundle("embedded"), 5, Settings(), 1), products=asked)
    assert forward_spec(spec, {}).products == judged
    assert front_spec(spec).products == asked


def test_every_product_of_1x1_layers_is_one(tmp_path: Path) -> None:
    bundle = random_bundle("mobilenet_v2", 96, tmp_path)
    spec = replace(gradient_spec(bundle, 5, Settings(), 1), products=FLOATS, widened=False)
    model = build(onnx.load(bundle.graph_path, load_external_data=False), bundle.layers, spec).model
    of_ours = [node for node in model.graph.node if node.domain == OWN and node.op_type in products.OPERATORS]
    pointwise = sum(layer.weight_shape[2:] == (1, 1) and layer.groups == 1 for layer in bundle.layers)
    assert len(of_ours) == 3 * pointwise + 1  # and the stem's for its weight
    # What is left is the head's.
    assert [node.output[0] for node in model.graph.node if node.op_type == "Gemm"] == ["logits", "head:dweight"]
