"""Random weights for a recipe's network, as good as trained ones for gradients, time and memory."""

from __future__ import annotations

import numpy as np
import onnx

from ksm_edge.bundle.recipe import load_recipe


def random_state(name: str, seed: int = 0) -> dict[str, np.ndarray]:
    """A state dict: convs in the manner of He et al. (2015), batch-norm of all kinds."""
    rng = np.random.default_rng(seed)
    return {
        entry.name: _random(entry.name, [d.dim_value for d in entry.type.tensor_type.shape.dim], rng)
        for entry in onnx.load(load_recipe(name).graph_path).graph.input
        if entry.name != "image"
    }


def _random(name: str, shape: list[int], rng: np.random.Generator) -> np.ndarray:
    if len(shape) > 1:
        value = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
    elif name.endswith("weight"):
        value = rng.uniform(0.5, 1.2, shape)
    elif name.endswith("running_var"):
        value = rng.uniform(0.5, 2, shape)
    else:
        value = rng.uniform(-0.3, 0.3, shape)
    return value.astype(np.float32)
