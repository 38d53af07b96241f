"""Forms that take memory for speed, or speed for memory: the same gradients by each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from whole_network import random_bundle

from ksm_edge.autodiff.gradient_graph import build
from ksm_edge.autodiff.liveness import tensor_bytes
from ksm_edge.autodiff.spec import FLOATS, HALVES, GradientSpec
from ksm_edge.bundle.layers import Bundle
from ksm_edge.errors import BudgetError
from ksm_edge.runtimes.compile import CompiledGraph, compile_graph
from ksm_edge.training.planner import FORMS, Form, make_plan
from ksm_edge.training.settings import Settings
from ksm_edge.training.trainer import Trainer, forward_spec, gradient_spec

# A kernel more or less that is amplified moves some pixel of VGG-16's pools to where last bits choose the winner.
SETTINGS = Settings(batch=2, amplify=False)


Gradients = dict[str, np.ndarray]


def gradients(bundle: Bundle, folder: Path, settings: Settings = SETTINGS, **forms: Any) -> Gradients:
    """Of one step, with kernels cut and a head that lets something through."""
    return next(steps(bundle, folder, settings, **forms))


def steps(bundle: Bundle, folder: Path, settings: Settings = SETTINGS, **forms: Any) -> Iterator[Gradients]:
    """Gradients of one draw of images after the other, all at the same parameters."""
    folder.mkdir()
    spec = replace(gradient_spec(bundle, 3, settings, settings.batch if settings.statistics == "batch" else 1), **forms)
    trainer, rng = Trainer(bundle, compile_graph(bundle, spec, folder), settings, steps=10), np.random.default_rng(0)
    for layer in trainer.layers.values():
        layer.score[...] = rng.normal(8e-3, 3e-3, layer.score.shape)
        layer.fuse()
    trainer.run_head[:] = rng.standard_normal(trainer.run_head.shape)
    size = bundle.input.size
    while True:
        images = rng.standard_normal((2, 3, size, size)).astype(np.float32)
        trainer.accumulate(images, np.eye(3, dtype=np.float32)[[0, 2]] / 2)
        found = ((name, layer.gradients()) for name, layer in trainer.layers.items())
        yield {f"{name}.{k}": np.array(g) for name, of_layer in found for k, g in of_layer.items()}


@pytest.mark.parametrize("recipe", ["resnet18", "squeezenet1_1", "mobilenet_v3_small", "vgg16_bn"])
def test_gradients_are_the_same(recipe: str, tmp_path: Path) -> None:
    assert_same_with_and_without("fast", recipe, 64, tmp_path)


@pytest.mark.parametrize("statistics", ["frozen", "batch"])
@pytest.mark.parametrize("recipe", ["resnet18", "vgg16_bn", "mobilenet_v2"])
def test_gradients_are_the_same_in_forms_chosen_for_smaller_images(
    recipe: str, statistics: str, tmp_path: Path
) -> None:
    (tmp_path / "bundle").mkdir()
    bundle = random_bundle(recipe, 96, tmp_path / "bundle")
    settings = replace(SETTINGS, statistics=statistics)
    assert_same(*(gradients(bundle, tmp_path / str(size), settings, formed_at=size) for size in (0, 32)))


def assert_same_with_and_without(form: str, recipe: str, size: int, folder: Path) -> None:
    (folder / "bundle").mkdir()
    bundle = random_bundle(recipe, size, folder / "bundle")
    assert_same(*(gradients(bundle, folder / str(on), **{form: on}) for on in (False, True)))


def assert_same(one: Gradients, other: Gradients, limit: float = 2e-4) -> None:
    assert all(gradient.any() for gradient in one.values())
    for name, error in errors(one, other).items():
        assert error < limit, name


def errors(one: Gradients, other: Gradients) -> dict[str, float]:
    """The largest difference of each over its largest number."""
    return {
        name: float(np.abs(other[name] - gradient).max() / max(float(np.abs(gradient).max()), 1e-20))
        for name, gradient in one.items()
    }


@pytest.mark.parametrize(
    "changes", [{}, {"granularity": "group:3"}, {"granularity": "channel"}, {"statistics": "batch"}], ids=str
)
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_the_same_where_weights_are_made_in_the_graph(
    changes: dict[str, str], recompute: bool, tmp_path: Path
) -> None:
    (tmp_path / "bundle").mkdir()
    bundle = random_bundle("resnet18", 64, tmp_path / "bundle")
    settings = replace(SETTINGS, **changes)
    forms = {"fast": False, "recompute": recompute}
    kept, made = (gradients(bundle, tmp_path / str(i), settings, inside=i, **forms) for i in (False, True))
    assert_same(kept, made)


def test_weights_are_made_in_the_graph_where_they_are_large(tmp_path: Path) -> None:
    bundle = random_bundle("resnet18", 64, tmp_path)
    backbone = onnx.load(bundle.graph_path, load_external_data=False)
    graph = build(backbone, bundle.layers, replace(gradient_spec(bundle, 3, SETTINGS, 1), fast=False, inside=True))
    made = {name for name, form in graph.forms.items() if form == "contracted"}
    assert made == {layer.name for layer in bundle.layers if layer.weight_shape[2:] != (1, 1)}
    given = {layer.name for layer in bundle.layers if f"{layer.name}.weight" in graph.inputs}
    assert given == {layer.name for layer in bundle.layers} - made


def test_a_short_budget_has_large_weights_made_in_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = random_bundle("resnet18", 64, tmp_path)

    @cache
    def here(spec: GradientSpec) -> CompiledGraph:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        return compile_graph(bundle, spec, folder)

    monkeypatch.setattr("ksm_edge.training.planner.compiled", lambda _, spec: here(spec))
    least = SETTINGS, replace(SETTINGS, granularity="element"), replace(SETTINGS, method="head")
    inside = []
    for settings in least:
        with pytest.raises(BudgetError) as caught:
            make_plan(bundle, 3, settings, threads=1, budget_bytes=1)
        plan = make_plan(bundle, 3, settings, threads=1, budget_bytes=caught.value.needed_bytes)
        inside.append(plan.graph.spec.inside)
    assert inside == [True, False, False]


@pytest.mark.parametrize("train_size", [112, 56])
@pytest.mark.parametrize("statistics", ["frozen", "batch"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_forward_pass_reads_what_training_keeps(
    form: Form, statistics: str, train_size: int, tmp_path: Path
) -> None:
    """Also where the form of a large stem depends on the memory there is, and those of others on the image's size."""
    bundle = random_bundle("resnet18", 112, tmp_path)
    backbone = onnx.load(bundle.graph_path, load_external_data=False)
    settings = replace(SETTINGS, statistics=statistics, train_scale=train_size / 112)
    spec = replace(gradient_spec(bundle, 3, settings, 1), **form)
    learns = build(backbone, bundle.layers, spec)
    judges = build(backbone, bundle.layers, forward_spec(spec, learns.forms, 112))
    assert (learns.inputs["image"][2], judges.inputs["image"][2]) == (train_size, 112)
    judges.inputs.pop("image")
    assert set(judges.inputs) <= set(learns.inputs)
    assert all(learns.inputs[name] == shape for name, shape in judges.inputs.items())


def test_a_large_stem_is_one_product_where_memory_allows(tmp_path: Path) -> None:
    bundle = random_bundle("resnet18", 64, tmp_path)
    backbone = onnx.load(bundle.graph_path, load_external_data=False)
    spec = gradient_spec(bundle, 3, SETTINGS, 1)
    forms = {fast: build(backbone, bundle.layers, replace(spec, fast=fast)).forms["conv1"] for fast in (False, True)}
    assert forms == {False: "taps", True: "patches"}


def test_only_strides_leave_transposed_convs(tmp_path: Path) -> None:
    bundle = random_bundle("resnet18", 64, tmp_path)
    backbone = onnx.load(bundle.graph_path, load_external_data=False)
    spec = gradient_spec(bundle, 3, SETTINGS, 1)
    graphs = {fast: build(backbone, bundle.layers, replace(spec, fast=fast)) for fast in (False, True)}
    found = {t: [n for n in g.model.graph.node if n.op_type == "ConvTranspose"] for t, g in graphs.items()}
    assert {a.ints[0] for n in found[True] for a in n.attribute if a.name == "strides"} == {2}
    assert len(found[True]) < len(found[False])
    assert any(len(shape) == 4 for name, shape in graphs[True].inputs.items() if name.endswith(".turned"))
    shapes = {layer.name: layer.weight_shape for layer in bundle.layers}
    for name, shape in graphs[True].inputs.items():
        if name.endswith(".turned") and len(shape) == 4:
            O, I, kh, kw = shapes[name.removesuffix(".turned")]
            assert shape == (I, O, kh, kw)
    assert not any(name.endswith(".turned") for name in graphs[False].inputs)


@pytest.mark.parametrize(
    "ways", [{}, {"own": False, "tile_bytes": 0}, {"products": FLOATS}, {"products": HALVES}], ids=str
)
@pytest.mark.parametrize("recipe", ["mobilenet_v2", "efficientnet_b0", "resnet18", "squeezenet1_1"])
def test_nothing_large_is_made_that_nobody_reads(recipe: str, ways: dict[str, Any], tmp_path: Path) -> None:
    """ONNX Runtime would hold it until the run's end."""
    bundle = random_bundle(recipe, 96, tmp_path)
    spec = replace(gradient_spec(bundle, 3, SETTINGS, 1), **ways)
    model = build(onnx.load(bundle.graph_path, load_external_data=False), bundle.layers, spec).model
    read = {name for node in model.graph.node for name in node.input} | {value.name for value in model.graph.output}
    assert all(size <= 2**14 for name, size in tensor_bytes(model).items() if name not in read)
