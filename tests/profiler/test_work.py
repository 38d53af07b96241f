"""Operations and bytes of a graph, against sums by hand and figures that are well known."""

from __future__ import annotations

import onnx
import pytest
from onnx import TensorProto, helper
from tiny import LAYERS, tiny_graph

from ksm_edge.bundle.recipe import load_recipe
from ksm_edge.profiler.work import KINDS, graph_work, linear_work


def test_each_operator_of_the_tiny_backbone_is_counted() -> None:
    works = {work.name: work for work in graph_work(tiny_graph(), 16)}
    pixels = 8 * 8  # behind the stem's stride of 2
    assert {name: works[name].kind for name in (layer.name for layer in LAYERS)} == {
        "stem": "dense", "dw": "depthwise", "project": "pointwise", "grouped": "dense", "plain": "dense"
    }  # fmt: skip
    flops = {"stem": 8 * 3 * 9, "dw": 8 * 9, "project": 8 * 8, "grouped": 6 * 4 * 9, "plain": 10 * 6 * 9}
    assert {name: works[name].flops for name in flops} == {name: 2 * n * pixels for name, n in flops.items()}
    # Image, weight, bias, output.
    assert works["stem"].bytes == 4 * (3 * 16 * 16 + 8 * 3 * 9 + 8 + 8 * pixels)
    # Activations run as part of the conv in front of them, and flattening moves nothing.
    assert [work.operator for work in works.values() if work.kind == "memory"] == ["Add", "GlobalAveragePool"]
    assert all(work.kind in KINDS for work in works.values())


def test_a_framework_that_fuses_nothing_moves_more() -> None:
    fused, eager = (sum(w.bytes for w in graph_work(tiny_graph(), 16, eager=eager)) for eager in (False, True))
    assert eager > fused
    norms = [work for work in graph_work(tiny_graph(), 16, eager=True) if work.operator == "BatchNormalization"]
    assert len(norms) == len(LAYERS)
    assert norms[0].bytes == 2 * 4 * 8 * 64


@pytest.mark.parametrize(
    ("recipe", "gigaflops"), [("mobilenet_v2", 0.6), ("resnet50", 8.18), ("resnet18", 3.63), ("vgg16_bn", 30.7)]
)
def test_networks_have_the_operations_that_are_published_for_them(recipe: str, gigaflops: float) -> None:
    flops = sum(work.flops for work in graph_work(onnx.load(load_recipe(recipe).graph_path), 224))
    assert flops / 1e9 == pytest.approx(gigaflops, rel=0.02)


def test_products_count_by_their_inner_dimension_however_they_are_turned() -> None:
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("a", [5, 7]), ("b", [5, 3]))]
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    nodes = [
        helper.make_node("FusedMatMul", ["a", "b"], ["c"], domain="com.microsoft", transA=1),
        helper.make_node("Relu", ["c"], ["out"]),
    ]
    product, relu = graph_work(helper.make_model(helper.make_graph(nodes, "g", values, [out])), 1)
    assert (product.kind, product.flops) == ("pointwise", 2 * 7 * 3 * 5)
    assert relu.bytes == 2 * 4 * 7 * 3


def test_elements_count_with_their_own_size() -> None:
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, [10])
    out = helper.make_tensor_value_info("y", TensorProto.BOOL, [10])
    graph = helper.make_graph([helper.make_node("Greater", ["x", "x"], ["y"])], "g", [image], [out])
    (work,) = graph_work(helper.make_model(graph), 1)
    assert work.bytes == 40 + 40 + 10


def test_a_linear_layer_reads_its_weights_once() -> None:
    head = linear_work("head", 1280, 10)
    assert (head.flops, head.bytes) == (25_600, 4 * (12_800 + 1280 + 10))
