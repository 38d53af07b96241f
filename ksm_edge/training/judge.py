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
from ksm_edge.runtimes.engine import Engine
from ksm_edge.runtimes.workers import Session, Workers
from ksm_edge.training.trainer import ONE_THREAD, Images, Trainer, in_parts


class Judge:
    """Runs packs on the trainer's buffers; between its calls training can go on."""

    def __init__(self, trainer: Trainer, graph: CompiledGraph, engine: Engine = ONE_THREAD) -> None:
        """`graph`: compiled from `forward_spec`."""
        self._trainer, self._graph, self._engine = trainer, graph, engine

    def accuracy(self, pack: Pack, batches: Iterable[Batch]) -> float:
        """The fraction of the batches' images that the pack's first answer gets right; batches may be of any size."""
        labels: list[np.ndarray] = []

        def images() -> Iterator[np.ndarray]:
            for batch in batches:
                labels.append(batch.labels)
                yield batch.images

        answers = self.logits(pack, images()).argmax(axis=1)
        return float((answers == np.concatenate(labels)).mean())

    def logits(self, pack: Pack, images: Images) -> np.ndarray:
        """What the pack says of images (n, 3, S, S), which may come in parts: (n, C)."""
        size = self._graph.spec.micro_batch
        few = (part[start : start + size] for part in in_parts(images) for start in range(0, len(part), size))
        with self._showing(pack) as workers:
            features = np.concatenate(list(workers.map(_features, few)))
        return features @ pack.head_weight.T + pack.head_bias

    @contextmanager
    def _showing(self, pack: Pack) -> Iterator[Workers]:
        """Sessions of its own each time, a matter of milliseconds: kept, their memory would be held while learning."""
        layers = self._trainer.layers
        try:
            for name, layer in layers.items():
                layer.show(pack.layers[name])
            yield self._engine.open(self._trainer.bundle, self._graph, self._trainer.bound(self._graph))
        finally:
            for layer in layers.values():
                layer.fuse()


def _features(session: Session, images: np.ndarray) -> np.ndarray:
    session.image[: len(images)] = images
    session.run()
    return session.output("features")[: len(images)].copy()
