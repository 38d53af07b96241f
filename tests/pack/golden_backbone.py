"""The golden packs' backbone: `tiny`'s layers with weights from a hash, the same on every machine."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from tiny import FEATURES, INPUT, LAYERS

from ksm_edge.bundle.layers import Bundle, Layer, LayerWeights


def golden_backbone() -> Bundle:
    weights = {layer.name: _weights(layer) for layer in LAYERS}
    return Bundle(Path(), "golden", "CC0-1.0", f"{0:064x}", LAYERS, weights, FEATURES, INPUT, 1.0)


def _weights(layer: Layer) -> LayerWeights:
    """Whole numbers of 64ths, exact in float32; gamma within 0.5 and 1.5, var within 0.5 and 4.5."""
    O, I, kh, kw = layer.weight_shape
    size = O * I * kh * kw
    noise = np.frombuffer(hashlib.shake_256(layer.name.encode()).digest(size + 5 * O), np.uint8).astype(np.float32)
    weight = ((noise[:size] - 128) / 64).reshape(layer.weight_shape)
    bias, gamma, beta, mean, var = noise[size:].reshape(5, O) / 64
    return LayerWeights(weight, bias - 2, 0.5 + gamma / 4, beta - 2, mean - 2, 0.5 + var)
