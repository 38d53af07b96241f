"""Backbone weights x pack -> the weights that run: float32 products in a fixed order, so that they can be digested.

With W the pristine weight, c the conv's bias, M the soft mask and eps the layer's:

    f = gamma / sqrt(var + eps)      V = (W * M) * f      v = beta + (c - mean) * f

There is no way back: a mask cannot be divided out, so every task is fused from the pristine weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np

from ksm_edge import native
from ksm_edge.bundle.layers import Bundle, Layer, LayerWeights
from ksm_edge.bundle.tensorfile import let_go
from ksm_edge.mask import SoftMask, expand
from ksm_edge.pack.files import require_backbone
from ksm_edge.pack.record import LayerState, Pack

NOTHING_CUT = np.zeros(0, np.int32), np.zeros(0, np.float32)


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


def with_own_statistics(
    weights: LayerWeights, eps: float, gamma: np.ndarray, beta: np.ndarray, mean: np.ndarray, var: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The gamma and beta, (O,), that with the backbone's mean and var do what the given four do with theirs.

    Frozen, batch-norm is a scale and a shift: y = s z + t with s = gamma / sqrt(var + eps) and t = beta - s mean. Under
    other statistics mu and v the same s and t are had by gamma' = s sqrt(v + eps) and beta' = t + s mu.
    """
    scale = norm_factor(gamma, var, eps)
    return scale * np.sqrt(weights.var + np.float32(eps)), beta + scale * (weights.mean - mean)


def fuse_weight_into(
    out: np.ndarray, weight: np.ndarray, mask: SoftMask | None, factor: np.ndarray, granularity: str
) -> None:
    """V into `out`, (O, I, kh, kw) float32; the bits of `fused_weight`, in one pass where one score is a kernel's."""
    if mask is not None and granularity != "kernel":
        out[:] = fused_weight(weight, expand(mask.values, weight.shape, granularity), factor)
        return
    cut, scale = (mask.cut, mask.cut_scale) if mask is not None else NOTHING_CUT
    in_one_piece = all(a.flags.c_contiguous and a.flags.aligned for a in (weight, out))
    if native.loops is not None and weight.dtype == np.float32 and in_one_piece:
        native.loops.fuse(weight, factor, cut, scale, out)
    else:
        _fuse_kernels(weight, factor, cut, scale, out)


def _fuse_kernels(weight: np.ndarray, factor: np.ndarray, cut: np.ndarray, scale: np.ndarray, out: np.ndarray) -> None:
    """The same in numpy: few kernels are cut, and those are made again. The others have the same bits, as W 1 is W."""
    np.multiply(weight, factor[:, None, None, None], out=out)
    I, size = weight.shape[1], weight[0, 0].size
    # One weight a kernel is the common case, and numpy gathers from one axis several times faster than rows of one.
    shape, column = ((-1,), (slice(None),)) if size == 1 else ((-1, size), (slice(None), None))
    cut = cut.astype(np.intp)  # numpy would convert narrower indices at each use, and slowly
    made = weight.reshape(shape)[cut]
    made *= scale[column]
    made *= factor[cut // I][column]
    out.reshape(shape)[cut] = made


def fuse_layer(
    layer: Layer,
    weights: LayerWeights,
    state: LayerState | None,
    granularity: str = "kernel",
    out: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """One layer's V (O, I, kh, kw), in `out` if that is given, and v (O,); `state` None is the backbone as it is."""
    factor, bias = fuse_norm(layer, weights, state)
    weight = np.empty_like(weights.weight) if out is None else out
    fuse_weight_into(weight, weights.weight, None if state is None else state.mask, factor, granularity)
    return weight, bias


def fuse_norm(layer: Layer, weights: LayerWeights, state: LayerState | None) -> tuple[np.ndarray, np.ndarray]:
    """One layer's f and v, each (O,)."""
    gamma, beta, mean, var = weights.gamma, weights.beta, weights.mean, weights.var
    if state is not None:
        gamma, beta = gamma + state.gamma_delta, beta + state.beta_delta
        mean = mean if state.mean is None else state.mean
        var = var if state.var is None else state.var
    factor = norm_factor(gamma, var, layer.eps)
    return factor, fused_bias(beta, weights.bias, mean, factor)


def fuse(bundle: Bundle, pack: Pack | None, out: Mapping[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
    """All weights a session needs, by initializer name: `LAYER.weight` (O, I, kh, kw) and `LAYER.bias` (O,), float32.

    `pack` None is the plain backbone. `out`: what an earlier call gave; its weights are written over.
    Raises WrongBackboneError for a pack of another one.
    """
    if pack is not None:
        require_backbone(pack, bundle)
    fused = {}
    for layer in bundle.layers:
        state = None if pack is None else pack.layers.get(layer.name)
        granularity = "kernel" if pack is None else pack.granularity
        names = f"{layer.name}.weight", f"{layer.name}.bias"
        ready = None if out is None else out[names[0]]
        fused[names[0]], fused[names[1]] = fuse_layer(layer, bundle.weights[layer.name], state, granularity, ready)
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
        let_go(bundle.weights[layer].weight)
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
