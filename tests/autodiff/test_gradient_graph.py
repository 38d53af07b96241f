"""The gradient graph as a whole: its loss, its sums over micro-batches, its order and memory, and whole networks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from small_graphs import CLASSES, Net, conv, finite_difference, gradients, op, relative_error
from tiny import LAYERS, tiny_bundle, tiny_graph
from whole_network import Case, random_bundle, relative_errors, small_settings

from ksm_edge.autodiff.gradient_graph import build
from ksm_edge.autodiff.graph import CONTRIB
from ksm_edge.autodiff.liveness import peak_bytes
from ksm_edge.autodiff.spec import REST, WHOLE, GradientSpec, product_shape
from ksm_edge.bundle.layers import Bundle
from ksm_edge.bundle.make import read_onnx
from ksm_edge.bundle.recipe import load_recipe, recipe_names
from ksm_edge.errors import UnsupportedError
from ksm_edge.runtimes.compile import CompiledGraph, compile_graph
from ksm_edge.runtimes.engine import ENGINES, Engine
from ksm_edge.runtimes.optimise import in_order
from ksm_edge.runtimes.reference import evaluate
from ksm_edge.training.targets import target_rows
from ksm_edge.training.trainer import Trainer, front_spec, gradient_spec

A = conv("a", "image", 4, 3)
GRANULARITIES = ("kernel", "group:3", "channel", "element")


# The loss.


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("class_weights", [None, np.array([0.2, 1.0, 3.0], np.float32)])
def test_the_loss_is_the_weighted_mean_cross_entropy(smoothing: float, class_weights: np.ndarray | None) -> None:
    net = Net([A], images=5)
    labels = np.array([0, 2, 1, 2, 2])
    net.target = target_rows(labels, CLASSES, smoothing, class_weights).astype(np.float64)
    outputs = net.run_reference()
    weights = np.ones(5) if class_weights is None else class_weights[labels]
    wanted = (1 - smoothing) * np.eye(CLASSES)[labels] + smoothing / CLASSES
    each = -(wanted * log_softmax(outputs["logits"])).sum(1)
    assert float(outputs["loss"]) == pytest.approx((weights * each).sum() / weights.sum(), rel=1e-6)
    probability = np.exp(log_softmax(outputs["logits"]))
    dlogits = (probability - wanted) * (weights / weights.sum())[:, None]
    np.testing.assert_allclose(outputs["head:dbias"], dlogits.sum(0), atol=1e-7)


def test_rows_of_zeros_do_not_count() -> None:
    small = Net([A, op("Relu", "a", "y")], images=2)
    padded = Net([A, op("Relu", "a", "y")], images=3)
    padded.image = np.concatenate([small.image, np.full((1, *small.image.shape[1:]), 7.0)])
    padded.target = np.concatenate([small.target, np.zeros((1, CLASSES))])
    found, expected = padded.run_reference(), small.run_reference()
    for name in expected.keys() - {"logits"}:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-12, atol=1e-15, err_msg=name)


def test_huge_logits_leave_the_loss_finite() -> None:
    net = Net([A])
    net.image *= 1e6
    outputs = net.run_onnxruntime()
    assert np.ptp(outputs["logits"], axis=1).min() > 1e4  # far beyond what exp takes in float32
    assert all(np.isfinite(array).all() for array in outputs.values())


# Accumulators and micro-batches.


def test_accumulators_start_from_what_they_are_given() -> None:
    net = Net([A, conv("c", "a", 4, 4, (3, 3)), conv("d", "c", 4, 1, (3, 3), 4)])
    graph = net.gradient_graph()
    plain, feeds = net.run_reference(), net.feeds(graph)
    started = net.run_reference({n: a + 1.0 if n.startswith("acc:") else a for n, a in feeds.items()})
    names = [name.removeprefix("acc:") for name in graph.inputs if name.startswith("acc:")]
    assert set(names) == graph.outputs.keys() - {"loss", "logits"}
    for name in names:
        np.testing.assert_allclose(started[name], plain[name] + 1.0, rtol=1e-12, err_msg=name)


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_micro_batches_add_up_to_the_whole_batch(tmp_path: Path, micro_batch: int) -> None:
    """Also where the last one is not full."""
    bundle, settings = tiny_bundle(tmp_path), small_settings(batch=4)
    loss, found = Case(bundle, settings, tmp_path, micro_batch=micro_batch).by_engine()
    whole_loss, whole = Case(bundle, settings, tmp_path, micro_batch=4).by_engine()
    assert loss == pytest.approx(whole_loss, rel=1e-5)
    assert max(relative_errors(found, whole).values()) < 1e-5


def test_products_have_the_declared_shapes() -> None:
    table = {layer.name: layer for layer in LAYERS}
    for per_weight in (False, True):
        spec = GradientSpec(2, 16, CLASSES, frozenset(table), per_weight=per_weight)
        graph = build(tiny_graph(), LAYERS, spec)
        for name, form in graph.forms.items():
            shape = product_shape(form, table[name])
            taps = (
                {f"{name}.product.{k}": shape[1:] for k in range(shape[0])}
                if form == "taps"
                else {f"{name}.product": shape}
            )
            assert {n: s for n, s in graph.outputs.items() if n.startswith(f"{name}.product")} == taps


def test_layers_that_do_not_learn_have_no_accumulators_and_take_fused_weights_from_outside() -> None:
    spec = GradientSpec(1, 16, CLASSES, frozenset({"project", "plain"}))
    graph = build(tiny_graph(), LAYERS, spec)
    accumulators = {n.removeprefix("acc:").partition(".")[0] for n in graph.inputs if n.startswith("acc:")}
    assert accumulators == {"head:dweight", "head:dbias", "project", "plain"}
    assert {
        f"{name}.{kind}" for name in ("stem", "dw", "grouped") for kind in ("weight", "bias")
    } == graph.externals.keys()


def test_nothing_is_propagated_below_the_first_layer_that_learns() -> None:
    everything = build(tiny_graph(), LAYERS, GradientSpec(1, 16, CLASSES, frozenset(layer.name for layer in LAYERS)))
    last = build(tiny_graph(), LAYERS, GradientSpec(1, 16, CLASSES, frozenset({"plain"})))
    head = build(tiny_graph(), LAYERS, GradientSpec(1, 16, CLASSES, frozenset()))
    convs = [
        sum(node.op_type in ("Conv", "ConvTranspose", "FusedMatMul") for node in g.model.graph.node)
        for g in (last, head)
    ]
    assert convs == [len(LAYERS)] * 2
    assert len(head.model.graph.node) < len(last.model.graph.node) < len(everything.model.graph.node)


def test_the_forward_part_alone_gives_the_features_of_the_backbone_from_the_same_parameters() -> None:
    net = Net([A, op("MaxPool", "a", "m", kernel_shape=[2, 2]), conv("d", "m", 4, 1, (3, 3), 4)])
    whole, forward = net.gradient_graph(), build(net.model, net.layers, replace(net.spec, backward=False), np.float64)
    assert forward.outputs.keys() == {"features"}
    assert forward.inputs.keys() < whole.inputs.keys()
    feeds = {name: array for name, array in net.feeds(whole).items() if name in forward.inputs}
    features = evaluate(forward.model, feeds, {n: a for n, a in net.externals(whole).items() if n in forward.externals})
    expected = dict(net.weights)
    expected["d.weight"] = expected["d.weight"] * net.scale["d"][:, None, None, None]
    np.testing.assert_allclose(
        features["features"], evaluate(net.model, {"image": net.image}, expected)["features"], rtol=1e-9, atol=1e-9
    )


def test_pools_write_indices_only_where_a_gradient_goes_by_them() -> None:
    nodes = [A, op("MaxPool", "a", "m", kernel_shape=[2, 2]), conv("c", "m", 4, 4)]
    for frozen, backward, count in (((), True, 2), (("a",), True, 1), (("a", "c"), True, 1), ((), False, 1)):
        net = Net(nodes, frozen=frozen)
        model = build(net.model, net.layers, replace(net.spec, backward=backward)).model
        (pool,) = [node for node in model.graph.node if node.op_type == "MaxPool"]
        assert len(pool.output) == count


# The graph itself.


def graphs_of_recipes() -> list[tuple[str, onnx.ModelProto]]:
    """Gradient graphs of weights of zeros: what they are made of does not depend on these."""
    from ksm_edge.bundle.make import freeze_recipe

    found = []
    for name in recipe_names():
        recipe = load_recipe(name)
        entries = [e for e in read_onnx(recipe.graph_path).graph.input if e.name != "image"]
        shapes = {e.name: [d.dim_value for d in e.type.tensor_type.shape.dim] for e in entries}
        frozen = freeze_recipe(recipe, {n: np.broadcast_to(np.float32(0), s) for n, s in shapes.items()})
        trained = frozenset(layer.name for layer in frozen.layers)
        for statistics in ("frozen", "batch"):
            spec = GradientSpec(2, 64, CLASSES, trained, statistics)
            found.append((f"{name}, {statistics}", build(frozen.model, frozen.layers, spec).model))
    return found


def test_every_recipe_has_a_graph_of_standard_operators_and_fused_matmul_in_a_valid_order() -> None:
    for name, model in graphs_of_recipes():
        assert {n.op_type for n in model.graph.node if n.domain == CONTRIB} <= {"FusedMatMul"}, name
        assert {n.domain for n in model.graph.node} <= {"", CONTRIB}, name
        assert all(onnx.defs.has(n.op_type) for n in model.graph.node if not n.domain), name
        assert [(o.domain, o.version) for o in model.opset_import] == [("", 17), (CONTRIB, 1)]
        assert not any("mask" in n.name.lower() or "score" in n.name.lower() for n in model.graph.node), name
        assert_topological(list(model.graph.node), [x.name for x in (*model.graph.input, *model.graph.initializer)])


def assert_topological(nodes: list[onnx.NodeProto], given: list[str]) -> None:
    seen = set(given)
    for node in nodes:
        assert set(node.input) <= seen, node.name
        assert not set(node.output) & seen, node.name
        seen |= set(node.output)


def test_float32_graphs_hold_no_float64_tensor() -> None:
    for per_weight in (False, True):
        spec = GradientSpec(2, 16, CLASSES, frozenset(layer.name for layer in LAYERS), "frozen", per_weight)
        model = build(tiny_graph(), LAYERS, spec).model
        assert {t.data_type for t in model.graph.initializer} <= {TensorProto.FLOAT, TensorProto.INT64}
        assert {x.type.tensor_type.elem_type for x in (*model.graph.input, *model.graph.output)} == {TensorProto.FLOAT}


@pytest.mark.parametrize("form", ["pointwise", "taps", "patches"])
def test_a_layer_may_be_called_head(form: str) -> None:
    """A user's own network has any names: the engine's must not collide with them."""
    net = Net(
        [
            conv("head", "image", 4, 3, {"pointwise": (1, 1), "taps": (4, 4), "patches": (3, 3)}[form]),
            op("Relu", "head", "y"),
        ]
    )
    found = gradients(net, net.run_reference())
    assert found.keys() == {"head.weight", "head.bias", "head:weight", "head:bias"}
    for name, gradient in found.items():
        direction = np.random.default_rng(0).standard_normal(gradient.shape)
        assert np.vdot(gradient, direction) == pytest.approx(
            finite_difference(net, name, direction), rel=1e-5, abs=1e-8
        )


# Batch statistics.


def test_batch_statistics_give_the_gradients_of_a_normalised_conv() -> None:
    nodes = [
        conv("a", "image", 4, 3, (3, 3), norm=True), op("Relu", "a", "r"),
        conv("dw", "r", 4, 1, (3, 3), 4, norm=True), op("Relu", "dw", "s"),
        conv("p", "s", 5, 4, norm=True), conv("plain", "p", 3, 5),
    ]  # fmt: skip
    net = Net(nodes, size=8, images=3, statistics="batch")
    found = gradients(net, net.run_reference())
    assert {"a.gamma", "a.beta", "dw.scale", "dw.gamma", "p.weight", "plain.weight"} <= found.keys()
    assert "plain.gamma" not in found
    rng = np.random.default_rng(5)
    for name, gradient in found.items():
        direction = rng.standard_normal(gradient.shape)
        # abs: the bias of a conv in front of a batch-norm has no gradient, and dbias says 0 but for rounding.
        assert np.vdot(gradient, direction) == pytest.approx(
            finite_difference(net, name, direction), rel=1e-5, abs=1e-8
        ), name
    expected = net.run_onnxruntime()
    for name, array in net.run_reference().items():
        if not name.endswith("dbias") and name != "dw.product":  # which a norm behind them makes vanish
            assert relative_error(expected[name], array) < 1e-4, name


def test_batch_statistics_are_given_out_as_mean_and_biased_variance() -> None:
    net = Net([conv("a", "image", 4, 3, norm=True)], statistics="batch")
    outputs = net.run_reference()
    z = (
        np.einsum("oi,nihw->nohw", net.weights["a.weight"][:, :, 0, 0], net.image)
        + net.weights["a.bias"][:, None, None]
    )
    np.testing.assert_allclose(outputs["a.batch_mean"], z.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(outputs["a.batch_var"], z.var((0, 2, 3)), rtol=1e-12)
    assert net.gradient_graph().pixels == {"a": 49}


# Memory and order.


def chain(nodes: list[onnx.NodeProto], inputs: dict[str, list[int]], outputs: dict[str, list[int]]) -> onnx.ModelProto:
    info = lambda table: [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in table.items()]  # noqa: E731
    graph = helper.make_graph(nodes, "g", info(inputs), info(outputs))
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


def node(kind: str, inputs: str, outputs: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(kind, inputs.split(), outputs.split(), **attributes)


def test_peak_bytes_frees_a_tensor_after_its_last_use() -> None:
    # x (given) -> a -> b -> c -> y (given): a is kept for the last node, b is gone by then.
    nodes = [node("Exp", "x", "a"), node("Exp", "a", "b"), node("Exp", "b", "c"), node("Add", "c a", "y")]
    model = chain(nodes, {"x": [10]}, {"y": [10]})
    assert peak_bytes(model) == 3 * 40  # a, b and c while c is made
    del model.graph.node[3:]
    model.graph.node.append(node("Exp", "c", "y"))
    assert peak_bytes(model) == 2 * 40


def test_views_and_activations_behind_a_conv_take_no_memory_of_their_own() -> None:
    conv_node = node("Conv", "x w", "z", kernel_shape=[1, 1])
    nodes = [conv_node, node("Relu", "z", "r"), node("Flatten", "r", "f", axis=1), node("Exp", "f", "y")]
    model = chain(nodes, {"x": [1, 2, 3, 3], "w": [4, 2, 1, 1]}, {"y": [1, 36]})
    assert peak_bytes(model) == 4 * 36


def test_an_output_that_nobody_reads_stays_until_the_end() -> None:
    nodes = [node("MaxPool", "x", "p indices", kernel_shape=[1, 1]), node("Exp", "p", "a"), node("Exp", "a", "y")]
    model = chain(nodes, {"x": [1, 1, 5, 5]}, {"y": [1, 1, 5, 5]})
    assert peak_bytes(model) == (4 + 4 + 8) * 25  # p, a, and int64 indices, which ONNX Runtime holds


def test_less_is_kept_where_less_learns_and_more_for_more_images() -> None:
    layers = frozenset(layer.name for layer in LAYERS)
    peak = lambda n, names: peak_bytes(build(tiny_graph(), LAYERS, GradientSpec(n, 16, CLASSES, names)).model)  # noqa: E731
    assert peak(1, frozenset()) < peak(1, frozenset({"plain"})) < peak(1, layers) < peak(2, layers) < peak(4, layers)


def test_in_order_brings_the_emitted_order_back_and_puts_strangers_in_front_of_their_first_user() -> None:
    names = "abcdef"
    nodes = [node("Exp", names[i - 1] if i else "x", name) for i, name in enumerate(names)]
    # The optimiser moved a recomputation (late) to the start and made up a node (odd) for f.
    late, odd = node("Exp", "x", "late"), node("Exp", "x", "odd")
    nodes[-1] = node("Sum", "e late odd", "f")
    order = {name: place for place, name in enumerate([*"abcde", "late", "f"])}
    found = [n.output[0] for n in in_order([odd, late, *nodes], order)]
    assert found in (["a", "b", "c", "d", "e", "late", "odd", "f"], ["a", "b", "c", "d", "e", "odd", "late", "f"])


def test_in_order_keeps_topology_whatever_order_is_wished_for() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        nodes = []
        for i in range(12):
            inputs = {f"t{j}" for j in rng.integers(-1, i, rng.integers(1, 4))}
            nodes.append(node("Sum", " ".join(sorted(inputs)), f"t{i}"))
        wished = {f"t{i}": int(place) for i, place in enumerate(rng.permutation(12)) if rng.random() < 0.7}
        found = in_order(nodes, wished)
        assert sorted(n.output[0] for n in found) == sorted(n.output[0] for n in nodes)
        assert_topological(found, ["t-1"])


# Whole networks against autograd.

# Of float32 against float64. Rounding alone gives 1e-6 to 1e-5; the rest is room for an element of a ReLU or a pool
# that falls on the other side on another processor.
LIMIT = 1e-3
# With the batch's own statistics some gradients are zero but for eps, whatever the network: of a score that scales a
# whole filter (the norm divides it out), of a beta that a later norm takes away as part of a mean.
FLOOR_OF_BATCH_STATISTICS = 1e-2


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Engine:
    pytest.importorskip("torch")
    monkeypatch.setattr("ksm_edge.runtimes.torch_gradient.has_half", lambda device: False)  # these are float32's limits
    engine = Engine(request.param)
    try:
        engine.check()
    except UnsupportedError as error:
        pytest.skip(str(error))
    return engine


@pytest.mark.torch
@pytest.mark.parametrize(("name", "size"), [(name, 45 if name == "resnet50" else 43) for name in recipe_names()])
def test_gradients_of_every_recipe_are_those_of_autograd(tmp_path: Path, name: str, size: int, engine: Engine) -> None:
    case = Case(random_bundle(name, size, tmp_path), small_settings(), tmp_path, engine=engine)
    masks = [layer.mask().values for layer in case.trainer.layers.values()]
    assert all((mask == 0).any() for mask in masks)  # kernels that are gone have their exact gradient too
    assert any(((mask > 0) & (mask < 0.5)).any() for mask in masks)
    (loss, found), (expected_loss, expected) = case.by_engine(), case.by_autograd()
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    errors = relative_errors(found, expected)
    assert max(errors.values()) < LIMIT, sorted(errors.items(), key=lambda entry: -entry[1])[:5]


@pytest.mark.parametrize("name", recipe_names())
def test_front_and_rest_of_every_recipe_make_the_whole(tmp_path: Path, name: str) -> None:
    settings = small_settings(layers="35%..")
    bundle = random_bundle(name, 45, tmp_path)
    rng = np.random.default_rng(0)
    images = rng.standard_normal((2, 3, 45, 45)).astype(np.float32)
    targets = (np.eye(CLASSES)[:2] / 2).astype(np.float32)
    found = []
    for part in (WHOLE, REST):
        (folder := tmp_path / part).mkdir()
        spec = replace(gradient_spec(bundle, CLASSES, settings, 2), part=part)
        trainer = Trainer(bundle, compile_graph(bundle, spec, folder), settings, steps=10)
        trainer.run_head[:] = np.random.default_rng(1).standard_normal(trainer.run_head.shape)
        seen = images
        if part == REST:
            (beside := tmp_path / "front").mkdir()
            front = compile_graph(bundle, front_spec(spec), beside)
            assert len(front.pixels) >= len(bundle.layers) // 4  # most of what could be in front is
            assert not front.pixels.keys() & trainer.layers.keys()
            seen = features_of(bundle, front, images)
        trainer.accumulate(seen, targets)
        found.append({name: array.copy() for name, array in trainer._workers.first.accumulators.items()})
    whole, rest = found
    errors = relative_errors(rest, whole)
    assert max(errors.values()) < LIMIT, sorted(errors.items(), key=lambda entry: -entry[1])[:5]


def features_of(bundle: Bundle, front: CompiledGraph, images: np.ndarray) -> np.ndarray:
    session = Engine().open(bundle, front, {}).first
    session.image[:] = images
    session.run()
    return session.output("features")


VARIANTS = {
    "binary": {"soft": False},
    "norm": {"method": "norm"},
    "head": {"method": "head"},
    "norm, batch statistics": {"method": "norm", "statistics": "batch"},
    **{f"{g}, {s}": {"granularity": g, "statistics": s} for g in GRANULARITIES for s in ("frozen", "batch")},
    "element, binary": {"granularity": "element", "soft": False},
}


@pytest.mark.torch
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_every_method_granularity_and_statistics_has_the_gradients_of_autograd(
    tmp_path: Path, changes: dict[str, object], engine: Engine
) -> None:
    settings = small_settings(batch=3, **changes)
    micro_batch = 3 if settings.statistics == "batch" else 2
    case = Case(tiny_bundle(tmp_path), settings, tmp_path, micro_batch=micro_batch, engine=engine)
    (loss, found), (expected_loss, expected) = case.by_engine(), case.by_autograd()
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    floor = FLOOR_OF_BATCH_STATISTICS if settings.statistics == "batch" else 1e-4
    assert max(relative_errors(found, expected, floor).values()) < 1e-4


@pytest.mark.torch
@pytest.mark.parametrize("name", ["resnet20_cifar10", "mobilenet_v3_small", "squeezenet1_1"])
@pytest.mark.parametrize("changes", [{"granularity": "element"}, {"statistics": "batch"}], ids=["element", "batch"])
def test_the_larger_variants_hold_for_whole_networks_too(
    tmp_path: Path, name: str, changes: dict[str, object], engine: Engine
) -> None:
    # Statistics over few pixels make a network's gradient ill-conditioned: 64 pixels, four images.
    settings = small_settings(batch=4, **changes)
    case = Case(random_bundle(name, 64, tmp_path), settings, tmp_path, micro_batch=4, engine=engine)
    (loss, found), (expected_loss, expected) = case.by_engine(), case.by_autograd()
    assert loss == pytest.approx(expected_loss, rel=1e-4)
    errors = relative_errors(found, expected, FLOOR_OF_BATCH_STATISTICS if settings.statistics == "batch" else 1e-4)
    assert max(errors.values()) < LIMIT, sorted(errors.items(), key=lambda entry: -entry[1])[:5]


def test_the_reference_runtime_runs_a_whole_gradient_graph_in_float64(tmp_path: Path) -> None:
    """Without torch: every gradient of the tiny backbone against what ONNX Runtime accumulates."""
    bundle, settings = tiny_bundle(tmp_path), small_settings(batch=2)
    case = Case(bundle, settings, tmp_path, micro_batch=2)
    trainer = case.trainer
    loss = trainer.accumulate(case.images, case.targets).loss
    spec = GradientSpec(2, bundle.input.size, 5, frozenset(trainer.layers))
    graph = build(onnx.load(bundle.graph_path, load_external_data=False), bundle.layers, spec, np.float64)
    bound = {
        "image": case.images,
        "target": case.targets,
        "head:weight": trainer.head_weight,
        "head:bias": trainer.head_bias,
    }
    for layer in trainer.layers.values():
        bound |= layer.bound()
    feeds = {
        n: np.zeros(s) if n.startswith("acc:") else np.float64(bound[n]).reshape(s) for n, s in graph.inputs.items()
    }
    pristine = {n: np.float64(bundle.weights[n.partition(".")[0]].weight) for n in graph.externals}
    outputs = evaluate(
        graph.model, feeds, {n: w[:, :, ::-1, ::-1].copy() if "flipped" in n else w for n, w in pristine.items()}
    )
    assert float(outputs["loss"]) == pytest.approx(loss, rel=1e-5)
    for name in graph.outputs.keys() - {"loss", "logits", "head:dweight", "head:dbias"}:
        assert relative_error(bound[name], outputs[name]) < 1e-4, name
