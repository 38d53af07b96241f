"""A whole network's gradients by the engine, in float32, and by torch.autograd, in float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from random_recipe import random_state

from ksm_edge.bundle.layers import Bundle
from ksm_edge.bundle.make import freeze_recipe
from ksm_edge.bundle.recipe import at_size, load_recipe
from ksm_edge.mask import keep_gradient
from ksm_edge.runtimes.compile import compile_graph
from ksm_edge.runtimes.engine import Engine
from ksm_edge.training.settings import Settings
from ksm_edge.training.suited import FEATURE_SUM
from ksm_edge.training.trainer import ONE_THREAD, Trainer, gradient_spec

CLASSES = 5

Gradients = dict[str, np.ndarray]


def random_bundle(name: str, size: int, folder: Path, seed: int = 0) -> Bundle:
    """A recipe's backbone with random weights and random batch-norm, as good as trained ones for gradients."""
    recipe = load_recipe(name)
    frozen = freeze_recipe(recipe, random_state(name, seed))
    (folder / "backbone.onnx").write_bytes(frozen.model.SerializeToString())
    contract = at_size(recipe.input, size)
    return Bundle(
        folder, name, "", f"{seed:064x}", frozen.layers, frozen.weights, frozen.features, contract, FEATURE_SUM
    )


class Case:
    """One optimizer step's worth of random images, targets and scores for a bundle, and its trainer."""

    def __init__(
        self,
        bundle: Bundle,
        settings: Settings,
        folder: Path,
        *,
        micro_batch: int = 1,
        seed: int = 1,
        engine: Engine = ONE_THREAD,
    ) -> None:
        self.bundle, self.settings, self.micro_batch = bundle, settings, micro_batch
        spec = gradient_spec(bundle, CLASSES, settings, micro_batch)
        if not engine.plans_memory:  # autograd has forms of its own
            spec = replace(spec, fast=False, own=False)
        graph = compile_graph(bundle, spec, folder)
        self.trainer = Trainer(bundle, graph, settings, steps=10, engine=engine)
        rng = np.random.default_rng(seed)
        for layer in self.trainer.layers.values():
            # About a sixth is cut, and where scores are below 0 the soft mask is exactly 0; some may be amplified.
            layer.score[...] = rng.normal(8e-3, 3e-3, layer.score.shape)
            layer.score.flat[: layer.score.size // 3 : 7] = -1e-3
            layer.score.flat[1 : layer.score.size // 3 : 7] = 1.8e-2
            layer.fuse()
        head = self.trainer.head_weight  # at 0 nothing would flow back
        head[:] = np.random.default_rng([seed, 1]).uniform(-1, 1, head.shape) / np.sqrt(bundle.features)
        self.trainer.run_head[:] = head
        n, side = settings.batch, bundle.input.size
        self.images = rng.standard_normal((n, 3, side, side)).astype(np.float32)
        self.targets = (rng.dirichlet(np.ones(CLASSES), n) / n).astype(np.float32)

    def by_engine(self) -> tuple[float, Gradients]:
        """The loss and d loss / d parameter, `LAYER.score` and so on, from the micro-batches of one step."""
        trainer = self.trainer
        loss = trainer.accumulate(self.images, self.targets).loss
        found = {f"head.{name}": gradient.copy() for name, gradient in trainer._head_gradients.items()}
        for name, layer in trainer.layers.items():
            gradients = {which: gradient for which, gradient in layer.gradients().items() if which in layer.learning}
            if "score" in gradients:
                gradients["score"] = gradients["score"] * keep_gradient(layer.score)
            found |= {f"{name}.{which}": np.array(gradient) for which, gradient in gradients.items()}
        return loss, found

    def by_autograd(self) -> tuple[float, Gradients]:
        import torch
        from torch_oracle import KsmTask

        torch.set_num_threads(1)
        settings, layers = self.settings, self.trainer.layers
        task = KsmTask(
            self.bundle,
            {name: layer.score for name, layer in layers.items()} if settings.method == "ksm" else {},
            settings.granularity,
            soft=settings.soft,
            amplify=bool(self.trainer.settings.amplify),
            batch_statistics=settings.statistics == "batch",
            dtype=torch.float64,
        )
        backbone = onnx.load(self.bundle.graph_path, load_external_data=False)
        head = (self.trainer.head_weight, self.trainer.head_bias)
        loss = task.loss(backbone, head, self.images, self.targets)
        loss.backward()
        found = {"head.weight": task.head[0].grad, "head.bias": task.head[1].grad}
        for which in ("score", "gamma", "beta"):
            for name, leaf in getattr(task, which).items():
                if name in layers and which in layers[name].learning:
                    found[f"{name}.{which}"] = leaf.grad
        return loss.item(), {name: gradient.numpy() for name, gradient in found.items()}


def relative_errors(found: Gradients, expected: Gradients, floor: float = 1e-4) -> dict[str, float]:
    """Per tensor, the largest difference over the tensor's largest entry.

    A tensor whose true gradient all but vanishes (below `floor` of the largest of its kind in the network) has no
    digits of its own in float32: its difference is taken over that share of the largest instead.
    """
    assert found.keys() == expected.keys()
    largest: dict[str, float] = {}
    for name, gradient in expected.items():
        kind = name.rpartition(".")[2] if not name.startswith("head.") else name
        largest[kind] = max(largest.get(kind, 0.0), float(np.abs(gradient).max()))
    errors = {}
    for name, gradient in expected.items():
        kind = name.rpartition(".")[2] if not name.startswith("head.") else name
        scale = max(float(np.abs(gradient).max()), floor * largest[kind])
        errors[name] = float(np.abs(found[name] - gradient).max()) / scale
    return errors


def small_settings(**changes: object) -> Settings:
    return replace(Settings(batch=2), **changes)  # type: ignore[arg-type]
