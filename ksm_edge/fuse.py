"""Backbone weights x pack -> the weights that run: float32 products in a fixed order, so that they can be digested.

With W the pristine weight, c the conv's bias, M the soft mask and eps the layer's:

    f = gamma / sqrt(var + eps)      V = (W * M) * f      v = beta + (c - mean) * f

There is no way back: a mask cannot be divided out, so every task is fused from the pristine weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np

from ksm_edge.bundle.layers import Bundle, Layer, LayerWeights
from ksm_edge.mask import expand
from ksm_edge.pack.files import require_backbone
from ksm_edge.pack.record import LayerState, Pack


def norm_factor(gamma: np.ndarray, var: np.ndarray, eps: float) -> np.ndarray:
    """f, (O,) float32: what batch-norm multiplies each filter by."""
    return gamma / np.sqrt(var + np.float32(eps))


def fused_weight(weight: np.ndarray, mask: np.ndarray | None, factor: np.ndarray) -> np.ndarray:
    """V, (O, I, kh, kw) float32, from W, M broadcastable against it (None: all ones) and f (O,)."""
    masked = weight if mask is None else weight * mask
    return masked * factor[:, None, None, None]


def fused_bias(beta: np.ndarray, bias: np.ndarray, mean: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """v, (O,) float32, from batch-norm's beta and mean, the conv's own bias and f, each (O,)."""
    return beta + (bias - mean) * factor


def fuse_layer(
    layer: Layer, weights: LayerWeights, state: LayerState | None, granularity: str = "kernel"
) -> tuple[np.ndarray, np.ndarray]:
    """One layer's V (O, I, kh, kw) and v (O,); `state` None is the backbone as it is."""
    gamma, beta, mean, var, mask = weights.gamma, weights.beta, weights.mean, weights.var, None
    if state is not None:
        gamma, beta = gamma + state.gamma_delta, beta + state.beta_delta
        mean = mean if state.mean is None else state.mean
        var = var if state.var is None else state.var
        if state.mask is not None:
            mask = expand(state.mask.values, layer.weight_shape, granularity)
    factor = norm_factor(gamma, var, layer.eps)
    return fused_weight(weights.weight, mask, factor), fused_bias(beta, weights.bias, mean, factor)


def fuse(bundle: Bundle, pack: Pack | None) -> dict[str, np.ndarray]:
    """All weights a session needs, by initializer name: `LAYER.weight` (O, I, kh, kw) and `LAYER.bias` (O,), float32.

    `pack` None is the plain backbone. Raises WrongBackboneError for a pack of another one.
    """
    if pack is not None:
        require_backbone(pack, bundle)
    fused = {}
    for layer in bundle.layers:
        state = None if pack is None else pack.layers.get(layer.name)
        granularity = "kernel" if pack is None else pack.granularity
        weight, bias = fuse_layer(layer, bundle.weights[layer.name], state, granularity)
        fused[f"{layer.name}.weight"], fused[f"{layer.name}.bias"] = weight, bias
    return fused


def digest_of(bundle: Bundle, pack: Pack | None) -> str:
    """The `fused_digest` of a pack, one tensor at a time, for where all fused weights at once are too many."""
    layers = {layer.name: layer for layer in bundle.layers}
    granularity = "kernel" if pack is None else pack.granularity
    digest = hashlib.sha256()
    for name in sorted(f"{layer}.{part}" for layer in layers for part in ("weight", "bias")):
        layer, _, part = name.rpartition(".")
        state = None if pack is None else pack.layers.get(layer)
        weight, bias = fuse_layer(layers[layer], bundle.weights[layer], state, granularity)
        _add(digest, name, weight if part == "weight" else bias)
    return digest.hexdigest()


def fused_digest(fused: Mapping[str, np.ndarray]) -> str:
    """sha256 (hex) over the names, sorted, each followed by a zero byte and its little-endian float32 bytes."""
    digest = hashlib.sha256()
    for name in sorted(fused):
        _add(digest, name, fused[name])
    return digest.hexdigest()


def _add(digest: hashlib._Hash, name: str, tensor: np.ndarray) -> None:
    digest.update(name.encode() + b"\0")
    digest.update(np.ascontiguousarray(tensor, "<f4").data)
