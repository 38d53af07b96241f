"""How good a pack is, found out in the trainer's own memory: a second set of weights is what a small board lacks most.

A session as an app opens it would hold the fused weights once more and, while it packs them, once or twice again. So
the pack's weights are put into the buffers that training reads, run through the forward pass, and put back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np

from ksm_edge.data.batches import Batch
from ksm_edge.pack.record import Pack
from ksm_edge.runtimes.compile import CompiledGraph
from ksm_edge.runtimes.gradient import GradientSession
from ksm_edge.training.trainer import Trainer


class Judge:
    """Runs packs on the trainer's buffers; between its calls training can go on."""

    def __init__(self, trainer: Trainer, graph: CompiledGraph, threads: int) -> None:
        """`graph`: compiled from `forward_spec`."""
        self._trainer = trainer
        self._session = GradientSession(graph, trainer.bound(graph), threads)

    def accuracy(self, pack: Pack, batches: Iterable[Batch]) -> float:
        """The fraction of the batches' images that the pack's first answer gets right; batches may be of any size."""
        with self._showing(pack):
            right = [self._logits(pack, batch.images).argmax(axis=1) == batch.labels for batch in batches]
        return float(np.concatenate(right).mean())

    def logits(self, pack: Pack, images: np.ndarray) -> np.ndarray:
        """What the pack says of images (n, 3, S, S): (n, C)."""
        with self._showing(pack):
            return self._logits(pack, images)

    @contextmanager
    def _showing(self, pack: Pack) -> Iterator[None]:
        layers = self._trainer.layers
        try:
            for name, layer in layers.items():
                layer.show(pack.layers[name])
            yield
        finally:
            for layer in layers.values():
                layer.fuse()

    def _logits(self, pack: Pack, images: np.ndarray) -> np.ndarray:
        session, size, features = self._session, len(self._session.image), []
        for start in range(0, len(images), size):
            part = images[start : start + size]
            session.image[: len(part)] = part
            session.run()
            features.append(session.output("features")[: len(part)].copy())
        return np.concatenate(features) @ pack.head_weight.T + pack.head_bias
