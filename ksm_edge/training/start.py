"""Beginning where a pack ended: with its masks, its batch-norm, and the rows of its head."""

from __future__ import annotations

import numpy as np

from ksm_edge.errors import UsageError
from ksm_edge.mask import score_from_scale
from ksm_edge.pack.files import require_backbone
from ksm_edge.pack.record import Pack
from ksm_edge.training.trainer import Trainer


def start_from(trainer: Trainer, pack: Pack, classes: tuple[str, ...]) -> None:
    """Put a trainer that has not begun where the pack is; classes that the pack does not know start as ever.

    Scores are those that give the pack's masks. A pack of batch statistics has them folded into gamma and beta, so it
    is gone on from with the backbone's own, frozen. Raises WrongBackboneError, and UsageError where the settings would
    lose something of the pack.
    """
    require_backbone(pack, trainer.bundle)
    settings = trainer.settings
    if settings.statistics != "frozen":
        raise UsageError("a pack is gone on from with frozen statistics: leave out --statistics batch")
    masked = any(state.mask is not None for state in pack.layers.values())
    if masked and (pack.granularity, pack.soft) != (settings.granularity, settings.soft):
        raise UsageError(
            f"pack {pack.task!r} has {_kind(pack.granularity, pack.soft)} masks, asked for are "
            f"{_kind(settings.granularity, settings.soft)} ones: give --granularity {pack.granularity}"
            f"{', and leave out --binary' if pack.soft else ' --binary'}"
        )
    if pack.amplifies and settings.method == "ksm" and not settings.amplify:
        raise UsageError(f"pack {pack.task!r} amplifies kernels: leave out --no-amplify, or that would be lost")
    for name, state in pack.layers.items():
        layer = trainer.layers.get(name)
        changed = state.mask is not None or state.gamma_delta.any() or state.beta_delta.any()
        if layer is None or (state.mask is not None and "score" not in layer.learning):
            if changed:
                raise UsageError(
                    f"pack {pack.task!r} changes layer {name}, which is not to be learned: it would be lost"
                )
            continue
        if state.mask is not None:
            layer.score[...] = score_from_scale(state.mask)
        layer.gamma += state.gamma_delta
        layer.beta += state.beta_delta
        layer.fuse()
    rows = [classes.index(name) for name in pack.classes]
    trainer.head_weight[rows] = pack.head_weight
    trainer.head_bias[rows] = pack.head_bias
    np.copyto(trainer.run_head, trainer.head_weight)


def _kind(granularity: str, soft: bool) -> str:
    return f"{'soft' if soft else 'binary'} {granularity}"
