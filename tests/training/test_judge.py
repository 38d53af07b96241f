from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from learner import batch, each_method, judge, same_bits, train, trainer, with_changes

from ksm_edge.bundle.layers import Bundle
from ksm_edge.data.batches import Batch
from ksm_edge.fuse import fuse
from ksm_edge.runtimes.gradient import GradientSession
from ksm_edge.runtimes.onnxruntime import Session
from ksm_edge.runtimes.workers import Workers
from ksm_edge.training.packing import to_pack


@each_method
def test_judging_a_pack_is_running_it_and_leaves_the_training_as_it_was(
    bundle: Bundle, changes: dict[str, object]
) -> None:
    settings, micro_batch = with_changes(changes)
    judged, other = trainer(bundle, settings, micro_batch), trainer(bundle, settings, micro_batch)
    for subject in (judged, other):
        train(subject, 0, 5)
    pack = to_pack(judged, "colours", ("r", "g", "b"))
    images, labels = batch(50, 13)  # no multiple of the micro-batch
    answer = judge(judged)
    logits = Session(bundle.graph_path, fuse(bundle, pack)).run(images) @ pack.head_weight.T + pack.head_bias
    np.testing.assert_allclose(answer.logits(pack, images), logits, rtol=1e-4, atol=1e-5)
    parts = [Batch(images[p], labels[p], labels[p]) for p in (slice(0, 6), slice(6, 13))]
    assert answer.accuracy(pack, parts) == (logits.argmax(1) == labels).mean()
    assert train(judged, 5, 8) == train(other, 5, 8)
    assert same_bits(judged, other)


def test_workers_judge_as_one_does(bundle: Bundle) -> None:
    subject = trainer(bundle)
    train(subject, 0, 5)
    pack, (images, labels) = to_pack(subject, "colours", ("r", "g", "b")), batch(50, 13)
    parts = [Batch(images[p], labels[p], labels[p]) for p in (slice(0, 6), slice(6, 13))]
    alone, together = judge(subject), judge(subject, workers=3)
    np.testing.assert_array_equal(together.logits(pack, images), alone.logits(pack, images))
    assert together.accuracy(pack, parts) == alone.accuracy(pack, parts)


def test_only_while_it_judges_a_judge_has_a_session(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    subject, alive = trainer(bundle), weakref.WeakSet[GradientSession]()

    class Watched(Workers):
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            alive.add(self.first)

    monkeypatch.setattr("ksm_edge.runtimes.engine.Workers", Watched)
    watching, pack = judge(subject), to_pack(subject, "colours", ("r", "g", "b"))
    images, labels = batch(1, 4)

    def batches() -> Iterator[Batch]:
        assert len(alive) == 1
        yield Batch(images, labels, labels)

    assert not alive
    watching.accuracy(pack, batches())
    gc.collect()
    assert not alive


def test_judging_that_is_interrupted_leaves_the_training_as_it_was(bundle: Bundle) -> None:
    judged, other = trainer(bundle), trainer(bundle)

    def interrupted():
        raise KeyboardInterrupt
        yield

    pack = to_pack(judged, "colours", ("r", "g", "b"))
    train(judged, 0, 3)
    train(other, 0, 3)
    with pytest.raises(KeyboardInterrupt):
        judge(judged).accuracy(pack, interrupted())
    assert train(judged, 3, 5) == train(other, 3, 5)
