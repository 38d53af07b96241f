"""How far a task's probabilities can be trusted, and from which on an answer is none: learned from held-out images.

A network's softmax is not the share of answers that are right. Dividing the logits by one temperature mends most of
that (Guo, Pleiss, Sun, Weinberger 2017). The lowest of the mended probabilities that held-out images have marks what a
task knows: an image whose best class is below it is called unknown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

FEWEST = 20  # held-out images, below which a temperature would be chance
KNOWN_SHARE = 0.95  # of held-out images that stay known
RANGE = math.log(0.2), math.log(5.0)  # of the temperature's logarithm
BINS = 15  # as usual for the expected calibration error
GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Calibration:
    """`temperature` divides the logits; a best class less likely than `threshold` is unknown."""

    temperature: float = 1.0
    threshold: float = 0.0
    error: float | None = None  # expected calibration error on the held-out images, before they joined, with that
    error_before: float | None = None  # with none
    images: int = 0

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """(N, C) logits -> (N, C), each row with the sum 1."""
        return softmax(logits / self.temperature)

    def as_record(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_record(record: Mapping[str, Any]) -> Calibration:
        """Of a pack's training record; the default where it has none that can be used."""
        found = record.get("calibration")
        if not isinstance(found, dict):
            return Calibration()
        temperature, threshold = (_number(found.get(name)) for name in ("temperature", "threshold"))
        if not (temperature > 0 and 0 <= threshold <= 1):
            return Calibration()
        error, error_before = (
            number if 0 <= (number := _number(found.get(name))) <= 1 else None for name in ("error", "error_before")
        )
        images = found.get("images")
        return Calibration(temperature, threshold, error, error_before, images if type(images) is int else 0)


def _number(value: Any) -> float:
    """NaN, which fits no range, for what is no number that float holds."""
    return float(value) if type(value) in (int, float) and abs(value) < 1e300 else math.nan


def calibrate(logits: np.ndarray, labels: np.ndarray) -> Calibration:
    """From held-out images' logits (n, C) and labels (n,); the default for fewer than FEWEST."""
    n = len(labels)
    if n < FEWEST:
        return Calibration(images=n)
    temperature = math.exp(_least(lambda log: cross_entropy(logits / math.exp(log), labels), *RANGE))
    before, after = softmax(logits), softmax(logits / temperature)
    threshold = float(np.quantile(after.max(axis=1), 1 - KNOWN_SHARE))
    error, error_before = (calibration_error(p.max(axis=1), p.argmax(axis=1) == labels) for p in (after, before))
    return Calibration(round(temperature, 4), round(threshold, 4), round(error, 4), round(error_before, 4), n)


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Expected calibration error: |accuracy - mean confidence| of images of like confidence, by their number."""
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    members = (bins == b for b in set(bins.tolist()))
    return float(sum(abs(right[m].mean() - confidence[m].mean()) * m.mean() for m in members))


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean over the images, in nats."""
    return float(-np.log(np.maximum(softmax(logits)[np.arange(len(labels)), labels], 1e-30)).mean())


def softmax(logits: np.ndarray) -> np.ndarray:
    exponents = np.exp(np.asarray(logits, np.float64) - logits.max(axis=1, keepdims=True))
    return exponents / exponents.sum(axis=1, keepdims=True)


def _least(function: Callable[[float], float], low: float, high: float, steps: int = 40) -> float:
    """Where a function with one valley is least, by golden-section search."""
    for _ in range(steps):
        left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
        low, high = (low, right) if function(left) < function(right) else (left, high)
    return (low + high) / 2
