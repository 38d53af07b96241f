"""The operators in C: the same gradients as the standard ones, whatever the geometry, from less memory."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from small_graphs import Conv, Net, Op, conv, op, relative_error
from test_fast_forms import assert_same_with_and_without
from whole_network import random_bundle

from ksm_edge import native
from ksm_edge.autodiff import own
from ksm_edge.autodiff.gradient_graph import build
from ksm_edge.autodiff.graph import OWN
from ksm_edge.autodiff.liveness import peak_bytes
from ksm_edge.training.settings import Settings
from ksm_edge.training.trainer import gradient_spec

pytestmark = pytest.mark.skipif(native.operators is None, reason="installed without a C compiler")

SIX = {"low": np.array(0, np.float32), "high": np.array(6, np.float32)}
HALF = {"low": np.array(-0.5, np.float32), "high": np.array(0.5, np.float32)}


def activation(kind: str, x: str) -> list[Op]:
    """From x to x_y; Swish as torch exports it."""
    if kind == "Swish":
        return [op("Sigmoid", x, f"{x}_s"), op("Mul", f"{x} {x}_s", f"{x}_y")]
    return [op(kind, f"{x} low high" if kind == "Clip" else x, f"{x}_y")]


def block(
    kernel: tuple[int, int],
    *,
    narrow: int = 6,
    wide: int = 10,
    act: str = "Clip",
    behind: str | None = None,
    **attributes: object,
) -> list[Conv | Op]:
    """An inverted residual block: 1x1 conv, activation, depthwise conv, activation (`behind`: another), 1x1 conv."""
    behind = act if behind is None else behind
    return [
        conv("stem", "image", narrow, 3),
        conv("wide", "stem", wide, narrow),
        *activation(act, "wide"),
        conv("depth", "wide_y", wide, 1, kernel, wide, **attributes),
        *(activation(behind, "depth") if behind else ()),
        conv("narrow", "depth_y" if behind else "depth", 5, wide),
    ]


def operators(net: Net) -> list[str]:
    return [node.op_type for node in net.gradient_graph(np.float32).model.graph.node if node.domain == OWN]


def assert_gradients_are_those_of_standard_operators(net: Net) -> None:
    """float32 with this project's operators, held to float64 with standard ones."""
    expected, found = net.run_reference(), net.run_onnxruntime()
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        assert relative_error(found[name], array) < 3e-5, name


GEOMETRIES = [
    ((3, 3), {"pads": [1, 1, 1, 1]}),
    ((3, 3), {"pads": [1, 1, 1, 1], "strides": [2, 2]}),
    ((3, 3), {"pads": [0, 0, 1, 1], "strides": [2, 2]}),
    ((3, 3), {}),
    ((3, 3), {"strides": [2, 1]}),
    ((3, 3), {"strides": [1, 2], "pads": [2, 0, 0, 2]}),
    ((5, 5), {"pads": [2, 2, 2, 2], "strides": [2, 2]}),
    ((5, 5), {"pads": [2, 2, 2, 2]}),
    ((5, 3), {"pads": [2, 1, 2, 1], "strides": [2, 2]}),
    ((7, 7), {"pads": [3, 3, 3, 3]}),
    ((1, 1), {"strides": [2, 2]}),
    ((2, 2), {"strides": [2, 2]}),
    ((9, 1), {"pads": [4, 0, 4, 0]}),
    ((1, 9), {"pads": [0, 4, 0, 4]}),
]


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("size", [7, 12, 33, 40])  # less than a register holds, and more than are worked on at once
@pytest.mark.parametrize(("kernel", "attributes"), GEOMETRIES, ids=str)
@pytest.mark.parametrize("large", [0, 1 << 30], ids=["widened", "depthwise"])
def test_gradients_are_the_same_for_every_geometry(
    kernel: tuple[int, int], attributes: dict[str, list[int]], size: int, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own, "LARGE_BYTES", large)
    net = Net(block(kernel, **attributes), size=size, constants=HALF, own=True)
    assert_gradients_are_those_of_standard_operators(net)
    expected = ["Depthwise", "DepthwiseGradient"] if large else ["WidenedDepthwise", "WidenedDepthwiseGradient"]
    assert operators(net) == expected


# A side, and channels, of which all rows are too many for the cache: parts of 27 rows, or of 26 with strides.
LARGE_SIDE, LARGE_NARROW = 75, 16


def test_large_images_are_done_in_three_parts() -> None:
    header = Path(native.__file__).with_name("_depthwise.h").read_text()
    found = re.search(r"CACHED = (\d+)", header)
    assert found is not None
    assert LARGE_SIDE / 3 < int(found[1]) // (LARGE_SIDE * LARGE_NARROW) < LARGE_SIDE / 2


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize(("kernel", "attributes"), GEOMETRIES, ids=str)
def test_gradients_are_the_same_where_an_image_is_too_large_for_the_cache(
    kernel: tuple[int, int], attributes: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own, "LARGE_BYTES", 0)
    nodes = block(kernel, narrow=LARGE_NARROW, **attributes)
    net = Net(nodes, size=LARGE_SIDE, images=2, constants=HALF, own=True)
    assert_gradients_are_those_of_standard_operators(net)
    assert operators(net) == ["WidenedDepthwise", "WidenedDepthwiseGradient"]


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize(("act", "behind"), [("HardSwish", "Clip"), ("Clip", "HardSwish"), ("Clip", "")])
def test_so_are_they_with_other_activations(act: str, behind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own, "LARGE_BYTES", 0)
    nodes = block((3, 3), narrow=LARGE_NARROW, act=act, behind=behind, pads=[1, 1, 1, 1])
    net = Net(nodes, size=LARGE_SIDE, constants=HALF, own=True)
    assert_gradients_are_those_of_standard_operators(net)
    assert "WidenedDepthwiseGradient" in operators(net)


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("act", ["Relu", "Clip", "HardSwish", "Swish"])
@pytest.mark.parametrize("large", [0, 1 << 30], ids=["widened", "depthwise"])
def test_gradients_are_the_same_for_several_images_and_threads(
    images: int, threads: int, act: str, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own, "LARGE_BYTES", large)
    nodes = block((3, 3), wide=40, act=act, strides=[1, 2], pads=[1, 1, 1, 1])
    net = Net(nodes, size=19, images=images, constants=HALF, own=True, threads=threads)
    assert_gradients_are_those_of_standard_operators(net)


@pytest.mark.parametrize(
    "changes",
    [
        {2: op("HardSwish", "wide", "wide_y")},
        {4: op("HardSwish", "depth", "depth_y")},
        {2: op("HardSigmoid", "wide", "wide_y")},  # not known to them
        {4: op("HardSigmoid", "depth", "depth_y")},
        {4: op("HardSwish", "depth", "depth_y"), 5: op("Add", "depth_y wide_y", "sum")},
        {2: op("HardSwish", "wide", "wide_y"), 5: op("Add", "depth_y wide_y", "sum")},
        {5: op("Add", "depth_y wide_y", "sum")},  # wide_y is read twice
        {5: op("Add", "depth depth_y", "sum")},  # depth is
        {2: op("Clip", "wide low high", "wide_y"), 5: op("Add", "depth_y wide", "sum")},
        {1: conv("wide", "stem", 10, 6, (3, 3), pads=[1, 1, 1, 1])},
        {0: conv("stem", "image", 7, 3), 1: conv("wide", "stem", 10, 7)},  # an odd number of channels
        {5: op("Relu", "depth_y", "end")},
    ],
    ids=str,
)
def test_what_stands_around_is_done_along_only_where_nothing_else_reads_it(
    changes: dict[int, Conv | Op], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own, "LARGE_BYTES", 0)
    nodes = block((3, 3), pads=[1, 1, 1, 1])
    for place, node in changes.items():
        nodes[place] = node
    net = Net(nodes, constants=SIX, own=True)
    assert any("Depthwise" in kind for kind in operators(net))
    assert_gradients_are_those_of_standard_operators(net)


@pytest.mark.parametrize("frozen", [["wide"], ["depth"], ["stem", "wide"], ["narrow"], ["stem"]], ids=str)
def test_layers_that_do_not_learn_are_left_out(frozen: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own, "LARGE_BYTES", 0)
    net = Net(block((3, 3), pads=[1, 1, 1, 1]), constants=SIX, own=True, frozen=frozen)
    assert_gradients_are_those_of_standard_operators(net)


@pytest.mark.parametrize(
    "attributes",
    [{"strides": [3, 3]}, {"dilations": [2, 2]}, {"pads": [3, 3, 3, 3]}],
    ids=str,
)
def test_other_geometries_keep_the_standard_operators(attributes: dict[str, list[int]]) -> None:
    net = Net(block((3, 3), **attributes), size=9, constants=SIX, own=True)
    assert set(operators(net)) == {"Gate"}
    assert_gradients_are_those_of_standard_operators(net)


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("act", ["Relu", "Clip", "HardSwish", "Swish"])
@pytest.mark.parametrize("large", [0, 1 << 30], ids=["widened", "depthwise"])
def test_numbers_that_are_none_come_through(act: str, large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training that has failed has to be seen to have failed."""
    monkeypatch.setattr(own, "LARGE_BYTES", large)
    net = Net(block((3, 3), act=act), constants=HALF, own=True)
    net.image[0, 0, 2, 2] = np.nan
    assert np.isnan(net.run_onnxruntime()["loss"])
    net = Net(block((3, 3), act=act), constants=HALF, own=True)
    net.target[0, 0] = np.nan
    outputs = net.run_onnxruntime()
    assert all(np.isnan(outputs[f"{name}.dbias"]).any() for name in ("stem", "wide", "depth"))


@pytest.mark.parametrize("act", ["Relu", "HardSwish", "Swish"])
def test_an_activation_between_two_depthwise_convs_is_done_once(act: str) -> None:
    first, second = (
        conv(name, x, 6, 1, (3, 3), 6, pads=[1, 1, 1, 1]) for name, x in (("one", "stem_y"), ("two", "one_y"))
    )
    nodes = [conv("stem", "image", 6, 3), *activation(act, "stem"), first, *activation(act, "one"), second]
    net = Net(nodes, own=True)
    assert operators(net) == ["Depthwise"] * 2 + ["DepthwiseGradient"] * 2
    assert_gradients_are_those_of_standard_operators(net)


@pytest.mark.parametrize("recipe", ["mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "resnet18"])
def test_whole_networks_have_the_same_gradients(recipe: str, tmp_path: Path) -> None:
    assert_same_with_and_without("own", recipe, 96, tmp_path)


def test_the_widest_loops_that_run_here_are_taken_and_others_are_refused() -> None:
    from ksm_edge import _operators

    assert _operators.loops()[-1] == "plain"
    assert native.running() == _operators.running() == _operators.loops()[0]
    with pytest.raises(ValueError, match="'avx1024': no loops that can run here"):
        _operators.run_with("avx1024")


@pytest.mark.parametrize("recipe", ["mobilenet_v2", "efficientnet_b0"])
def test_whole_networks_have_the_same_gradients_without_1x1_convs_done_along(recipe: str, tmp_path: Path) -> None:
    assert_same_with_and_without("widened", recipe, 96, tmp_path)


def test_1x1_convs_are_done_along_where_that_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own, "LARGE_BYTES", 0)
    net = Net(block((3, 3)), constants=SIX, own=True)
    assert set(operators(net)) == {"WidenedDepthwise", "WidenedDepthwiseGradient"}
    net = Net(block((3, 3)), constants=SIX, own=True, widened=False)
    assert set(operators(net)) == {"Depthwise", "DepthwiseGradient"}
    assert_gradients_are_those_of_standard_operators(net)


def test_without_a_compiler_graphs_are_of_standard_operators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = random_bundle("mobilenet_v2", 64, tmp_path)
    assert gradient_spec(bundle, 3, Settings(), 1).own
    monkeypatch.setattr(native, "operators", None)
    assert not gradient_spec(bundle, 3, Settings(), 1).own
    Net(block((3, 3)), constants=SIX).run_onnxruntime()  # a session opens without the library


def test_less_memory_is_alive(tmp_path: Path) -> None:
    bundle = random_bundle("mobilenet_v2", 224, tmp_path)
    backbone = onnx.load(bundle.graph_path, load_external_data=False)
    spec = replace(gradient_spec(bundle, 3, Settings(), 1), fast=False)
    peaks = {
        (own, recompute): peak_bytes(build(backbone, bundle.layers, replace(spec, own=own, recompute=recompute)).model)
        for own in (False, True)
        for recompute in (False, True)
    }
    assert peaks[True, False] < 0.6 * peaks[False, False]
    assert peaks[True, True] < 0.5 * peaks[False, True]


def value(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 4, 5, 5])


def gated(again: bool) -> onnx.ModelProto:
    """A gate whose gradient is read again behind it, or not."""
    gate = helper.make_node(
        "Gate", ["b", "a"], ["c", "sum"], domain=OWN, image_shape=[1, 4, 5, 5], kind=[0], low=0.0, high=6.0
    )
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Neg", ["a"], ["b"]),
        gate,
        helper.make_node("Add", ["c", "b" if again else "c"], ["y"]),
    ]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(OWN, 1)]
    return helper.make_model(helper.make_graph(nodes, "g", [value("x")], [value("y")]), opset_imports=opsets)


def test_a_gradient_is_written_over_where_nobody_reads_it_again() -> None:
    whole, sums = 4 * 4 * 5 * 5, 4 * 4
    assert peak_bytes(gated(again=False)) == 2 * whole + sums  # a, and b, which becomes c
    assert peak_bytes(gated(again=True)) == 3 * whole + sums


@pytest.mark.usefixtures("loops")
def test_smooth_activations_are_right_over_their_whole_range() -> None:
    """Their slope is computed from a series: far out, around 0 and between."""
    for kind in ("HardSwish", "Swish"):
        net = Net([conv("stem", "image", 6, 3), *activation(kind, "stem")], size=12, own=True)
        net.image = np.random.default_rng(0).standard_normal(net.image.shape) * np.logspace(-3, 1.5, 12)
        assert operators(net) == ["Gate"]
        assert_gradients_are_those_of_standard_operators(net)
