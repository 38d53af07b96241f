"""The rivals that are learned in torch: that they start from the same backbone, and learn from the same images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from tiny import LAYERS, saved_tiny_bundle, tiny_bundle

from ksm_edge.bundle.layers import Bundle
from ksm_edge.data.digits import digits
from ksm_edge.training.settings import Settings

pytestmark = pytest.mark.torch


def with_geometry(bundle: Bundle, layer: str, **changed: list[int]) -> Bundle:
    """Its graph with other attributes of one conv."""
    model = onnx.load(bundle.graph_path, load_external_data=False)
    conv = next(node for node in model.graph.node if node.name == layer)
    kept = [attribute for attribute in conv.attribute if attribute.name not in changed]
    del conv.attribute[:]
    conv.attribute.extend([*kept, *(onnx.helper.make_attribute(*entry) for entry in changed.items())])
    bundle.graph_path.write_bytes(model.SerializeToString())
    return bundle


@pytest.mark.parametrize("changed", [{}, {"pads": [0, 1, 2, 1]}, {"pads": [1, 3, 3, 1], "dilations": [2, 2]}])
def test_the_rivals_network_starts_as_the_backbone(load: Any, tmp_path: Path, changed: dict[str, list[int]]) -> None:
    torch = pytest.importorskip("torch")
    from ksm_edge.fuse import fuse
    from ksm_edge.runtimes import load_runtime

    rivals, bundle = load("rivals"), with_geometry(tiny_bundle(tmp_path), "plain", **changed)
    network = rivals.Network(bundle, 3).eval()
    torch.nn.init.normal_(network.head.weight, generator=torch.manual_seed(0))  # at 0 all networks would be alike
    images = np.random.default_rng(0).standard_normal((2, 3, 16, 16)).astype(np.float32)
    features = load_runtime().Session(bundle.graph_path, fuse(bundle, None)).run(images)
    expected = features @ network.head.weight.detach().numpy().T
    with torch.inference_mode():
        np.testing.assert_allclose(network(torch.from_numpy(images)).numpy(), expected, rtol=1e-4, atol=1e-5)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    statistics = sum(2 * layer.weight_shape[0] for layer in LAYERS if layer.has_norm)
    assert 0 < rivals.stored_bytes(network) - 2 * (parameters + statistics) < 4000  # the names


def test_lora_leaves_the_backbone_alone(load: Any, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    rivals = load("rivals")
    from ksm_edge.exporter.torchvision_shim import import_torchvision

    import_torchvision()
    pytest.importorskip("peft")
    network = rivals.with_lora(rivals.Network(tiny_bundle(tmp_path), 3), 2)
    learned = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert learned
    assert all("lora_" in name or "head" in name for name in learned)
    assert not any("dw" in name for name in learned)


def test_ksm_in_torch_is_ksm(load: Any, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from ksm_edge.mask import keep_gradient, soft_mask

    rivals, bundle = load("rivals"), tiny_bundle(tmp_path)
    score = np.random.default_rng(0).normal(6e-3, 3e-3, (8, 5)).astype(np.float32)
    leaf = torch.from_numpy(score.copy()).requires_grad_()
    mask = rivals.Mask.apply(leaf)
    mask.sum().backward()
    np.testing.assert_allclose(mask.detach().numpy(), soft_mask(score).values, atol=1e-6)
    np.testing.assert_allclose(leaf.grad.numpy(), keep_gradient(score), rtol=1e-5)
    plain = rivals.Network(bundle, 3).eval()
    torch.nn.init.normal_(plain.head.weight, generator=torch.manual_seed(1))
    masked = rivals.with_masks(rivals.Network(bundle, 3)).eval()
    images = torch.randn(2, 3, 16, 16, generator=torch.manual_seed(0))
    masked.head.load_state_dict(plain.head.state_dict())
    with torch.inference_mode():
        torch.testing.assert_close(masked(images), plain(images))
    learned = {name.rpartition(".")[2] for name, p in masked.named_parameters() if p.requires_grad}
    assert learned == {"score", "weight", "bias"}
    assert not any(p.requires_grad for name, p in masked.named_parameters() if ".conv." in name)


@pytest.mark.parametrize(
    ("is_as_good", "judged"), [([True] * 4, [1, 2, 3]), ([True, False, False, False], [1, 2, 3, 4])]
)
def test_rivals_have_held_out_images_join_as_adapt_does(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_as_good: list[bool], judged: list[int]
) -> None:
    """Behind the third of four epochs, where that is the one to end with."""
    pytest.importorskip("torch")
    rivals, answers, shown = load("rivals"), iter(is_as_good), []
    batches = rivals.training_batches

    def noted(cache: Any, items: Any, contract: Any, **options: Any) -> Any:
        for batch in batches(cache, items, contract, **options):
            shown.append((options["epoch"], len(items), len(batch.labels)))
            yield batch

    monkeypatch.setattr(rivals, "training_batches", noted)
    monkeypatch.setattr(rivals, "as_good", lambda *given: next(answers))
    bundle, images = saved_tiny_bundle(tmp_path / "b"), digits()
    few = replace(images, train=images.train[::20])
    network, settings = rivals.Network(bundle, len(images.classes)), Settings(epochs=4)
    found = rivals.learn(network, bundle, few, settings, 1e-3, statistics="frozen")
    assert [record["epoch"] for record in found["history"] if "validation_accuracy" in record] == judged
    joins = len(judged) < 4
    assert (found["judged_epoch"], found["best_epoch"]) == ((3, 4) if joins else (1, 1))
    learned = sum(count for seen, _, count in shown if seen == 0)
    for epoch in range(4):
        pools = {pool for seen, pool, _ in shown if seen == epoch}
        assert pools == {len(few.train) if joins and epoch == 3 else learned}
        assert sum(count for seen, _, count in shown if seen == epoch) == learned
