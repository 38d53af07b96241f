"""A trainer's state as a task pack."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ksm_edge.bundle.golden import golden_images
from ksm_edge.bundle.layers import Bundle
from ksm_edge.fuse import digest_of, with_own_statistics
from ksm_edge.pack.reader import quantized
from ksm_edge.pack.record import LayerState, Pack
from ksm_edge.training.judge import Judge
from ksm_edge.training.layer import TrainedLayer
from ksm_edge.training.trainer import Trainer


def to_pack(trainer: Trainer, task: str, classes: tuple[str, ...]) -> Pack:
    """The task as it would be loaded again, in the pack's bits; no record, digest or golden outputs yet."""
    return quantized(unquantized(trainer, task, classes), **trainer.settings.pack_bits)


def unquantized(trainer: Trainer, task: str, classes: tuple[str, ...]) -> Pack:
    """The same, every number as training has it."""
    bundle, settings = trainer.bundle, trainer.settings
    return Pack(
        task=task,
        classes=classes,
        backbone=bundle.digest,
        recipe=bundle.recipe,
        granularity=settings.granularity,
        soft=settings.soft,
        statistics=settings.statistics,
        input=bundle.input,
        layers={name: _layer_state(layer) for name, layer in trainer.layers.items()},
        weight_shapes={name: layer.layer.weight_shape for name, layer in trainer.layers.items()},
        head_weight=trainer.head_weight.copy(),
        head_bias=trainer.head_bias.copy(),
        record={},
        fused_digest="",
        golden_logits=np.zeros((0, len(classes)), np.float32),
    )


def _layer_state(layer: TrainedLayer) -> LayerState:
    gamma, beta, pristine = layer.gamma, layer.beta, layer.pristine
    if layer.batch_norm:  # two vectors in the pack instead of four
        gamma, beta = with_own_statistics(pristine, layer.layer.eps, gamma, beta, layer.mean, layer.var)
    mask = layer.mask() if "score" in layer.learning else None
    mask = mask if mask is not None and mask.cut.size else None
    return LayerState(mask, gamma - pristine.gamma, beta - pristine.beta)


def finished(pack: Pack, bundle: Bundle, judge: Judge, record: Mapping[str, Any]) -> Pack:
    """The pack with its training record, the digest of its fused weights and its outputs for the golden inputs."""
    golden = judge.logits(pack, golden_images(bundle.input))
    return replace(pack, record=dict(record), fused_digest=digest_of(bundle, pack), golden_logits=golden)
