from __future__ import annotations

import numpy as np
import pytest
from learner import CLASSES, SETTINGS, STEPS, batch, judge, train, trainer, with_changes

from ksm_edge.bundle.layers import Bundle
from ksm_edge.fuse import fuse, fused_digest
from ksm_edge.runtimes.onnxruntime import Session
from ksm_edge.training.packing import finished, to_pack, unquantized
from ksm_edge.training.targets import target_rows
from ksm_edge.training.thinning import late_step


def test_an_adapted_network_is_what_its_pack_makes_of_the_backbone(bundle: Bundle) -> None:
    """The trainer's own session, the pack read back, and fuse: one and the same network."""
    subject = trainer(bundle)
    train(subject, 0, STEPS)
    masks = [layer.mask().keep for layer in subject.layers.values()]
    assert not all(keep.all() for keep in masks)
    pack = to_pack(subject, "colours", ("r", "g", "b"))
    pack = finished(pack, bundle, judge(subject), {})
    assert pack.fused_digest == fused_digest(fuse(bundle, pack))
    images, labels = batch(99, 64)
    logits = Session(bundle.graph_path, fuse(bundle, pack)).run(images) @ pack.head_weight.T + pack.head_bias
    # The next step's loss is that of the network as trained so far; the pack's few bits cost little of it.
    loss = np.mean([subject.step(images[i : i + 8], target_rows(labels[i : i + 8], CLASSES, 0.0)).loss for i in (0,)])
    probability = np.exp(logits - logits.max(1, keepdims=True))
    probability /= probability.sum(1, keepdims=True)
    assert -np.log(probability[np.arange(8), labels[:8]]).mean() == pytest.approx(loss, abs=0.1)


@pytest.mark.parametrize("statistics", ["frozen", "batch"])
def test_a_pack_answers_as_the_numbers_it_was_rounded_from(bundle: Bundle, statistics: str) -> None:
    settings, micro_batch = with_changes({"statistics": statistics, "norm_bits": 5})
    subject = trainer(bundle, settings, micro_batch)
    train(subject, 0, STEPS)
    classes, (images, _) = ("a", "b", "c"), batch(0)
    exact, rounded = (judge(subject).logits(made(subject, "t", classes), images) for made in (unquantized, to_pack))
    assert 0 < np.abs(rounded - exact).max() < 0.15 * np.ptp(exact)


def test_learning_in_bits_runs_what_the_pack_will_hold(bundle: Bundle) -> None:
    changes = {"learn_in_bits": True, "scale_bits": 1, "norm_bits": 3, "head_bits": 4}
    subject, at = trainer(bundle, *with_changes(changes)), late_step(STEPS, SETTINGS.thin_at)

    def differing() -> set[str]:
        """What the gradient graph reads and a pack made now would not give."""
        pack, found = to_pack(subject, "t", ("a", "b", "c")), set()
        for name, layer in subject.layers.items():
            before = layer.weight.copy(), layer.bias.copy()
            layer.show(pack.layers[name])
            found |= {
                kind
                for kind, old, new in zip(("weight", "bias"), before, (layer.weight, layer.bias), strict=True)
                if not np.array_equal(old, new)
            }
            layer.fuse()
        return found | (set() if np.array_equal(subject.run_head, pack.head_weight) else {"head"})

    train(subject, 0, at - 1)
    assert differing() == {"weight", "bias", "head"}
    train(subject, at - 1, at)
    assert not differing()
    train(subject, at, at + 2)
    assert not differing()


def test_with_batch_statistics_a_layer_without_batch_norm_runs_as_its_pack_too(bundle: Bundle) -> None:
    settings, micro_batch = with_changes({"learn_in_bits": True, "statistics": "batch", "norm_bits": 3})
    subject = trainer(bundle, settings, micro_batch)
    train(subject, 0, late_step(STEPS, SETTINGS.thin_at) + 1)
    layer, state = subject.layers["plain"], to_pack(subject, "t", ("a", "b", "c")).layers["plain"]
    before = layer.weight.copy(), layer.bias.copy()
    layer.show(state)
    np.testing.assert_array_equal(before[0], layer.weight)
    np.testing.assert_array_equal(before[1], layer.bias)
