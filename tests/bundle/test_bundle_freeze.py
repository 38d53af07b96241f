"""What goes into a frozen graph, what it is rewritten to, and that it computes what the net it came from does."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from incoming_nets import CLASSIFIER, CONV1, CONV2, FLAT, LINEAR, NORM1, POOL, RELU1, graph, node, run, weights

from ksm_edge.bundle.freeze import Frozen, freeze
from ksm_edge.bundle.plain import plain_features, plain_weights
from ksm_edge.errors import UsageError

IMAGE = np.random.default_rng(1).standard_normal((2, 3, 12, 10)).astype(np.float32)
INT = np.int64


def features_of(frozen: Frozen, image: np.ndarray = IMAGE) -> np.ndarray:
    return plain_features(frozen.model.SerializeToString(), plain_weights(frozen.layers, frozen.weights), image)


def ops(frozen: Frozen) -> list[str]:
    return [node.op_type for node in frozen.model.graph.node]


def test_the_backbone_ends_at_what_the_first_linear_layer_takes() -> None:
    model = graph()
    frozen = freeze(model, {})
    assert ops(frozen) == ["Conv", "Relu", "Conv", "GlobalAveragePool", "Flatten"]
    assert frozen.features == 6
    np.testing.assert_allclose(features_of(frozen), run(model, "f", IMAGE), rtol=1e-4, atol=1e-6)


def test_a_weightless_graph_and_a_state_dict_give_the_same_as_a_graph_with_its_weights() -> None:
    a, b = freeze(graph(), {}), freeze(graph(weightless=True), weights())
    assert a.model == b.model
    assert a.layers == b.layers
    assert all(np.array_equal(a.weights[n].weight, b.weights[n].weight) for n in ("conv1", "conv2"))


def test_the_layer_table_names_convs_by_the_state_dict_and_takes_up_their_batch_norm() -> None:
    first, second = freeze(graph(), {}).layers
    assert (first.name, first.weight_shape, first.eps, first.has_norm) == ("conv1", (4, 3, 3, 3), 1e-3, True)
    assert (second.name, second.weight_shape, second.eps, second.has_norm) == ("conv2", (6, 4, 1, 1), 0.0, False)


def test_a_conv_without_batch_norm_has_one_that_does_nothing() -> None:
    held = freeze(graph(), {}).weights["conv2"]
    assert np.array_equal(held.beta, weights()["conv2.bias"])
    assert held.gamma.tolist() == held.var.tolist() == [1] * 6
    assert held.mean.tolist() == held.bias.tolist() == [0] * 6


def test_conv_weights_are_declared_outside_and_nothing_else_is() -> None:
    model = freeze(graph(), {}).model
    outside = {t.name: tuple(t.dims) for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL}
    weights_outside = {"conv1.weight": (4, 3, 3, 3), "conv2.weight": (6, 4, 1, 1)}
    assert outside == weights_outside | {"conv1.bias": (4,), "conv2.bias": (6,)}
    assert len(model.SerializeToString()) < 2000
    assert [entry.version for entry in model.opset_import] == [17]


def test_a_foreign_file_with_folded_batch_norm_is_a_net_of_convs_with_plain_unique_names() -> None:
    tensors = {"onnx::Conv_1": weights()["conv1.weight"], "b1": weights()["bn1.bias"], "w 2": weights()["conv2.weight"]}
    nodes = (
        onnx.helper.make_node("Conv", ["image", "onnx::Conv_1", "b1"], ["n1"], name="/stem/Conv", pads=[1, 1, 1, 1]),
        RELU1,
        onnx.helper.make_node("Conv", ["r1", "w 2"], ["c2"]),
        POOL, FLAT, LINEAR,
    )  # fmt: skip
    model = graph(nodes, tensors | {n: weights()[n] for n in ("fc.weight", "fc.bias")})
    frozen = freeze(model, {})
    assert [(layer.name, layer.has_norm) for layer in frozen.layers] == [("stem", False), ("w_2", False)]
    np.testing.assert_allclose(features_of(frozen), run(model, "f", IMAGE), rtol=1e-4, atol=1e-6)


MIDDLES = {
    "Identity": [node("Identity", "r1", "x")],
    "Dropout": [node("Dropout", "r1", "x")],
    "Clip": [node("Clip", "r1 zero six", "x")],
    "Clip below": [node("Clip", "r1 - six", "x")],
    "Clip at 0": [node("Clip", "r1 zero", "x")],
    "Clip between arrays of one": [node("Clip", "r1 a0 a6", "x")],
    "HardSwish": [node("HardSwish", "r1", "x")],
    "HardSigmoid": [node("HardSigmoid", "r1", "x", alpha=0.25)],
    "SiLU": [node("Sigmoid", "r1", "s"), node("Mul", "r1 s", "x")],
    "squeeze": [node("ReduceMean", "r1", "s", axes=[-1, -2]), node("Sigmoid", "s", "t"), node("Mul", "t r1", "x")],
    "MaxPool": [node("MaxPool", "r1", "x", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])],
    "AveragePool": [node("AveragePool", "r1", "x", kernel_shape=[2, 2], count_include_pad=1, pads=[0, 0, 1, 1])],
    "Concat": [
        node("Slice", "r1 i0 i2 i1", "s"), node("Slice", "r1 i2 i9 i1 i1", "t"), node("Concat", "t s", "x", axis=1),
    ],
    "Slice": [node("Slice", "r1 i0 i9 i2 i2", "s"), node("Slice", "s i1 i9 i3", "x")],
    "Pad": [node("Pad", "r1 pads", "x")],
    "Pad with an array of one": [node("Pad", "r1 pads a0", "x")],
    "MaxPool that rounds up": [node("MaxPool", "r1", "x", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)],
    "Sum": [node("Sum", "r1 n1", "x")],
    "MaxPool without strides": [node("MaxPool", "r1", "x", kernel_shape=[2, 2])],
}  # fmt: skip
CONSTANTS = {
    "zero": np.float32(0), "six": np.float32(0.6),
    "a0": np.zeros(1, np.float32), "a6": np.full(1, 0.6, np.float32),
    "i0": np.array([0], INT), "i1": np.array([1], INT),
    "i2": np.array([2], INT), "i3": np.array([3], INT), "i9": np.array([999], INT),
    "pads": np.array([0, 0, 1, 2, 0, 0, 0, 1], INT),
}  # fmt: skip
CONSTANTS = {name: np.asarray(value) for name, value in CONSTANTS.items()}


@pytest.mark.parametrize("name", MIDDLES)
def test_every_supported_operator_computes_what_it_did(name: str) -> None:
    conv2 = node("Conv", "x conv2.weight conv2.bias", "c2")
    model = graph([CONV1, NORM1, RELU1, *MIDDLES[name], conv2, POOL, FLAT, LINEAR], constants=CONSTANTS)
    np.testing.assert_allclose(features_of(freeze(model, {})), run(model, "f", IMAGE), rtol=1e-4, atol=1e-6)


def net_with_a_border(*behind: onnx.NodeProto, border: tuple[int, int, int, int], kernel: int = 3) -> onnx.ModelProto:
    """conv1, zeros around it, and then `behind`, which read "x"; conv2's weight is (6, 4, kernel, kernel)."""
    top, left, bottom, right = border
    weight = np.random.default_rng(2).standard_normal((6, 4, kernel, kernel)).astype(np.float32)
    constants = {"pads": np.array([0, 0, top, left, 0, 0, bottom, right], INT)}
    nodes = [CONV1, NORM1, RELU1, node("Pad", "r1 pads", "x"), *behind, FLAT, LINEAR]
    return graph(nodes, weights() | {"conv2.weight": weight}, constants=constants)


def conv2_reading(name: str, **attributes: object) -> onnx.NodeProto:
    return node("Conv", f"{name} conv2.weight conv2.bias", "c2", **attributes)


def pads_of(frozen: Frozen, name: str) -> list[int]:
    conv = next(node for node in frozen.model.graph.node if node.name == name)
    return next(list(attribute.ints) for attribute in conv.attribute if attribute.name == "pads")


def test_zeros_around_what_a_conv_reads_are_its_own_pads() -> None:
    """As the padding of TensorFlow's networks comes, whose strides want one pixel more behind than in front."""
    model = net_with_a_border(conv2_reading("x", strides=[2, 2], pads=[1, 0, 0, 0]), POOL, border=(0, 1, 1, 2))
    frozen = freeze(model, {})
    assert ops(frozen) == ["Conv", "Relu", "Conv", "GlobalAveragePool", "Flatten"]
    assert pads_of(frozen, "conv2") == [1, 1, 1, 2]
    np.testing.assert_allclose(features_of(frozen), run(model, "f", IMAGE), rtol=1e-4, atol=1e-6)


def test_zeros_around_zeros_are_one_border() -> None:
    conv2 = conv2_reading("y", dilations=[2, 1])
    model = net_with_a_border(node("Pad", "x pads", "y"), conv2, POOL, border=(2, 0, 1, 1))
    frozen = freeze(model, {})
    assert "Pad" not in ops(frozen)
    assert pads_of(frozen, "conv2") == [4, 0, 2, 2]
    np.testing.assert_allclose(features_of(frozen), run(model, "f", IMAGE), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("conv_first", [True, False])
def test_zeros_that_others_read_too_are_there_once_and_a_conv_does_without(conv_first: bool) -> None:
    pools = node("GlobalAveragePool", "x", "a"), node("MaxPool", "x", "m", kernel_shape=[2, 2])
    readers = (conv2_reading("x"), *pools) if conv_first else (*pools, conv2_reading("x"))
    joined = node("GlobalAveragePool", "m", "b"), node("Concat", "p a b", "all", axis=1)
    model = net_with_a_border(*readers, POOL, *joined, border=(1, 1, 1, 1))
    frozen = freeze(model, {}, features="all")
    assert ops(frozen).count("Pad") == 1
    assert next(n for n in frozen.model.graph.node if n.name == "conv2").input[0] == "relu:1.out"
    np.testing.assert_allclose(features_of(frozen), run(model, "all", IMAGE)[:, :, 0, 0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("border", "kernel", "own"), [((0, 0, 3, 0), 3, (1, 0, 1, 0)), ((1, 0, 0, 0), 1, (0, 0, 0, 0))]
)
def test_zeros_beyond_what_a_conv_reaches_stay(
    border: tuple[int, int, int, int], kernel: int, own: tuple[int, ...]
) -> None:
    model = net_with_a_border(conv2_reading("x", pads=own), POOL, border=border, kernel=kernel)
    frozen = freeze(model, {})
    assert "Pad" in ops(frozen)
    np.testing.assert_allclose(features_of(frozen), run(model, "f", IMAGE), rtol=1e-4, atol=1e-6)


def test_a_backbone_may_end_at_zeros_around_a_map() -> None:
    model = net_with_a_border(conv2_reading("x"), POOL, border=(1, 0, 2, 3))
    features = features_of(freeze(model, {}, features="x"))
    np.testing.assert_allclose(features, run(model, "x", IMAGE).mean(axis=(2, 3)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_auto_pad_becomes_explicit(auto_pad: str) -> None:
    tensors = weights() | {"conv1.weight": np.random.default_rng(0).standard_normal((4, 3, 4, 2)).astype(np.float32)}
    conv1 = node("Conv", "image conv1.weight", "c1", auto_pad=auto_pad)
    model = graph([conv1, *CLASSIFIER[1:]], tensors)
    frozen = freeze(model, {})
    assert not any(a.name == "auto_pad" for n in frozen.model.graph.node for a in n.attribute)
    np.testing.assert_allclose(features_of(frozen), run(model, "f", IMAGE), rtol=1e-4, atol=1e-6)


ENDS = {
    "Reshape": [POOL, node("Reshape", "p shape", "f"), LINEAR],
    "ReduceMean": [node("ReduceMean", "c2", "f", axes=[2, 3], keepdims=0), LINEAR],
    "Squeeze": [POOL, node("Squeeze", "p axes", "f"), LINEAR],
    "MatMul": [POOL, FLAT, node("Transpose", "fc.weight", "w", perm=[1, 0]), node("MatMul", "f w", "logits")],
    "size-dependent shape": [
        POOL, node("Shape", "p", "s"), node("Slice", "s i0 i1", "n"), node("Concat", "n minus", "shape2", axis=0),
        node("Reshape", "p shape2", "f"), LINEAR,
    ],
}  # fmt: skip


@pytest.mark.parametrize("weightless", [False, True])
@pytest.mark.parametrize("name", ENDS)
def test_every_way_to_the_linear_layer_is_understood(name: str, weightless: bool) -> None:
    more = {"shape": np.array([0, -1], INT), "axes": np.array([2, 3], INT), "minus": np.array([-1], INT)}
    nodes = [*CLASSIFIER[:4], *ENDS[name]]
    frozen = freeze(graph(nodes, weightless=weightless, constants=CONSTANTS | more), weights() if weightless else {})
    assert ops(frozen)[-2:] == ["GlobalAveragePool", "Flatten"]
    expected = run(graph(nodes, constants=CONSTANTS | more), "f", IMAGE)
    np.testing.assert_allclose(features_of(frozen), expected, rtol=1e-4, atol=1e-6)


def test_a_window_that_names_its_dilations_of_1_is_one_without() -> None:
    windows = node("AveragePool", "c2", "w", kernel_shape=[2, 2], dilations=[1, 1]), node("GlobalAveragePool", "w", "p")
    model = graph([*CLASSIFIER[:4], *windows, FLAT, LINEAR], opset=19)
    np.testing.assert_allclose(features_of(freeze(model, {})), run(model, "f", IMAGE), rtol=1e-4, atol=1e-6)


def test_a_map_that_was_one_pixel_when_exported_is_pooled() -> None:
    window = node("AveragePool", "c2", "p", kernel_shape=[12, 10])
    model = graph([*CLASSIFIER[:4], window, FLAT, LINEAR])
    np.testing.assert_allclose(features_of(freeze(model, {})), run(model, "f", IMAGE), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("features", ["/r1", "r1"])
def test_a_named_node_or_tensor_is_the_end_and_a_map_is_pooled(features: str) -> None:
    model = graph()
    frozen = freeze(model, {}, features)
    assert (frozen.features, [layer.name for layer in frozen.layers]) == (4, ["conv1"])
    np.testing.assert_allclose(features_of(frozen), run(model, "r1", IMAGE).mean((2, 3)), rtol=1e-4, atol=1e-6)


def test_what_lies_behind_the_end_needs_no_weights() -> None:
    state = {name: tensor for name, tensor in weights().items() if not name.startswith("fc")}
    assert freeze(graph(weightless=True), state).features == 6


def test_constants_of_older_opsets_are_read() -> None:
    clip = node("Clip", "n1", "r1", min=0.0, max=0.5)
    model = graph([CONV1, NORM1, clip, CONV2, POOL, FLAT, LINEAR], opset=9)
    np.testing.assert_allclose(features_of(freeze(model, {})), run(model, "f", IMAGE), rtol=1e-4, atol=1e-6)


def test_missing_tensors_are_counted_and_the_first_few_named() -> None:
    with pytest.raises(UsageError, match=r"lack 6 of the 7 tensors needed: conv1.weight, bn1.weight, .*, \.\.\.$"):
        freeze(graph(weightless=True), {"conv2.weight": weights()["conv2.weight"]})


def test_tensors_of_another_network_are_refused_with_both_shapes() -> None:
    state = weights() | {"conv1.weight": np.zeros((8, 3, 3, 3), np.float32)}
    with pytest.raises(UsageError, match=r"wrong shape: conv1.weight \(8, 3, 3, 3\) instead of \(4, 3, 3, 3\)"):
        freeze(graph(weightless=True), state)


def test_weights_that_are_not_finite_are_refused() -> None:
    state = weights() | {"bn1.bias": np.array([0, np.nan, 0, 0], np.float32)}
    with pytest.raises(UsageError, match=r"not finite: bn1\.bias"):
        freeze(graph(weightless=True), state)


def test_an_unknown_end_is_answered_with_the_last_nodes() -> None:
    with pytest.raises(UsageError, match=r"--features nowhere: .* its last nodes are .*/f, /logits"):
        freeze(graph(), {}, "nowhere")


@pytest.mark.parametrize("weightless", [False, True])
@pytest.mark.parametrize(("source", "what"), [("conv1.weight", "the constant conv1.weight"), ("image", "the image")])
def test_features_that_no_backbone_made_are_refused(source: str, what: str, weightless: bool) -> None:
    model = graph([node("Identity", source, "same"), *CLASSIFIER], weightless=weightless)
    with pytest.raises(UsageError, match=f"--features same: that is {what}"):
        freeze(model, weights() if weightless else {}, features="same")
