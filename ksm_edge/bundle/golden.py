"""Golden images and features: the self-test every bundle carries.

The images are not stored but made again from a hash, in whole numbers, so they are the same on every machine.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from ksm_edge.bundle.layers import InputContract

COUNT = 2
TOLERANCE = 1e-4  # relative to the largest feature: processors round differently
_GRID = 9  # corners of the noise along each side


def golden_images(contract: InputContract, n: int = COUNT) -> np.ndarray:
    """`n` smooth random images as the backbone takes them, (n, 3, S, S) float32, normalised.

    >>> golden_images(InputContract(8, 8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), 1).shape
    (1, 3, 8, 8)
    """
    pixels = golden_pixels(contract.size, n).astype(np.float32)
    mean, std = (np.array(v, np.float32)[:, None, None] for v in (contract.mean, contract.std))
    return (pixels / np.float32(255) - mean) / std


def golden_pixels(size: int, n: int = COUNT) -> np.ndarray:
    """The same images as bytes, (n, 3, S, S) uint8: noise on a 9 x 9 grid, interpolated between its corners."""
    count = n * 3 * _GRID * _GRID
    noise = np.frombuffer(hashlib.shake_256(b"ksm_edge golden images 1").digest(count), np.uint8)
    grid = noise.reshape(n, 3, _GRID, _GRID).astype(np.int64)
    # Pixel p of 224 lies at p * 8 * 256 // 223 in steps of 1/256 of a cell: cell = that >> 8, weight = that & 255.
    place = np.arange(size) * ((_GRID - 1) * 256) // max(size - 1, 1)
    cell = np.minimum(place >> 8, _GRID - 2)
    weight = place - (cell << 8)
    rows = grid[:, :, cell] * (256 - weight)[:, None] + grid[:, :, cell + 1] * weight[:, None]
    both = rows[..., cell] * (256 - weight) + rows[..., cell + 1] * weight
    return (both >> 16).astype(np.uint8)


def golden_record(contract: InputContract, features: np.ndarray) -> dict[str, Any]:
    """What the manifest keeps of a run on the golden images, whose features are (n, F) float32."""
    return {
        "images_sha256": hashlib.sha256(golden_pixels(contract.size, len(features)).tobytes()).hexdigest(),
        "shape": list(features.shape),
        "features": base64.b64encode(features.astype("<f4").tobytes()).decode(),
    }


def read_golden(record: Mapping[str, Any]) -> np.ndarray:
    """The stored features, (n, F) float32."""
    return np.frombuffer(base64.b64decode(record["features"]), "<f4").reshape(record["shape"])


def feature_sum(features: np.ndarray) -> float:
    """How much of a feature vector there is for a head to weigh: its absolute values, the mean over images (n, F)."""
    return float(np.abs(features).sum(axis=1, dtype=np.float64).mean())


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference over the largest expected magnitude."""
    return float(np.abs(found - expected).max() / max(float(np.abs(expected).max()), 1e-30))
