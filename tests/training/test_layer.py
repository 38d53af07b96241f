"""One layer's update against METHOD's formulas, written with the whole gradient of the weight that ran."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tiny import LAYERS, tiny_weights

from ksm_edge.bundle.layers import Layer, LayerWeights
from ksm_edge.fuse import fuse_layer
from ksm_edge.mask import INITIAL_SCORE, THRESHOLD, expand, keep_gradient, reduce, score_gradient
from ksm_edge.pack.record import LayerState
from ksm_edge.training.layer import TrainedLayer, pull_to_keeping
from ksm_edge.training.settings import Settings

GRANULARITIES = ("kernel", "group:3", "channel", "element")
TABLE = {layer.name: layer for layer in LAYERS}


def form_of(layer: Layer, granularity: str) -> str:
    if layer.is_depthwise and granularity != "element":
        return "channel"
    return "pointwise" if layer.groups == 1 and layer.weight_shape[2:] == (1, 1) else "taps"


def trained(name: str, granularity: str = "kernel", *, weights: LayerWeights | None = None, seed: int = 3,
            **changes: object) -> TrainedLayer:  # fmt: skip
    """A layer in the middle of a training: random scores of which some are cut, moved gamma and beta."""
    settings = replace(Settings(granularity=granularity), **changes)  # type: ignore[arg-type]
    layer = TABLE[name]
    masked = settings.method == "ksm"
    form = form_of(layer, granularity if masked else "kernel")
    result = TrainedLayer(layer, weights or tiny_weights()[name], form, settings, masked=masked)
    rng = np.random.default_rng(seed)
    result.score[...] = rng.normal(8e-3, 5e-3, result.score.shape)
    result.beta += rng.normal(0, 0.1, result.beta.shape).astype(np.float32)
    if layer.has_norm:
        result.gamma += rng.normal(0, 0.1, result.gamma.shape).astype(np.float32)
    result.fuse()
    return result


def state_of(layer: TrainedLayer) -> LayerState:
    mask = layer.mask() if "score" in layer.learning else None
    gamma, beta = layer.gamma - layer.pristine.gamma, layer.beta - layer.pristine.beta
    own = (layer.mean, layer.var) if layer.batch_norm else (None, None)
    return LayerState(mask, gamma, beta, *own)


each = pytest.mark.parametrize("name", TABLE)
every = pytest.mark.parametrize("granularity", GRANULARITIES)


@each
@every
@pytest.mark.parametrize("soft", [True, False])
def test_the_weights_that_run_are_those_of_fuse_bit_for_bit(name: str, granularity: str, soft: bool) -> None:
    layer = trained(name, granularity, soft=soft)
    # As in a pack: gamma and beta are the backbone's plus a difference, in float32.
    state = state_of(layer)
    layer.gamma[:], layer.beta[:] = layer.pristine.gamma + state.gamma_delta, layer.pristine.beta + state.beta_delta
    layer.fuse()
    weight, bias = fuse_layer(layer.layer, layer.pristine, state, granularity)
    assert np.array_equal(layer.bias.view(np.int32), bias.view(np.int32))
    if layer.form == "channel":
        factor = layer.gamma / np.sqrt(layer.var + np.float32(layer.layer.eps))
        assert np.array_equal(layer.weight, layer.mask().values[:, 0] * factor)
    else:
        assert np.array_equal(layer.weight.view(np.int32), weight.view(np.int32))


@each
def test_a_layer_in_the_beginning_is_the_backbone(name: str) -> None:
    for method in ("ksm", "norm"):
        layer = TrainedLayer(TABLE[name], tiny_weights()[name], form_of(TABLE[name], "kernel"), Settings(method=method))
        weight, bias = fuse_layer(layer.layer, layer.pristine, None)
        if layer.form != "channel":
            assert np.array_equal(layer.weight, weight)
        assert np.array_equal(layer.bias, bias)


def accumulate(layer: TrainedLayer, seed: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Fill the accumulators as the graph would for a random gradient of the weight that runs; returns it and dbias."""
    rng = np.random.default_rng(seed)
    O, I, kh, kw = layer.layer.weight_shape
    dweight = rng.standard_normal((O, I, kh, kw)).astype(np.float32)
    layer.dbias[:] = rng.standard_normal(O)
    if layer.form == "channel":
        layer.product[:] = (dweight * layer.pristine.weight).sum((1, 2, 3))
    elif layer.form == "pointwise":
        layer.product[:] = dweight[:, :, 0, 0]
    else:
        layer.product[:] = dweight.reshape(O, I, kh * kw).transpose(2, 0, 1)
    return dweight, layer.dbias.copy()


def expected(layer: TrainedLayer, dweight: np.ndarray, dbias: np.ndarray) -> dict[str, np.ndarray]:
    """The chain rule through V = W M f and v = beta + (c - mean) f, in float64."""
    p, eps = layer.pristine, layer.layer.eps
    W, dV, var = np.float64(p.weight), np.float64(dweight), np.float64(layer.var)
    f = np.ones_like(var) if layer.batch_norm else np.float64(layer.gamma) / np.sqrt(var + eps)
    granularity, masked = layer.settings.granularity, "score" in layer.learning
    M = np.float64(expand(layer.mask().values, W.shape, granularity)) if masked else np.ones_like(W)
    df = (dV * W * M).sum((1, 2, 3)) + (np.float64(p.bias) - layer.mean) * dbias
    found = {"beta": np.float64(dbias), "gamma": df / np.sqrt(var + eps)}
    if masked:
        found["score"] = reduce(dV * W * f[:, None, None, None], granularity)
    return found


@pytest.mark.parametrize("name", ["project", "dw"])
def test_gradients_of_scores_are_made_where_the_product_was(name: str) -> None:
    layer = trained(name)
    accumulate(layer)
    assert np.shares_memory(layer.gradients()["score"], layer.product)


@each
@every
@pytest.mark.parametrize("method", ["ksm", "norm"])
def test_gradients_are_the_chain_rule(
    name: str, granularity: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ksm_edge.training.blocks.BLOCK", 4)  # of several blocks is what is cut too
    layer = trained(name, granularity, method=method)
    wanted = expected(layer, *accumulate(layer))
    found = layer.gradients()
    assert found.keys() == wanted.keys()
    for which, gradient in wanted.items():
        np.testing.assert_allclose(found[which], gradient, rtol=2e-5, atol=2e-5 * abs(gradient).max(), err_msg=which)


@pytest.mark.parametrize("name", ["stem", "dw", "project", "grouped"])
def test_filters_whose_factor_is_zero_have_exact_gradients(name: str) -> None:
    """gamma 0 makes V 0: what M S was cannot be had back from it, yet gamma must be able to leave 0."""
    weights = tiny_weights()[name]
    gamma = weights.gamma.copy()
    gamma[[0, 3]] = 0
    layer = trained(name, weights=replace(weights, gamma=gamma))
    layer.gamma[[0, 3]] = 0
    layer.fuse()
    wanted = expected(layer, *accumulate(layer))
    found = layer.gradients()
    assert abs(wanted["gamma"][[0, 3]]).min() > 1e-2
    for which, gradient in wanted.items():
        np.testing.assert_allclose(found[which], gradient, rtol=2e-5, atol=2e-5 * abs(gradient).max(), err_msg=which)


def test_a_mask_of_exactly_zero_does_not_hide_the_gradient_of_its_score() -> None:
    layer = trained("project", soft=False)
    cut = ~layer.mask().keep
    assert cut.any()
    dweight, _ = accumulate(layer)
    assert (layer.weight[cut] == 0).all()
    factor = layer.gamma / np.sqrt(layer.var + np.float32(layer.layer.eps))
    wanted = (layer.pristine.weight * dweight)[:, :, 0, 0] * factor[:, None]
    np.testing.assert_allclose(layer.gradients()["score"][cut], wanted[cut], rtol=1e-6)


def test_with_batch_statistics_gamma_and_beta_come_from_the_graph_and_the_score_knows_no_factor() -> None:
    layer = trained("project", statistics="batch")
    dweight, _ = accumulate(layer)
    layer.dgamma[:], layer.dbeta[:] = 2, 3
    found = layer.gradients()
    assert (found["gamma"] == 2).all()
    assert (found["beta"] == 3).all()
    np.testing.assert_allclose(found["score"], (layer.pristine.weight * dweight)[:, :, 0, 0], rtol=1e-6)
    assert np.array_equal(layer.bias, layer.pristine.bias)


def test_a_step_moves_scores_by_the_gradient_of_keep() -> None:
    layer = trained("grouped")
    dweight, dbias = accumulate(layer)
    before = layer.score.copy()
    product = np.float32(expected(layer, dweight, dbias)["score"])
    layer.step({"score": 1e-4, "gamma": 0.0, "beta": 0.0}, 1)
    gradient = keep_gradient(before) * product
    clear = abs(gradient) > 1e-4
    # Adam's first step is the rate, against the sign of the gradient.
    np.testing.assert_allclose((before - layer.score)[clear], 1e-4 * np.sign(gradient[clear]), rtol=1e-2)
    factor = (layer.gamma / np.sqrt(layer.var + np.float32(layer.layer.eps)))[:, None, None, None]
    np.testing.assert_allclose(
        gradient, score_gradient(before, np.float32(dweight * layer.pristine.weight * factor)), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(("method", "learning"), [("ksm", {"score", "gamma", "beta"}), ("norm", {"gamma", "beta"})])
def test_methods_choose_what_learns(method: str, learning: set[str]) -> None:
    layer = trained("stem", method=method)
    before = {name: adam.parameter.copy() for name, adam in layer.learning.items()}
    assert before.keys() == learning
    accumulate(layer)
    layer.step({"score": 1e-3, "gamma": 1e-3, "beta": 1e-3}, 1)
    assert all((adam.parameter != before[name]).any() for name, adam in layer.learning.items())


def test_a_conv_without_batch_norm_trains_its_bias_and_no_gamma() -> None:
    layer = trained("plain")
    assert layer.learning.keys() == {"score", "beta"}
    accumulate(layer)
    layer.step({"score": 1e-3, "gamma": 1e-3, "beta": 1e-3}, 1)
    assert (layer.gamma == 1).all()


def test_pristine_weights_are_never_written_to() -> None:
    for name in TABLE:
        layer = trained(name)
        before = [getattr(layer.pristine, n).copy() for n in ("weight", "bias", "gamma", "beta", "mean", "var")]
        accumulate(layer)
        layer.step({"score": 1e-2, "gamma": 1e-2, "beta": 1e-2}, 1)
        after = [getattr(layer.pristine, n) for n in ("weight", "bias", "gamma", "beta", "mean", "var")]
        assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_running_statistics_move_as_torch_moves_them() -> None:
    layer = trained("stem", statistics="batch")
    mean, var = layer.mean.copy(), layer.var.copy()
    layer.observe(np.ones(8, np.float32), np.full(8, 2, np.float32), count=5)
    np.testing.assert_allclose(layer.mean, 0.9 * mean + 0.1, rtol=1e-6)
    np.testing.assert_allclose(layer.var, 0.9 * var + 0.1 * 2 * 5 / 4, rtol=1e-6)


def test_bound_arrays_are_the_layers_own_memory() -> None:
    for name in TABLE:
        layer = trained(name, statistics="batch")
        own = (layer.weight, layer.bias, layer.product, layer.dbias, layer.gamma, layer.beta, layer.dgamma, layer.dbeta)
        for bound in layer.bound().values():
            assert any(np.shares_memory(bound, array) for array in own)
            assert bound.flags.c_contiguous


def test_the_penalty_pulls_what_is_below_the_initial_score_up_to_it_and_no_further() -> None:
    start = np.float32(INITIAL_SCORE)
    score = np.array([-0.5, start - 0.01, start - 0.001, start, start + 0.2], np.float32)
    pull_to_keeping(score, 0.004)
    np.testing.assert_allclose(score, [-0.496, start - 0.006, start, start, start + 0.2], rtol=1e-6)


def test_under_the_penalty_only_scores_whose_gradient_keeps_its_sign_sink() -> None:
    """Gradients of one size: those of the first filter are steady, those of the others change their sign at random."""
    penalised, free = trained("project", cut_penalty=0.5), trained("project")
    for layer in (penalised, free):
        layer.score.fill(INITIAL_SCORE)
        rng = np.random.default_rng(0)
        factor = layer.gamma / np.sqrt(layer.var + np.float32(layer.layer.eps))
        for count in range(1, 41):
            signs = rng.choice([-1.0, 1.0], layer.score.shape)
            signs[0] = 1
            layer.product[...] = signs / (layer.pristine.weight[:, :, 0, 0] * factor[:, None])
            layer.step({"score": 1e-3, "gamma": 0.0, "beta": 0.0}, count)
    for layer in (penalised, free):
        assert (layer.score[0] < THRESHOLD).all()
    assert (penalised.score[1:] >= THRESHOLD).all()
    assert (free.score[1:] < THRESHOLD).any()


def test_settled_kernels_stay_under_the_penalty_too() -> None:
    """It pulls cut ones up to where those are that stay."""
    layer = trained("project", cut_penalty=0.5)
    layer.settle(np.arange(layer.mask().cut.size) % 2 == 0)
    kept = layer.score == INITIAL_SCORE
    for count in range(1, 11):
        accumulate(layer, seed=count)
        layer.step({"score": 1e-3, "gamma": 0.0, "beta": 0.0}, count)
    assert kept.any()
    assert (layer.score[kept] == INITIAL_SCORE).all()
    assert (layer.score[~kept] != INITIAL_SCORE).any()
