"""What is torch's own: half as many bits, and names. Gradients: tests/autodiff/test_gradient_graph.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image
from tiny import saved_tiny_bundle, tiny_bundle

from ksm_edge.adapt.journey import adapt
from ksm_edge.app.verification import verify_pack
from ksm_edge.bundle.layers import Bundle
from ksm_edge.data.image_set import open_image_set
from ksm_edge.runtimes.compile import compile_graph
from ksm_edge.runtimes.torch_gradient import TorchGradientSession
from ksm_edge.training.settings import Settings
from ksm_edge.training.trainer import Trainer, gradient_spec

N, CLASSES = 4, 5


def accumulated(bundle: Bundle, folder: Path, *, half: bool = False) -> dict[str, np.ndarray]:
    """What one micro-batch adds to accumulators at 0."""
    settings = Settings(batch=N)
    graph = compile_graph(bundle, gradient_spec(bundle, CLASSES, settings, N), folder)
    trainer = Trainer(bundle, graph, settings, steps=10)
    trainer.run_head[:] = np.random.default_rng(0).standard_normal(trainer.run_head.shape)
    session = TorchGradientSession(bundle, graph, trainer.bound(graph), half=half)
    session.image[:] = np.random.default_rng(1).standard_normal(session.image.shape)
    session.target[:] = np.eye(CLASSES)[:N] / N
    session.run()
    return session.accumulators


@pytest.mark.torch
def test_bfloat16_gives_nearly_the_same_gradients(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    bundle = tiny_bundle(tmp_path)
    whole, few = (accumulated(bundle, tmp_path, half=half) for half in (False, True))
    assert any(not np.array_equal(few[name], whole[name]) for name in whole)
    for name in whole:
        assert few[name].dtype == np.float32
        cosine = (few[name] * whole[name]).sum() / np.sqrt(np.square(few[name]).sum() * np.square(whole[name]).sum())
        assert cosine > 0.995, name
    head = torch.from_numpy(few["head:dweight"])
    assert not torch.equal(head.bfloat16().float(), head)  # the head and the loss are float32's, backwards too


@pytest.mark.torch
def test_a_layer_may_be_called_head(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    bundle = tiny_bundle(tmp_path)
    expected = {name: array.copy() for name, array in accumulated(bundle, tmp_path).items()}
    model = onnx.load(bundle.graph_path, load_external_data=False)
    for node in model.graph.node:
        node.name = _renamed(node.name)
        node.input[:], node.output[:] = map(_renamed, node.input), map(_renamed, node.output)
    for tensor in model.graph.initializer:
        tensor.name = _renamed(tensor.name)
    bundle.graph_path.write_bytes(model.SerializeToString())
    layers = tuple(replace(layer, name=_renamed(layer.name)) for layer in bundle.layers)
    weights = {_renamed(name): of_layer for name, of_layer in bundle.weights.items()}
    found = accumulated(replace(bundle, layers=layers, weights=weights), tmp_path)
    assert found.keys() == set(map(_renamed, expected))
    for name, array in expected.items():
        np.testing.assert_array_equal(found[_renamed(name)], array)


def _renamed(name: str) -> str:
    return name.replace("plain", "head")


@pytest.mark.torch
def test_packs_learned_in_bfloat16_compute_what_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr("ksm_edge.runtimes.torch_gradient.has_half", lambda device: True)
    bundle = saved_tiny_bundle(tmp_path / "bundle")
    rng = np.random.default_rng(0)
    for label in "ab":
        (tmp_path / "photos" / label).mkdir(parents=True)
        for number in range(8):
            pixels = rng.integers(0, 255, (20, 20, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / label / f"{number}.png")
    out = tmp_path / "a.ksm"
    adapt(bundle, open_image_set(tmp_path / "photos"), out, Settings(epochs=2, batch=4), runtime="pytorch")
    assert not verify_pack(out, bundle=bundle).faults
