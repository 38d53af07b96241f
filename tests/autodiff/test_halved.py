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
from ksm_edge.autodiff.halved import HALF, LEAST_BYTES, WIDENED, is_halved, taken_bytes
from ksm_edge.autodiff.liveness import peak_bytes, tensor_shapes
from ksm_edge.bundle.layers import Bundle
from ksm_edge.bundle.load import load_bundle
from ksm_edge.errors import KsmEdgeError
from ksm_edge.runtimes.compile import compile_graph
from ksm_edge.training.settings import Settings
from ksm_edge.training.trainer import Trainer, forward_spec, gradient_spec


def graph(bundle: Bundle, images: int = 1, **forms: bool) -> onnx.ModelProto:
    spec = replace(gradient_spec(bundle, 5, Settings(), images), **forms)
    return build(onnx.load(bundle.graph_path, load_external_data=False), bundle.layers, spec).model


def test_every_large_image_is_rounded_behind_its_last_reader_and_no_other_reader_sees_it_again() -> None:
    model = graph(load_bundle("embedded"), half=True)
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
    embedded, found, settings = load_bundle("embedded"), [], Settings(head_start="random")
    size, rng = embedded.input.size, np.random.default_rng(0)
    images, targets = rng.standard_normal((2, 3, size, size), np.float32), np.eye(5, dtype=np.float32)[[1, 4]] / 2
    for half in (False, True):
        (folder := tmp_path / str(half)).mkdir()
        spec = replace(gradient_spec(embedded, 5, settings, 1), half=half)
        trainer = Trainer(embedded, compile_graph(embedded, spec, folder), settings, steps=10)
        found.append(trainer.accumulate(images, targets).loss)
    assert found[0] == found[1]
    assert found[0] != pytest.approx(np.log(5), abs=1e-3)  # a head that says something


RECOMPUTE = {"recompute": True, "fast": False}


@pytest.mark.parametrize(
    ("recipe", "size", "forms", "limit"),
    [
        ("mobilenet_v2", 96, {}, 5e-4),
        ("mobilenet_v3_large", 96, {}, 5e-4),
        ("squeezenet1_1", 64, {}, 5e-4),  # pools between layers that learn, of which one side is rounded alone
        ("resnet50", 96, RECOMPUTE, 3e-2),  # what is computed again from rounded numbers errs by more
    ],
    ids=str,
)
def test_gradients_err_by_little(recipe: str, size: int, forms: dict[str, bool], limit: float, tmp_path: Path) -> None:
    """Where no clip meets a number that was just below its end and no pool two that have become equal: there another
    pixel gets the gradient, and all in front of it is changed. So one draw of images in three has to do.
    """
    (tmp_path / "bundle").mkdir()
    bundle = random_bundle(recipe, size, tmp_path / "bundle")
    draws = zip(*(steps(bundle, tmp_path / str(half), half=half, **forms) for half in (False, True)), strict=True)
    found = [_errors(*next(draws)) for _ in range(3)]
    assert all(max(of_draw) > 0 for of_draw in found)  # it is rounded
    assert min(np.median(of_draw) for of_draw in found) < limit
    assert min(max(of_draw) for of_draw in found) < 5e-2


def test_numbers_beyond_half_precision_stop_a_step_before_it_changes_anything(tmp_path: Path) -> None:
    bundle, settings = random_bundle("squeezenet1_1", 64, tmp_path), Settings(head_start="random")
    (folder := tmp_path / "graph").mkdir()
    spec = replace(gradient_spec(bundle, 5, settings, 1), half=True)
    trainer = Trainer(bundle, compile_graph(bundle, spec, folder), settings, steps=10)
    before = {name: array.copy() for name, array in trainer.state().items()}
    loud = 1e6 * np.random.default_rng(0).standard_normal((1, 3, 64, 64), np.float32)
    with pytest.raises(KsmEdgeError, match=r"not finite at step 1: .* Try without --activation-bits"):
        trainer.step(loud, np.eye(5, dtype=np.float32)[:1])
    for name, array in trainer.state().items():
        np.testing.assert_array_equal(array, before[name], err_msg=name)


def test_where_nothing_is_gained_nothing_is_rounded(tmp_path: Path) -> None:
    bundle = random_bundle("resnet18", 96, tmp_path)
    backbone = onnx.load(bundle.graph_path, load_external_data=False)
    spec = gradient_spec(bundle, 5, Settings(), 1)
    for recompute in (False, True):
        whole, half = (
            build(backbone, bundle.layers, replace(spec, recompute=recompute, half=half)).model
            for half in (False, True)
        )
        assert not is_halved(whole)
        assert taken_bytes(half) <= taken_bytes(whole)
    assert is_halved(graph(load_bundle("embedded"), half=True))


def _errors(whole: Gradients, half: Gradients) -> list[float]:
    """Of each layer's gradients, in the sense of lengths of vectors."""
    return [float(np.linalg.norm(half[name] - of) / np.linalg.norm(of)) for name, of in whole.items()]


def test_judging_reads_what_it_did() -> None:
    embedded = load_bundle("embedded")
    spec = gradient_spec(embedded, 5, Settings(activation_bits=16), 1)
    assert spec.half
    assert forward_spec(spec, {}) == forward_spec(gradient_spec(embedded, 5, Settings(), 1), {})
