"""A task, in memory: what a pack file says, decoded, and nothing of the backbone's own.

Everything per layer is relative to the backbone: no mask means every kernel is kept, a zero difference means the
backbone's own batch-norm. So a pack can be read and inspected without the backbone it belongs to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ksm_edge.bundle.layers import InputContract
from ksm_edge.mask import SoftMask

FROZEN, BATCH = STATISTICS = ("frozen", "batch")


@dataclass(frozen=True)
class LayerState:
    """What a task changes of one conv layer of O filters.

    `mean` and `var` are the task's own running statistics where it was trained with batch statistics, absolute rather
    than differences; None where the backbone's are used.
    """

    mask: SoftMask | None  # None: every kernel kept
    gamma_delta: np.ndarray  # (O,) float32, added to the backbone's gamma
    beta_delta: np.ndarray  # (O,) float32, added to the backbone's beta
    mean: np.ndarray | None = None  # (O,) float32
    var: np.ndarray | None = None  # (O,) float32


@dataclass(frozen=True)
class Pack:
    """One task of one backbone. Layers of the backbone that `layers` does not name are left as they are."""

    task: str
    classes: tuple[str, ...]  # C names, in the order of the head's rows
    backbone: str  # digest of the only backbone this pack fits
    recipe: str  # that backbone's name, for people
    granularity: str  # kernel, group:N, channel or element
    soft: bool  # False: every scale is 0
    statistics: str  # frozen or batch
    input: InputContract
    layers: Mapping[str, LayerState]
    weight_shapes: Mapping[str, tuple[int, int, int, int]]  # (O, I, kh, kw) of each of `layers`
    head_weight: np.ndarray  # (C, F) float32
    head_bias: np.ndarray  # (C,) float32
    record: Mapping[str, Any]  # of the training: data digest, steps, accuracy on validation; whatever JSON can say
    fused_digest: str  # of the weights fused from this pack; "" where not yet known
    golden_logits: np.ndarray  # (n, C) float32: for the bundle's n golden inputs
    bits: Mapping[str, int] = field(
        default_factory=dict
    )  # `scale`, `norm` and `head` of the file that it was read from

    @property
    def amplifies(self) -> bool:
        """Whether any kernel is amplified."""
        masks = (state.mask for state in self.layers.values())
        return self.soft and any(mask is not None and (mask.cut_scale > 1).any() for mask in masks)
