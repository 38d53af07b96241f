"""Keeping the forward pass in half precision: less memory, the same answers, and gradients that err by little."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from test_fast_forms import Gradients, steps
from whole_network import random_bundle

from ksm_edge.autodiff.gradient_graph import build
from ksm_edge.autodiff.halved import HALF, LEAST_BYTES, WIDENED
from ksm_edge.autodiff.liveness import peak_bytes, tensor_shapes
from ksm_edge.bundle.layers import Bundle
from ksm_edge.bundle.load import load_bundle
from ksm_edge.runtimes.compile import compile_graph
from ksm_edge.training.settings import Settings
from ksm_edge.training.trainer import Trainer, forward_spec, gradient_spec


def graph(bundle: Bundle, images: int = 1, **forms: bool) -> onnx.ModelProto:
    spec = replace(gradient_spec(bundle, 5, Settings(), images), **forms)
    return build(onnx.load(bundle.graph_path, load_external_data=False), bundle.layers, spec).model


@pytest.mark.parametrize("recompute", [False, True])
def test_every_large_image_is_rounded_behind_its_last_reader_and_no_other_reader_sees_it_again(recompute: bool) -> None:
    model = graph(load_bundle("embedded"), half=True, recompute=recompute)
    nodes, shapes = list(model.graph.node), tensor_shapes(model)
    made = {name: i for i, node in enumerate(nodes) for name in node.output}
    readers = {name: [i for i, node in enumerate(nodes) if name in node.input] for name in made}
    halves = [name.removesuffix(HALF) for name in made if name.endswith(HALF)]
    assert len(halves) > 10
    for name in halves:
        assert shapes[name + HALF] == (shapes[name][0], 2)
        assert readers[name][-1] == made[name + HALF]  # nobody reads the whole one behind it
        (widened,) = readers[name + HALF]
        assert widened == made[name + WIDENED]
        assert readers[name + WIDENED][0] == widened + 1 or nodes[widened + 1].op_type == "Cast"
    loss = made["loss"]
    kept = {name for name in made if made[name] < loss < max(readers[name], default=0) and name in shapes}
    large = {name for name in kept if len(shapes[name][0]) == 4 and np.prod(shapes[name][0]) * 4 >= LEAST_BYTES}
    assert large == {name + HALF for name in halves}


@pytest.mark.parametrize(
    ("recipe", "statistics"),
    [("mobilenet_v2", "frozen"), ("efficientnet_b0", "frozen"), ("squeezenet1_1", "frozen"), ("mobilenet_v2", "batch")],
)
def test_less_is_kept_of_real_networks(recipe: str, statistics: str, tmp_path: Path) -> None:
    bundle, settings = random_bundle(recipe, 96, tmp_path), Settings(statistics=statistics)
    backbone = onnx.load(bundle.graph_path, load_external_data=False)
    specs = (replace(gradient_spec(bundle, 5, settings, 4), half=half) for half in (False, True))
    whole, half = (peak_bytes(build(backbone, bundle.layers, spec).model) for spec in specs)
    assert half < 0.95 * whole


def test_answers_are_the_same_to_the_bit(tmp_path: Path) -> None:
    embedded, found = load_bundle("embedded"), []
    size, rng = embedded.input.size, np.random.default_rng(0)
    images, targets = rng.standard_normal((2, 3, size, size), np.float32), np.eye(5, dtype=np.float32)[[1, 4]] / 2
    for half in (False, True):
        (folder := tmp_path / str(half)).mkdir()
        spec = replace(gradient_spec(embedded, 5, Settings(), 1), half=half)
        trainer = Trainer(embedded, compile_graph(embedded, spec, folder), Settings(), steps=10)
        found.append(trainer.accumulate(images, targets))
    assert found[0] == found[1]


@pytest.mark.parametrize("recipe", ["mobilenet_v2", "mobilenet_v3_large", "resnet18"])
def test_gradients_err_by_a_thousandth(recipe: str, tmp_path: Path) -> None:
    """Where no clip meets a number that was just below its end and no pool one of two that have become equal: there
    another pixel gets the gradient. So one draw of images in three has to do.
    """
    (tmp_path / "bundle").mkdir()
    bundle = random_bundle(recipe, 96, tmp_path / "bundle")
    draws = zip(*(steps(bundle, tmp_path / str(half), half=half) for half in (False, True)), strict=True)
    found = [_errors(*next(draws)) for _ in range(3)]
    assert all(np.median(of_draw) > 0 for of_draw in found)  # it is rounded
    assert min(np.median(of_draw) for of_draw in found) < 5e-4
    assert min(max(of_draw) for of_draw in found) < 2e-2


def _errors(whole: Gradients, half: Gradients) -> list[float]:
    """Of each layer's gradients, in the sense of lengths of vectors."""
    return [float(np.linalg.norm(half[name] - of) / np.linalg.norm(of)) for name, of in whole.items()]


def test_judging_reads_what_it_did(tmp_path: Path) -> None:
    embedded = load_bundle("embedded")
    spec = gradient_spec(embedded, 5, Settings(activation_bits=16), 1)
    assert spec.half
    assert forward_spec(spec, {}) == forward_spec(gradient_spec(embedded, 5, Settings(), 1), {})
