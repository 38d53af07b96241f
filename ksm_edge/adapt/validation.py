"""Accuracy of a pack on held-out images, run as an app would run it."""

from __future__ import annotations

from collections.abc import Sequence

from ksm_edge.bundle.layers import Bundle
from ksm_edge.data.batches import evaluation_batches
from ksm_edge.data.cache import ImageCache
from ksm_edge.data.image_set import Item
from ksm_edge.data.prefetch import prefetch
from ksm_edge.fuse import fuse
from ksm_edge.pack.record import Pack
from ksm_edge.runtimes.onnxruntime import Session
from ksm_edge.training.planner import Plan


def accuracy_of(bundle: Bundle, pack: Pack, cache: ImageCache, items: Sequence[Item], plan: Plan) -> float:
    """The fraction of `items` that the pack's first answer gets right."""
    session = Session(bundle.graph_path, fuse(bundle, pack), plan.threads)
    correct = 0
    batches = prefetch(evaluation_batches(cache, items, bundle.input, batch=plan.micro_batch))
    for batch in batches:
        logits = session.run(batch.images) @ pack.head_weight.T + pack.head_bias
        correct += int((logits.argmax(axis=1) == batch.labels).sum())
    return correct / len(items)
