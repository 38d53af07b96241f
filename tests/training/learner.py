"""A trainer on the tiny backbone, a task of three colours to learn, and what tests ask of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ksm_edge.bundle.layers import Bundle
from ksm_edge.runtimes.compile import compile_graph
from ksm_edge.runtimes.engine import Engine
from ksm_edge.training.judge import Judge
from ksm_edge.training.settings import Settings
from ksm_edge.training.targets import target_rows
from ksm_edge.training.trainer import Trainer, forward_spec, gradient_spec

CLASSES = 3
STEPS = 30
# Rates at which a few steps on the tiny backbone show, and scores fall below the threshold.
SETTINGS = Settings(
    batch=8, score_rate=2e-3, norm_rate=1e-2, scaled_rates=False, thin=0.5, head_rate=5e-2, label_smoothing=0.0
)


def trainer(
    bundle: Bundle, settings: Settings = SETTINGS, micro_batch: int = 4, steps: int = STEPS, workers: int = 1
) -> Trainer:
    folder = bundle.path / f"{abs(hash((settings, micro_batch)))}"
    folder.mkdir(exist_ok=True)
    graph = compile_graph(bundle, gradient_spec(bundle, CLASSES, settings, micro_batch), folder)
    subject = Trainer(bundle, graph, settings, steps=steps, engine=Engine(threads=workers, workers=workers))
    # From a head at 0 nothing flows back at the first step, which would hide mistakes there.
    subject.head_weight[:] = np.random.default_rng(settings.seed).standard_normal(subject.head_weight.shape) / 4
    subject.run_head[:] = subject.head_weight
    return subject


def judge(subject: Trainer, workers: int = 1) -> Judge:
    bundle, spec = subject.bundle, gradient_spec(subject.bundle, CLASSES, subject.settings, subject.micro_batch)
    folder = bundle.path / "forward"
    folder.mkdir(exist_ok=True)
    forward = forward_spec(spec, {name: layer.form for name, layer in subject.layers.items()})
    return Judge(subject, compile_graph(bundle, forward, folder), Engine(threads=workers, workers=workers))


def batch(step: int, n: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """A task of three classes: which of the colours an image is brightest in."""
    rng = np.random.default_rng([7, step])
    labels = rng.integers(0, CLASSES, n)
    images = rng.standard_normal((n, 3, 16, 16)).astype(np.float32)
    images[np.arange(n), labels] += 1
    return images, labels


def train(subject: Trainer, start: int, end: int) -> list[float]:
    losses = []
    for step in range(start, end):
        images, labels = batch(step)
        losses.append(subject.step(images, target_rows(labels, CLASSES, 0.0)).loss)
    return losses


def same_bits(a: Trainer, b: Trainer) -> bool:
    left, right = a.state(), b.state()
    return left.keys() == right.keys() and all(np.array_equal(left[n], right[n]) for n in left)


METHODS = {
    "ksm": {},
    "norm": {"method": "norm"},
    "head": {"method": "head"},
    "batch statistics": {"statistics": "batch"},
    "element": {"granularity": "element"},
    "group": {"granularity": "group:3"},
    "channel": {"granularity": "channel"},
    "binary": {"soft": False},
    "some layers": {"layers": "dw..", "masked": "project, plain"},
    "in bits": {"learn_in_bits": True, "scale_bits": 2, "norm_bits": 5},
    "in bits with batch statistics": {"learn_in_bits": True, "statistics": "batch"},
}
each_method = pytest.mark.parametrize("changes", METHODS.values(), ids=METHODS)


def with_changes(changes: dict[str, object]) -> tuple[Settings, int]:
    settings = replace(SETTINGS, **changes)  # type: ignore[arg-type]
    return settings, 8 if settings.statistics == "batch" else 4


def cut_of(subject: Trainer) -> list[np.ndarray]:
    return [layer.mask().cut for layer in subject.layers.values()]


def count(subject: Trainer) -> int:
    return sum(map(len, cut_of(subject)))
