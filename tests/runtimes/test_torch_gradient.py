"""What is torch's own: half as many bits. That gradients are right, tests/autodiff/test_gradient_graph.py says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_bundle

from ksm_edge.runtimes.compile import compile_graph
from ksm_edge.runtimes.torch_gradient import TorchGradientSession
from ksm_edge.training.settings import Settings
from ksm_edge.training.trainer import Trainer, gradient_spec

N, CLASSES = 4, 5


@pytest.mark.torch
def test_bfloat16_gives_nearly_the_same_gradients(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    bundle, settings = tiny_bundle(tmp_path), Settings(batch=N)
    graph = compile_graph(bundle, gradient_spec(bundle, CLASSES, settings, N), tmp_path)
    trainer, rng = Trainer(bundle, graph, settings, steps=10), np.random.default_rng(0)
    trainer.run_head[:] = rng.standard_normal(trainer.run_head.shape)
    found = []
    for half in (False, True):
        bound = trainer.bound(graph)
        session = TorchGradientSession(bundle, graph, bound, half=half)
        for array in session.accumulators.values():
            array.fill(0)
        session.image[:] = np.random.default_rng(1).standard_normal(session.image.shape)
        session.target[:] = np.eye(CLASSES)[:N] / N
        session.run()
        found.append({name: array.copy() for name, array in session.accumulators.items()})
    whole, few = found
    assert any(not np.array_equal(few[name], whole[name]) for name in whole)
    for name in whole:
        assert few[name].dtype == np.float32
        cosine = (few[name] * whole[name]).sum() / np.sqrt(np.square(few[name]).sum() * np.square(whole[name]).sum())
        assert cosine > 0.995, name
