"""What a layer's masks and batch-norm feel, from what the gradient graph accumulated.

With M the soft mask, f = gamma / sqrt(var + eps) and S, of one row for each filter, the weight times what its gradient
is: dM = f S, and df is the sum of M S over a filter's row.
"""

from __future__ import annotations

import numpy as np

from ksm_edge import native
from ksm_edge.fuse import NOTHING_CUT
from ksm_edge.mask import SoftMask
from ksm_edge.training.blocks import blocks


def feel(felt: np.ndarray, weight: np.ndarray | None, factor: np.ndarray, mask: SoftMask | None) -> np.ndarray:
    """Make f S of `felt`, (O, N) float32, in place; returns the sums of M S, (O,).

    `felt` is S, or where `weight` (O, N) is given S is weight times felt; each is in one piece. `factor` is f, (O,);
    `mask`, of as many scores, None where all are kept. Sums are in another order in each of the two forms, the rest has
    the same bits.
    """
    cut, scale = NOTHING_CUT if mask is None else (mask.cut, mask.cut_scale)
    if native.loops is not None and (weight is None or weight.flags.aligned):
        sums = np.empty(len(felt), np.float32)
        native.loops.feel(felt, weight, factor, cut, scale, sums)
        return sums
    if weight is not None:
        felt *= weight
    sums = felt.sum(axis=1) - _too_much(felt, cut, scale)
    felt *= factor[:, None]
    return sums


def _too_much(felt: np.ndarray, cut: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """(O,): what the sums say too much of the few that are cut, as if nothing were."""
    O, N = felt.shape
    total = np.zeros(O)
    for places, its in blocks(cut, scale):
        total += np.bincount(places // N, (1 - its) * felt.reshape(-1)[places], minlength=O)
    return total.astype(felt.dtype)
