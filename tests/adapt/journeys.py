"""A small task on the tiny backbone, and who watches or interrupts it being learned."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ksm_edge.adapt.journey import Adapted, Interrupted, adapt, checkpoint_path
from ksm_edge.adapt.observer import Observer
from ksm_edge.bundle.layers import Bundle
from ksm_edge.data.image import open_rgb, to_input
from ksm_edge.data.image_set import ImageSet
from ksm_edge.fuse import fuse
from ksm_edge.pack.record import Pack
from ksm_edge.runtimes.onnxruntime import Session
from ksm_edge.training.checkpoint import Progress
from ksm_edge.training.settings import Settings

# Rates at which the tiny backbone learns, and loses kernels, within a few steps.
SETTINGS = {
    "epochs": 3,
    "batch": 8,
    "score_rate": 2e-3,
    "norm_rate": 1e-2,
    "scaled_rates": False,
    "head_rate": 5e-2,
    "validation": 0.2,
    "label_smoothing": 0.0,
}


def settings(**changes: object) -> Settings:
    return Settings(**{**SETTINGS, **changes})  # type: ignore[arg-type]


def accuracy(bundle: Bundle, pack: Pack, images: ImageSet, indices: Iterator[int] | np.ndarray) -> float:
    """As an app would: every image decoded from its file, alone, through the fused backbone."""
    session = Session(bundle.graph_path, fuse(bundle, pack))
    right = []
    for index in indices:
        item = images.train[index]
        image = to_input(open_rgb(images.read(item)), pack.input)
        logits = session.run(image[None]) @ pack.head_weight.T + pack.head_bias
        right.append(pack.classes[int(logits.argmax())] == images.classes[item.label])
    return float(np.mean(right))


class Watcher(Observer):
    def __init__(self) -> None:
        self.told: list[str] = []
        self.steps = 0
        self.records: list[dict[str, float]] = []
        self.planned = (0, 0, 0)

    def reading(self, done: int, total: int) -> None:
        self.told.append("reading")

    def plan(self, plan: object, train: int, held_out: int, skipped: object, steps: int, done: int) -> None:
        self.told.append("plan")
        self.planned = (train, held_out, steps)

    def step(self, progress: Progress, steps: int, loss: float, accuracy: float) -> None:
        self.told.append("step")
        self.steps += 1
        assert progress.steps_done <= steps
        assert 0 <= accuracy <= 1

    def epoch(self, record: dict[str, float], epochs: int) -> None:
        self.told.append("epoch")
        self.records.append(dict(record))


class Stopper(Observer):
    """Presses Ctrl-C once, after a step or an epoch."""

    def __init__(self, step: int = 0, epoch: int = 0) -> None:
        self._step, self._epoch = step, epoch

    def step(self, progress: Progress, steps: int, loss: float, accuracy: float) -> None:
        if progress.steps_done == self._step:
            raise KeyboardInterrupt

    def epoch(self, record: dict[str, float], epochs: int) -> None:
        if record["epoch"] == self._epoch:
            raise KeyboardInterrupt


def interrupted_then_resumed(bundle: Bundle, images: ImageSet, out: Path, chosen: Settings, stop: Observer) -> Adapted:
    with pytest.raises(Interrupted) as caught:
        adapt(bundle, images, out, chosen, observer=stop)
    assert caught.value.checkpoint == checkpoint_path(out)
    assert checkpoint_path(out).exists()
    assert not out.exists()
    found = adapt(bundle, images, out, chosen, resume=True)
    assert not checkpoint_path(out).exists()
    return found
