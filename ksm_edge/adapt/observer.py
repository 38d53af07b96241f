"""What an adaptation tells whoever watches it; this one stays silent."""

from __future__ import annotations

from typing import Any

from ksm_edge.training.checkpoint import Progress
from ksm_edge.training.planner import Plan


class Observer:
    """Override what you want to hear of."""

    def reading(self, done: int, total: int) -> None:
        """Images read and checked so far."""

    def plan(
        self, plan: Plan, train: int, held_out: int, skipped: list[tuple[str, str]], steps: int, done: int
    ) -> None:
        """What is about to happen: `steps` in all, of which a resumed training has `done` some."""

    def seeing(self, done: int, total: int) -> None:
        """Images put through the layers in front of those that learn so far, for a view that is kept."""

    def step(self, progress: Progress, steps: int, loss: float, accuracy: float) -> None:
        """After an optimizer step: the mean loss of the last 50 and the epoch's accuracy so far."""

    def note(self, text: str) -> None:
        """Something went wrong that training goes on without."""

    def joined(self, images: int) -> None:
        """So many held-out images are learned from as well from here on."""

    def epoch(self, record: dict[str, Any], epochs: int) -> None:
        """After an epoch, of many some of them: number, loss, train_accuracy and, if judged, validation_accuracy."""
