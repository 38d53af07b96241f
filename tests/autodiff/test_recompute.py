"""Computing the forward pass again: the same gradients to the bit, from a graph that keeps less."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from tiny import saved_tiny_bundle
from whole_network import random_bundle

from ksm_edge.autodiff.gradient_graph import build
from ksm_edge.autodiff.liveness import peak_bytes
from ksm_edge.autodiff.recompute import AGAIN, cuts, recomputed
from ksm_edge.bundle.layers import Bundle
from ksm_edge.bundle.load import load_bundle
from ksm_edge.runtimes.compile import compile_graph
from ksm_edge.training.settings import Settings
from ksm_edge.training.trainer import Trainer, gradient_spec


def graph(bundle: Bundle, recompute: bool, settings: Settings, images: int = 1) -> onnx.ModelProto:
    spec = replace(gradient_spec(bundle, 5, settings, images), fast=False, recompute=recompute)
    return build(onnx.load(bundle.graph_path, load_external_data=False), bundle.layers, spec).model


def chain(text: str) -> list[onnx.NodeProto]:
    """Nodes from "a+b>c", the inputs and the output of each."""
    return [
        helper.make_node("Sum", made.split(">")[0].split("+"), [made.split(">")[1]], name=made) for made in text.split()
    ]


def test_a_graph_is_cut_where_one_tensor_is_all_that_is_read_later() -> None:
    assert cuts(chain("x>a a>b b>c")) == [0, 1, 2]
    assert cuts(chain("x>a a>b a+b>c c>d")) == [0, 2, 3]  # b alone is not all: a is added
    assert cuts(chain("x>a x+a>b b>c")) == [0, 1, 2]  # the image is there in any case


def test_what_is_not_kept_is_made_again_where_it_is_first_read() -> None:
    nodes = chain("x>a a>b b>c c>d d>loss loss+b>g loss+a+b>h")
    names = [node.name for node in recomputed(nodes, 5, {"c", "loss"})]
    assert names == [*(node.name for node in nodes[:5]), f"x>a{AGAIN}", f"a>b{AGAIN}", "loss+b>g", "loss+a+b>h"]
    by_name = {node.name: node for node in recomputed(nodes, 5, {"c", "loss"})}
    assert list(by_name[f"a>b{AGAIN}"].input) == [f"a{AGAIN}"]
    assert list(by_name["loss+b>g"].input) == ["loss", f"b{AGAIN}"]
    assert list(by_name["a>b"].input) == ["a"]  # the first time is left as it was


def test_only_what_is_needed_is_made_again() -> None:
    nodes = chain("x>a a>b b>c c>loss loss+a>g")
    assert [n.name for n in recomputed(nodes, 4, {"c"}) if n.name.endswith(AGAIN)] == [f"x>a{AGAIN}"]


def test_the_columns_of_a_transposed_conv_count_while_it_runs() -> None:
    values = [helper.make_tensor_value_info(n, 1, s) for n, s in (("x", [1, 4, 5, 5]), ("w", [4, 3, 2, 2]))]
    out = helper.make_tensor_value_info("y", 1, None)
    nodes = [helper.make_node("ConvTranspose", ["x", "w"], ["z"]), helper.make_node("Relu", ["z"], ["y"])]
    model = helper.make_model(helper.make_graph(nodes, "g", values, [out]))
    assert peak_bytes(model) == 4 * (3 * 6 * 6 + 3 * 2 * 2 * 5 * 5)


def test_what_is_kept_is_not_made_again() -> None:
    nodes = chain("x>a a>b b>c c>loss loss+b>g")
    assert len(recomputed(nodes, 4, {"b", "c"})) == len(nodes)


@pytest.mark.parametrize("recipe", ["mobilenet_v2", "resnet18", "efficientnet_b0", "squeezenet1_1"])
def test_less_is_kept_of_real_networks(recipe: str, tmp_path: Path) -> None:
    bundle = random_bundle(recipe, 96, tmp_path)
    plain, again = (peak_bytes(graph(bundle, recompute, Settings(batch=1))) for recompute in (False, True))
    assert again < 0.95 * plain


@pytest.mark.parametrize(
    "settings",
    [
        Settings(batch=2),
        Settings(batch=2, method="norm"),
        Settings(batch=2, layers="grouped, plain"),
        Settings(batch=2, granularity="element"),
        Settings(batch=2, statistics="batch"),
    ],
    ids=lambda settings: f"{settings.method} {settings.layers} {settings.granularity} {settings.statistics}",
)
def test_steps_are_the_same_to_the_bit(settings: Settings, tmp_path: Path) -> None:
    bundle = saved_tiny_bundle(tmp_path / "bundle")
    rng = np.random.default_rng(0)
    images = rng.standard_normal((2, 3, 16, 16)).astype(np.float32)
    targets = np.eye(5, dtype=np.float32)[[1, 4]] / 2
    micro_batch = 2 if settings.statistics == "batch" else 1
    states = []
    for recompute in (False, True):
        (folder := tmp_path / str(recompute)).mkdir()
        spec = replace(gradient_spec(bundle, 5, settings, micro_batch), recompute=recompute)
        trainer = Trainer(bundle, compile_graph(bundle, spec, folder), settings, steps=10)
        for _ in range(3):
            trainer.step(images, targets)
        states.append(trainer.state())
    for name, array in states[0].items():
        np.testing.assert_array_equal(states[1][name], array, err_msg=name)


def test_gradients_of_the_embedded_backbone_are_the_same_to_the_bit(tmp_path: Path) -> None:
    embedded = load_bundle("embedded")
    found = []
    for recompute in (False, True):
        (folder := tmp_path / str(recompute)).mkdir()
        spec = replace(gradient_spec(embedded, 10, Settings(batch=1), 1), recompute=recompute)
        trainer = Trainer(embedded, compile_graph(embedded, spec, folder), Settings(batch=1), steps=10)
        size = embedded.input.size
        trainer.step(
            np.random.default_rng(0).standard_normal((1, 3, size, size), np.float32), np.eye(10, dtype=np.float32)[:1]
        )
        found.append(trainer.state())
    for name, array in found[0].items():
        np.testing.assert_array_equal(found[1][name], array, err_msg=name)
