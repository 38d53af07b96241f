from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import LAYERS, tiny_bundle, tiny_pack, tiny_weights

from ksm_edge.bundle.layers import Bundle, Layer, LayerWeights
from ksm_edge.fuse import digest_of, fuse, fuse_layer, fused_digest, with_own_statistics
from ksm_edge.pack.record import LayerState, Pack

pytestmark = pytest.mark.usefixtures("each_form")


@pytest.fixture
def bundle(tmp_path) -> Bundle:
    return tiny_bundle(tmp_path)


def naive(layer: Layer, w: LayerWeights, state: LayerState | None, granularity: str) -> tuple[np.ndarray, np.ndarray]:
    """One weight at a time, in float32, in the documented order."""
    weight, bias = np.zeros_like(w.weight), np.zeros_like(w.bias)
    for o, i, y, x in np.ndindex(weight.shape):
        gamma = w.gamma[o] if state is None else w.gamma[o] + state.gamma_delta[o]
        beta = w.beta[o] if state is None else w.beta[o] + state.beta_delta[o]
        mean = w.mean[o] if state is None or state.mean is None else state.mean[o]
        var = w.var[o] if state is None or state.var is None else state.var[o]
        f = gamma / np.sqrt(var + np.float32(layer.eps))
        m = np.float32(1)
        if state is not None and state.mask is not None:
            index = {"kernel": (o, i), "channel": (o, 0), "element": (o, i, y, x)}.get(granularity, (o, i // 3))
            m = np.float32(state.mask.keep[index]) + state.mask.scale[index]
        weight[o, i, y, x] = (w.weight[o, i, y, x] * m) * f
        bias[o] = beta + (w.bias[o] - mean) * f
    return weight, bias


@pytest.mark.parametrize("statistics", ["frozen", "batch"])
@pytest.mark.parametrize("granularity", ["kernel", "group:3", "channel", "element"])
def test_fused_weights_are_the_naive_ones_bit_for_bit(bundle: Bundle, granularity: str, statistics: str) -> None:
    pack = tiny_pack(granularity, statistics=statistics, cut=0.5)
    fused = fuse(bundle, pack)
    for layer in LAYERS:
        weight, bias = naive(layer, bundle.weights[layer.name], pack.layers[layer.name], granularity)
        assert fused[f"{layer.name}.weight"].tobytes() == weight.tobytes()
        assert fused[f"{layer.name}.bias"].tobytes() == bias.tobytes()


@pytest.mark.parametrize("layer", [layer for layer in LAYERS if layer.has_norm], ids=lambda layer: layer.name)
def test_frozen_batch_norm_is_two_vectors_and_not_four(layer: Layer) -> None:
    w = LayerWeights(*(np.asarray(array, np.float64) for array in vars(tiny_weights()[layer.name]).values()))
    rng, O = np.random.default_rng(0), layer.weight_shape[0]
    gamma, beta, mean, var = rng.normal(1, 0.3, O), rng.normal(0, 0.3, O), rng.normal(0, 0.5, O), rng.uniform(0.1, 3, O)
    four = LayerState(None, gamma - w.gamma, beta - w.beta, mean, var)
    gamma, beta = with_own_statistics(w, layer.eps, gamma, beta, mean, var)
    two = LayerState(None, gamma - w.gamma, beta - w.beta)
    for part, expected in zip(fuse_layer(layer, w, two), fuse_layer(layer, w, four), strict=True):
        np.testing.assert_allclose(part, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("granularity", ["kernel", "element"])
def test_ready_arrays_are_written_over_and_nothing_of_before_is_left(bundle: Bundle, granularity: str) -> None:
    ready = fuse(bundle, tiny_pack(granularity, cut=0.5, seed=1))
    pack = tiny_pack(granularity, cut=0.5, seed=2)
    fused = fuse(bundle, pack, ready)
    assert fused_digest(fused) == fused_digest(fuse(bundle, pack))
    for layer in LAYERS:
        assert fused[f"{layer.name}.weight"] is ready[f"{layer.name}.weight"]


def test_the_plain_backbone_is_the_empty_pack(bundle: Bundle) -> None:
    nothing = {layer.name: LayerState(None, *np.zeros((2, layer.weight_shape[0]), np.float32)) for layer in LAYERS}
    plain = fuse(bundle, None)
    for pack in (tiny_pack(changes={"layers": nothing}), tiny_pack(changes={"layers": {}})):
        assert fused_digest(fuse(bundle, pack)) == fused_digest(plain)
    for layer in LAYERS:
        weight, bias = naive(layer, bundle.weights[layer.name], None, "kernel")
        assert plain[f"{layer.name}.weight"].tobytes() == weight.tobytes()
        assert plain[f"{layer.name}.bias"].tobytes() == bias.tobytes()


def test_fusing_leaves_the_pristine_weights_alone(bundle: Bundle) -> None:
    fuse(bundle, tiny_pack(cut=0.5))
    for name, weights in tiny_weights().items():
        for part in ("weight", "bias", "gamma", "beta", "mean", "var"):
            np.testing.assert_array_equal(getattr(bundle.weights[name], part), getattr(weights, part))


def test_a_conv_without_norm_runs_as_it_is(bundle: Bundle) -> None:
    plain = fuse(bundle, None)
    np.testing.assert_array_equal(plain["plain.weight"], bundle.weights["plain"].weight)
    np.testing.assert_array_equal(plain["plain.bias"], bundle.weights["plain"].beta)


def test_everything_fused_is_float32_and_has_the_layers_shape(bundle: Bundle) -> None:
    fused = fuse(bundle, tiny_pack())
    assert list(fused) == [f"{layer.name}.{kind}" for layer in LAYERS for kind in ("weight", "bias")]
    assert all(array.dtype == np.float32 for array in fused.values())
    assert all(fused[f"{layer.name}.weight"].shape == layer.weight_shape for layer in LAYERS)


def test_the_digest_sees_one_bit_and_one_name_but_no_order(bundle: Bundle) -> None:
    fused = fuse(bundle, tiny_pack())
    digest = fused_digest(fused)
    assert fused_digest(dict(reversed(fused.items()))) == digest
    changed = {name: array.copy() for name, array in fused.items()}
    changed["dw.bias"][0] = np.nextafter(changed["dw.bias"][0], np.float32(9))
    assert fused_digest(changed) != digest
    assert fused_digest({name.replace("dw", "dv"): array for name, array in fused.items()}) != digest


def test_equal_tasks_fuse_to_equal_digests(bundle: Bundle) -> None:
    pack: Pack = tiny_pack(seed=4)
    again = replace(pack, task="another name")
    assert fused_digest(fuse(bundle, pack)) == fused_digest(fuse(bundle, again))


def test_the_digest_taken_tensor_by_tensor_is_that_of_all_fused_weights(tmp_path: Path) -> None:
    bundle, pack = tiny_bundle(tmp_path), tiny_pack()
    assert digest_of(bundle, pack) == fused_digest(fuse(bundle, pack))
    assert digest_of(bundle, None) == fused_digest(fuse(bundle, None))
