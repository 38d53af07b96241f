"""Target rows for the loss: label smoothing, class weights and the share of the step, all in one (n, C) array."""

from __future__ import annotations

import numpy as np


def target_rows(
    labels: np.ndarray, classes: int, smoothing: float, class_weights: np.ndarray | None = None
) -> np.ndarray:
    """Rows (n, C) float32 for a whole optimizer step; their sum is 1, so that the step's loss is a weighted mean.

    The weights' sum is that of the whole step: taken per micro-batch the mean would be wrong.

    >>> target_rows(np.array([1, 0]), 2, 0.0).tolist()
    [[0.0, 0.5], [0.5, 0.0]]
    """
    rows = np.full((len(labels), classes), smoothing / classes, np.float32)
    rows[np.arange(len(labels)), labels] += 1 - smoothing
    weights = np.ones(len(labels), np.float32) if class_weights is None else class_weights[labels]
    return rows * (weights / weights.sum())[:, None].astype(np.float32)


def balanced_weights(labels: np.ndarray, classes: int) -> np.ndarray:
    """Class weights (C,) inverse to the classes' frequency, 1 on average over the images."""
    counts = np.bincount(labels, minlength=classes)
    return (len(labels) / (classes * np.maximum(counts, 1))).astype(np.float32)
