"""What a frozen graph cannot hold is refused by node and operator, with what to do."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from incoming_nets import CLASSIFIER, CONV1, CONV2, FLAT, LINEAR, NORM1, POOL, RELU1, graph, node, weights

from ksm_edge.bundle.freeze import freeze
from ksm_edge.errors import KsmEdgeError, UnsupportedError, UsageError

TWO = {"two": np.array([2.0], np.float32)}


def refused(nodes: list, match: str, kind: type[KsmEdgeError] = UnsupportedError, **more: object) -> None:
    with pytest.raises(kind, match=match):
        freeze(graph(nodes, **more), {})


def test_an_unsupported_operator_is_named_with_its_node_the_supported_ones_and_what_to_do() -> None:
    nodes = [CONV1, NORM1, node("LeakyRelu", "n1", "r1"), CONV2, POOL, FLAT, LINEAR]
    refused(
        nodes, r"node '/r1' \(LeakyRelu\): LeakyRelu is not supported; supported are Add, .*Sum\. Replace .*--features"
    )


def test_an_operator_behind_the_end_does_no_harm() -> None:
    assert freeze(graph([*CLASSIFIER, node("Softmax", "logits", "probabilities")]), {}).features == 6


def test_batch_norm_in_front_of_a_conv_is_refused() -> None:
    norm = node("BatchNormalization", "r0 bn1.weight bn1.bias bn1.running_mean bn1.running_var", "r1")
    nodes = [CONV1, node("Relu", "c1", "r0"), norm, CONV2, POOL, FLAT, LINEAR]
    refused(nodes, r"node '/r1' \(BatchNormalization\) is not directly behind a Conv")


def test_a_second_batch_norm_behind_the_first_is_refused() -> None:
    norm = node("BatchNormalization", "n1 bn1.weight bn1.bias bn1.running_mean bn1.running_var", "r1")
    refused([CONV1, NORM1, norm, CONV2, POOL, FLAT, LINEAR], "not directly behind a Conv")


def test_batch_norm_of_a_conv_that_something_else_reads_is_refused() -> None:
    nodes = [CONV1, NORM1, node("Add", "n1 c1", "r1"), CONV2, POOL, FLAT, LINEAR]
    refused(nodes, r"output of its Conv conv1 is used elsewhere")


def test_a_weight_that_two_convs_share_is_refused() -> None:
    tensors = weights() | {"conv1.weight": np.ones((3, 3, 1, 1), np.float32)}
    convs = [node("Conv", "image conv1.weight", "a"), node("Conv", "a conv1.weight", "b")]
    nodes = [*convs, node("GlobalAveragePool", "b", "p"), FLAT, LINEAR]
    refused(nodes, r"node '/b' \(Conv\): its weight 'conv1.weight' is used by another Conv", tensors=tensors)


def test_a_conv_whose_weight_depends_on_the_image_is_refused() -> None:
    nodes = [node("Relu", "image", "w"), node("Conv", "image w", "c2"), POOL, FLAT, LINEAR]
    refused(nodes, r"its weight 'w' is computed by the graph")


def test_a_net_without_a_linear_layer_asks_for_its_end() -> None:
    refused([CONV1, NORM1, RELU1, CONV2, POOL], r"no Linear layer .* name the node they end at .* r1 .* or p ")


def test_a_linear_layer_inside_the_backbone_is_refused() -> None:
    nodes = [CONV1, node("GlobalAveragePool", "c1", "g"), node("Flatten", "g", "h"), node("Gemm", "h sq", "s"),
             node("Unsqueeze", "s axes", "t"), node("Mul", "c1 t", "r1"), CONV2, POOL, FLAT, LINEAR]  # fmt: skip
    constants = {"sq": np.eye(4, dtype=np.float32), "axes": np.array([2, 3])}
    refused(nodes, r"'/s' \(Gemm\) is a Linear layer in front of node '/c2' \(Conv\).*1x1 Conv", constants=constants)


def test_a_flattened_map_names_the_map_to_end_at() -> None:
    tensors = weights() | {"fc.weight": np.zeros((2, 6 * 49), np.float32)}
    nodes = [*CLASSIFIER[:4], node("Flatten", "c2", "f"), LINEAR]
    refused(nodes, r"node '/f' \(Flatten\) flattens a feature map .* --features 'c2'", tensors=tensors)


def test_normalisation_inside_the_graph_belongs_into_the_input_contract() -> None:
    nodes = [node("Mul", "image two", "i"), node("Conv", "i conv1.weight", "c1"), *CLASSIFIER[1:]]
    refused(nodes, r"node '/i' \(Mul\) takes the constant 'two' .* --mean and --std", constants=TWO)


@pytest.mark.parametrize("op", ["Sub", "Div"])
def test_so_does_normalisation_by_operators_that_are_not_supported(op: str) -> None:
    nodes = [node(op, "image two", "i"), node("Conv", "i conv1.weight", "c1"), *CLASSIFIER[1:]]
    refused(nodes, rf"node '/i' \({op}\): {op} is not supported. It takes the constant 'two' .*--std", constants=TWO)


def test_a_second_input_is_told_from_a_constant() -> None:
    model = graph([CONV1, NORM1, RELU1, CONV2, POOL, node("Concat", "p place", "q", axis=1), node("Flatten", "q", "f"),
                   LINEAR])  # fmt: skip
    model.graph.input.append(onnx.helper.make_tensor_value_info("place", onnx.TensorProto.FLOAT, ["N", 2, 1, 1]))
    with pytest.raises(UnsupportedError, match=r"\(Concat\) takes the graph's input 'place'; a backbone has one"):
        freeze(model, {})


@pytest.mark.parametrize("opset", [9, 13])
def test_batch_norm_in_training_mode_as_older_opsets_say_it_is_refused(opset: int) -> None:
    norm = node("BatchNormalization", "c1 bn1.weight bn1.bias bn1.running_mean bn1.running_var", "n1")
    norm.output.extend(["mean", "var", "saved_mean", "saved_var"])
    refused([CONV1, norm, *CLASSIFIER[2:]], "is in training mode", opset=opset)


@pytest.mark.parametrize("rest", ["two2 two2 minus minus", "four"])
def test_a_reshape_to_more_axes_is_refused_also_where_the_number_of_images_is_computed(rest: str) -> None:
    nodes = [CONV1, NORM1, RELU1, node("Shape", "image", "s"), node("Gather", "s zero", "n"),
             node("Concat", f"n {rest}", "target", axis=0), node("Reshape", "r1 target", "x"),
             node("Conv", "x conv2.weight", "c2"), POOL, FLAT, LINEAR]  # fmt: skip
    constants = {
        "zero": np.array([0]),
        "two2": np.array([2]),
        "minus": np.array([-1]),
        "four": np.array([2, 2, -1, -1]),
    }
    refused(nodes, r"'/x' \(Reshape\): only a Reshape of pooled features", constants=constants)


@pytest.mark.parametrize(
    ("geometry", "is_refused"),
    [
        ({"kernel_shape": [1, 1], "strides": [2, 2]}, True),
        ({"kernel_shape": [2, 2], "strides": [2, 2], "pads": [1, 1, 1, 1]}, True),
        ({"kernel_shape": [2, 2], "strides": [2, 2], "pads": [0, 0, 0, 1]}, True),
        ({"kernel_shape": [2, 2], "strides": [2, 2], "pads": [1, 1, 0, 0]}, False),
        ({"kernel_shape": [2, 2], "strides": [2, 2], "pads": [1, 1, 1, 1], "dilations": [2, 2]}, False),
        ({"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}, False),
    ],
)
def test_a_max_pool_whose_last_window_may_begin_outside_is_refused(geometry: dict, is_refused: bool) -> None:
    window = node("MaxPool", "c1", "x", ceil_mode=1, **geometry)
    nodes = [CONV1, window, node("Conv", "x conv2.weight", "c2"), POOL, FLAT, LINEAR]
    if is_refused:
        refused(nodes, r"\(MaxPool\): with ceil_mode, and strides and pads larger")
    else:
        assert freeze(graph(nodes), {}).features == 6


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (node("Concat", "r1 r1", "x", axis=2), "only feature maps joined along their channels"),
        (node("ReduceMean", "r1", "x", axes=[1]), "only the mean over height and width"),
        (node("Pad", "r1 pads", "x", mode="reflect"), "only padding with the constant 0"),
        (node("Clip", "r1 pads", "x"), "its min has 8 elements; one is supported"),
        (node("Reshape", "r1 pads", "x"), "only a Reshape of pooled features"),
        (node("Conv", "r1 conv3.weight", "x", auto_pad="SAME_UPPER", strides=[2, 2]), "pads by the image's size"),
    ],
)
def test_a_form_that_is_not_supported_says_which_is(bad: object, match: str) -> None:
    constants = {"pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "conv3.weight": np.ones((4, 4, 3, 3), np.float32)}
    nodes = [CONV1, NORM1, RELU1, bad, node("Conv", "x conv2.weight", "c2"), POOL, FLAT, LINEAR]
    refused(nodes, match, constants=constants)


def test_a_conv_that_does_not_fit_its_input_is_refused() -> None:
    nodes = [node("Conv", "image conv2.weight", "c2"), POOL, FLAT, LINEAR]
    refused(nodes, r"weight \(6, 4, 1, 1\) with 1 groups does not fit 3 channels", UsageError)


def test_a_graph_of_two_images_is_refused() -> None:
    model = graph()
    model.graph.input.append(model.graph.input[0])
    model.graph.input[-1].name = "second"
    with pytest.raises(UsageError, match=r"2 inputs of the shape \(N, 3, H, W\) \(image, second\)"):
        freeze(model, {})


def test_a_backbone_without_a_conv_is_refused() -> None:
    nodes = [node("GlobalAveragePool", "image", "p"), FLAT, LINEAR]
    refused(nodes, "no Conv lies between the image and 'f'", UsageError)


@pytest.mark.parametrize("uneven", [{"pads": [1, 1, 1, 1]}, {"ceil_mode": 1}])
def test_an_average_over_windows_of_several_sizes_is_refused_before_anybody_trains_on_it(uneven: dict) -> None:
    window = node("AveragePool", "c1", "x", kernel_shape=[2, 2], **uneven)
    refused(
        [CONV1, window, node("GlobalAveragePool", "x", "p"), FLAT, LINEAR],
        r"\(AveragePool\): its windows differ in size",
    )
