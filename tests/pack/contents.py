"""What a pack holds, in one form for both readers: plain values, and a flat table of arrays."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from typing import Any

import numpy as np

from ksm_edge.pack.record import Pack

FIELDS = ("task", "backbone", "recipe", "granularity", "soft", "statistics", "fused_digest", "record")
PARTS = {"gamma": "gamma_delta", "beta": "beta_delta", "mean": "mean", "var": "var"}


def of_pack(pack: Pack) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Of what this project's reader gives."""
    values = {name: getattr(pack, name) for name in FIELDS}
    values |= {
        "classes": list(pack.classes),
        "input": {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(pack.input).items()},
        "layers": [[name, *shape] for name, shape in pack.weight_shapes.items()],
    }
    arrays = {"head": pack.head_weight, "bias": pack.head_bias, "golden": pack.golden_logits}
    for name, state in pack.layers.items():
        found = {part: getattr(state, ours) for part, ours in PARTS.items()}
        if (mask := state.mask) is not None:
            found |= {"keep": mask.keep, "scale": mask.scale, "range": np.array([mask.low, mask.high], np.float32)}
        arrays |= {f"{name}/{part}": array for part, array in found.items() if array is not None}
    return values, arrays


def of_second(read: dict[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Of what `second_reader.read_pack` gives."""
    metadata = read["metadata"]
    values = {name: metadata[name] for name in (*FIELDS, "classes", "layers")}
    values["input"] = {name: metadata["input"][name] for name in ("size", "resize", "mean", "std")}
    arrays = {name: read[name] for name in ("head", "bias", "golden")}
    for name, layer in read["layers"].items():
        arrays |= {f"{name}/{part}": array for part, array in layer.items()}
    return values, arrays


def digests(arrays: dict[str, np.ndarray]) -> dict[str, str]:
    """dtype, shape and half the SHA-256 of each array's little-endian bytes, in one text."""
    return {name: _digest(array) for name, array in sorted(arrays.items())}


def _digest(array: np.ndarray) -> str:
    shape = "x".join(map(str, array.shape))
    data = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
    return f"{array.dtype.name} {shape} {hashlib.sha256(data).hexdigest()[:32]}"
