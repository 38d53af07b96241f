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
from ksm_edge.training.trainer import Images, Trainer, in_parts


class Judge:
    """Runs packs on the trainer's buffers; between its calls training can go on."""

    def __init__(self, trainer: Trainer, graph: CompiledGraph, threads: int) -> None:
        """`graph`: compiled from `forward_spec`."""
        self._trainer, self._graph, self._threads = trainer, graph, threads

    def accuracy(self, pack: Pack, batches: Iterable[Batch]) -> float:
        """The fraction of the batches' images that the pack's first answer gets right; batches may be of any size."""
        with self._showing(pack) as session:
            right = [_logits(session, pack, batch.images).argmax(axis=1) == batch.labels for batch in batches]
        return float(np.concatenate(right).mean())

    def logits(self, pack: Pack, images: Images) -> np.ndarray:
        """What the pack says of images (n, 3, S, S), which may come in parts: (n, C)."""
        with self._showing(pack) as session:
            return np.concatenate([_logits(session, pack, part) for part in in_parts(images)])

    @contextmanager
    def _showing(self, pack: Pack) -> Iterator[GradientSession]:
        """A session of its own each time, a matter of milliseconds: kept, its memory would be held while learning."""
        layers = self._trainer.layers
        try:
            for name, layer in layers.items():
                layer.show(pack.layers[name])
            yield GradientSession(self._graph, self._trainer.bound(self._graph), self._threads)
        finally:
            for layer in layers.values():
                layer.fuse()


def _logits(session: GradientSession, pack: Pack, images: np.ndarray) -> np.ndarray:
    size, features = len(session.image), []
    for start in range(0, len(images), size):
        part = images[start : start + size]
        session.image[: len(part)] = part
        session.run()
        features.append(session.output("features")[: len(part)].copy())
    return np.concatenate(features) @ pack.head_weight.T + pack.head_bias
