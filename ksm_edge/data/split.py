"""A stratified split: every class gives the same fraction."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ksm_edge.errors import UsageError


def stratified_split(labels: Sequence[int] | np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices to train on and indices held out, int64, each ascending; together all of `labels`.

    Each class with at least 2 images has about `fraction` of them held out, never none and never all; a class with one
    keeps it for training. The same arguments give the same split, and a class's share depends on no other class.
    Raises UsageError unless 0 <= fraction < 1 (0 holds nothing out).

    >>> stratified_split([0, 0, 0, 0, 1], 0.25, seed=0)[1].size
    1
    """
    if not 0 <= fraction < 1:
        raise UsageError(f"held-out fraction {fraction}: expected 0 or more and less than 1, such as 0.15")
    labels = np.asarray(labels, np.int64)
    held_out = np.zeros(labels.shape, bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if fraction > 0 and members.size >= 2:
            count = min(max(round(members.size * fraction), 1), members.size - 1)
            held_out[np.random.default_rng([seed, int(label)]).permutation(members)[:count]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)
