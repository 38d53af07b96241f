"""Every rule against finite differences in float64, against torch.autograd, and in ONNX Runtime as the device runs it.

Kinks (ReLU at 0, the bounds of Clip, equal maxima of a pool) are nowhere: there a derivative is a choice, which finite
differences, taking the mean of both sides, do not share. Inputs are continuous random numbers through a conv, none of
which comes within the difference's step of a kink with these seeds.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_graphs import Conv, Net, Op, conv, finite_difference, gradients, op, relative_error

from ksm_edge.autodiff.rules import RULES
from ksm_edge.errors import UnsupportedError

INT = np.int64
A = conv("a", "image", 4, 3)
B = conv("b", "image", 4, 3, (2, 2), pads=[1, 0, 0, 1])
SCALARS = {"low": np.float32(-0.5), "high": np.float32(0.8)}

# One or more nets for each rule, by the operator's name.
RULE_NETS: dict[str, list[Net]] = {
    "Add": [
        Net([A, B, op("Add", "a b", "y")]),
        Net([A, op("Add", "a a", "y")]),
        Net([A, op("GlobalAveragePool", "a", "p"), op("Add", "p a", "y")]),
        Net([A, op("Add", "a image3", "y")], constants={"image3": np.ones((4, 1, 1), np.float32)}),
    ],
    "AveragePool": [
        Net([A, op("AveragePool", "a", "y", kernel_shape=[2, 2], strides=[2, 2])]),
        Net([A, op("AveragePool", "a", "y", kernel_shape=[3, 2])]),
        Net(
            [A, op("AveragePool", "a", "y", kernel_shape=[3, 3], strides=[2, 3], pads=[1] * 4, count_include_pad=1)],
            size=8,
        ),
    ],
    "Clip": [Net([A, op("Clip", "a low high", "y")], constants=SCALARS)],
    "Concat": [
        Net([A, B, op("Concat", "b a b", "y", axis=1)]),
        Net([A, conv("c", "image", 2, 3), op("Concat", "c a", "y", axis=1)], frozen=["c"]),
    ],
    "Flatten": [Net([A]), Net([A, op("GlobalAveragePool", "a", "p")])],
    "GlobalAveragePool": [
        Net([A, op("GlobalAveragePool", "a", "y")]),
        # Gradients still to be broadcast meet each other, a whole one, and each kind of rule.
        Net(
            [A, op("GlobalAveragePool", "a", "p"), op("GlobalAveragePool", "a", "q"), op("Concat", "p q", "y", axis=1)]
        ),
        Net([A, op("Relu", "a", "r"), op("GlobalAveragePool", "r", "y")]),
        Net([A, op("Sigmoid", "a", "r"), op("GlobalAveragePool", "r", "y")]),
        Net([A, B, op("Concat", "a b", "r", axis=1), op("GlobalAveragePool", "r", "y")]),
        Net([A, B, op("Mul", "a b", "r"), op("GlobalAveragePool", "r", "y")]),
        Net([A, op("MaxPool", "a", "r", kernel_shape=[2, 2]), op("GlobalAveragePool", "r", "y")]),
        Net([A, conv("dw", "a", 4, 1, (3, 3), 4), op("GlobalAveragePool", "dw", "y")]),
    ],
    "HardSigmoid": [
        Net([A, op("HardSigmoid", "a", "y", alpha=1 / 6, beta=0.5)], seed=2),
        Net([A, op("HardSigmoid", "a", "y")]),
    ],
    "HardSwish": [Net([A, op("HardSwish", "a", "y")], seed=1)],
    "MaxPool": [
        Net([A, op("MaxPool", "a", "y", kernel_shape=[2, 2], strides=[2, 2])]),
        Net([A, op("MaxPool", "a", "y", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)]),
        Net([A, op("MaxPool", "a", "y", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)], size=8),
    ],
    "Mul": [
        Net([A, B, op("Mul", "a b", "y")]),
        Net([A, op("Mul", "a a", "y")]),
        # Squeeze-and-excite, whose gate has a conv of its own.
        Net(
            [A, op("GlobalAveragePool", "a", "p"), conv("s", "p", 4, 4), op("Sigmoid", "s", "g"), op("Mul", "g a", "y")]
        ),
        Net([A, op("Mul", "a two", "y")], constants={"two": np.float32(2)}),
    ],
    "Pad": [
        Net(
            [A, op("Pad", "a pads none", "y", mode="constant")],
            constants={"pads": np.array([0, 1, 1, 2, 0, 2, 0, 1], INT), "none": np.float32(0)},
        ),
    ],
    "Relu": [Net([A, op("Relu", "a", "y")])],
    "Sigmoid": [Net([A, op("Sigmoid", "a", "y")])],
    "Slice": [
        Net(
            [A, op("Slice", "a starts ends axes steps", "y")],
            constants={
                "starts": np.array([1, -6], INT),
                "ends": np.array([999, 6], INT),
                "axes": np.array([2, 3], INT),
                "steps": np.array([1, 1], INT),
            },
        ),
        Net(
            [A, op("Slice", "a starts ends axes steps", "y")],
            constants={
                "starts": np.array([0, 1, 1], INT),
                "ends": np.array([4, 999, 7], INT),
                "axes": np.array([1, 2, 3], INT),
                "steps": np.array([3, 2, 3], INT),
            },
            size=8,
        ),
    ],
    "Swish": [
        Net([A, op("Sigmoid", "a", "s"), op("Mul", "a s", "y")]),
        Net([A, op("Sigmoid", "a", "s"), op("Mul", "s a", "y")]),
        # The gate has a second use: no Swish.
        Net([A, op("Sigmoid", "a", "s"), op("Mul", "s a", "z"), op("Add", "z s", "y")]),
    ],
}


def after(layer: Conv, activation: str = "Relu") -> list[Conv | Op]:
    """The layer behind another one and its activation, so that its input gradient is seen too."""
    return [
        conv("front", "image", layer.layer.groups * layer.layer.weight_shape[1], 3),
        op(activation, "front", "x"),
        layer,
    ]


POINTWISE = {
    "1x1": conv("c", "x", 5, 4),
    "1x1, stride 2": conv("c", "x", 5, 4, strides=[2, 2]),
    "1x1, stride 2 and 3": conv("c", "x", 5, 4, strides=[2, 3]),
}
TAPS = {
    "3x3": conv("c", "x", 5, 4, (3, 3), pads=[1] * 4),
    "3x3, no pads": conv("c", "x", 5, 4, (3, 3)),
    "3x3, stride 2": conv("c", "x", 5, 4, (3, 3), pads=[1] * 4, strides=[2, 2]),
    "3x3, dilation 2": conv("c", "x", 5, 4, (3, 3), pads=[2] * 4, dilations=[2, 2]),
    "3x3, dilation 2 and stride 2": conv("c", "x", 5, 4, (3, 3), pads=[1] * 4, dilations=[2, 2], strides=[2, 2]),
    "2x4, stride 2, one-sided pads": conv("c", "x", 5, 4, (2, 4), pads=[0, 1, 1, 2], strides=[2, 2]),
    "2x4, one-sided pads": conv("c", "x", 5, 4, (2, 4), pads=[0, 1, 1, 2]),
    "7x7, stride 4": conv("c", "x", 5, 4, (7, 7), pads=[3] * 4, strides=[4, 4]),
    "grouped": conv("c", "x", 6, 2, (3, 3), 2, pads=[1] * 4),
    "grouped 1x1": conv("c", "x", 6, 2, (1, 1), 2),
    "grouped, stride 2": conv("c", "x", 6, 2, (3, 3), 3, pads=[1] * 4, strides=[2, 2]),
    "depthwise with two filters a channel": conv("c", "x", 8, 1, (3, 3), 4, pads=[1] * 4),
}
PATCHES = {
    "5x1": conv("c", "x", 5, 4, (5, 1), pads=[2, 0, 2, 0]),
    "1x1 with pads": conv("c", "x", 5, 4, pads=[1] * 4),
    "2x3, stride 2, one-sided pads": conv("c", "x", 5, 4, (2, 3), pads=[0, 1, 1, 2], strides=[2, 2]),
    "3x2, dilation 2": conv("c", "x", 5, 4, (3, 2), pads=[1] * 4, dilations=[2, 2]),
}
DEPTHWISE = {
    "3x3": conv("c", "x", 4, 1, (3, 3), 4, pads=[1] * 4),
    "3x3, stride 2": conv("c", "x", 4, 1, (3, 3), 4, pads=[1] * 4, strides=[2, 2]),
    "5x5, stride 2, pads as TensorFlow has them": conv("c", "x", 4, 1, (5, 5), 4, pads=[1, 1, 2, 2], strides=[2, 2]),
    "3x3, dilation 2": conv("c", "x", 4, 1, (3, 3), 4, pads=[2] * 4, dilations=[2, 2]),
    "3x3, dilation 2 and stride 2": conv("c", "x", 4, 1, (3, 3), 4, pads=[2] * 4, dilations=[2, 2], strides=[2, 2]),
    "2x2, one-sided pads": conv("c", "x", 4, 1, (2, 2), 4, pads=[0, 1, 1, 0]),
    "3x3, pads larger than its flipped conv could have": conv("c", "x", 4, 1, (3, 3), 4, pads=[3, 0, 3, 1]),
    "3x3, no pads": conv("c", "x", 4, 1, (3, 3), 4),
    "1x5": conv("c", "x", 4, 1, (1, 5), 4, pads=[0, 2, 0, 2]),
    "3x2, other dilations along each side": conv("c", "x", 4, 1, (3, 2), 4, pads=[1, 2, 1, 1], dilations=[1, 3]),
    "2x3, other strides along each side": conv("c", "x", 4, 1, (2, 3), 4, pads=[1, 1, 0, 1], strides=[1, 2]),
}
SIZES = (7, 8)  # odd and even: with strides, one of them leaves rows that no window reaches


def conv_nets() -> dict[str, Net]:
    nets = {}
    for size in SIZES:
        for form, layers, wide in (
            ("pointwise", POINTWISE, False),
            ("taps", TAPS, False),
            ("patches", PATCHES, False),
            ("taps", DEPTHWISE, True),
            ("channel", DEPTHWISE, False),
        ):
            for name, layer in layers.items():
                nets[f"{form}: {name}, {size} pixels{' per weight' if wide else ''}"] = Net(
                    after(layer), size=size, per_weight=wide
                )
    for name, layer in {**POINTWISE, **TAPS, **PATCHES, **DEPTHWISE}.items():
        nets[f"frozen: {layer.layer.groups} groups, {name}"] = Net(after(layer), frozen=["c"])
    # One image takes the way without a transposition.
    nets |= {
        f"one image: {n}": Net(after(x), images=1)
        for n, x in (("1x1", POINTWISE["1x1"]), ("3x3", TAPS["3x3"]), ("5x1", PATCHES["5x1"]))
    }
    # What a depthwise layer leaves pending, its scale, is taken up by each kind of rule in front of it.
    for activation in ("Relu", "HardSwish", "HardSigmoid", "Sigmoid"):
        nets[f"channel scale taken by {activation}"] = Net(after(DEPTHWISE["3x3"], activation), seed=3)
    twice = [conv("front", "image", 4, 3), DEPTHWISE["3x3"], conv("d", "c", 4, 1, (3, 3), 4), conv("e", "d", 2, 4)]
    nets["channel scale taken by a conv"] = Net([twice[0], op("Add", "front front", "x"), *twice[1:]])
    nets["a depthwise conv on the image"] = Net([conv("c", "image", 3, 1, (3, 3), 3, pads=[1] * 4)])
    return nets


CONV_NETS = conv_nets()
NETS = {f"{name} {i}": net for name, nets in RULE_NETS.items() for i, net in enumerate(nets)} | CONV_NETS
every_net = pytest.mark.parametrize("net", NETS.values(), ids=NETS)


def test_every_rule_has_a_net() -> None:
    assert RULE_NETS.keys() == RULES.keys()


def test_the_conv_nets_show_each_form() -> None:
    for name, net in CONV_NETS.items():
        form = net.gradient_graph().forms["c"]
        assert form == name.partition(":")[0] or not name.startswith(("pointwise", "taps", "patches", "channel:"))


@every_net
def test_gradients_are_finite_differences_in_float64(net: Net) -> None:
    found = gradients(net, net.run_reference())
    rng = np.random.default_rng(9)
    for name, gradient in found.items():
        direction = rng.standard_normal(gradient.shape)
        expected = finite_difference(net, name, direction)
        # The difference's own error: step^2 of a third derivative of order 1, and rounding over the step.
        assert np.vdot(gradient, direction) == pytest.approx(expected, rel=1e-6, abs=1e-8), name


@every_net
@pytest.mark.torch
def test_gradients_are_those_of_autograd(net: Net) -> None:
    torch = pytest.importorskip("torch")
    import torch_oracle

    torch.set_num_threads(1)
    found = gradients(net, net.run_reference())
    feeds = net.feeds(net.gradient_graph())
    leaf = lambda array: torch.tensor(array, dtype=torch.float64, requires_grad=True)  # noqa: E731
    weights = {name: leaf(array) for name, array in net.weights.items()}
    scale = {name: leaf(array) for name, array in net.scale.items()}
    head = [leaf(feeds["head:weight"]), leaf(feeds["head:bias"])]
    ran = dict(weights)
    for layer, form in net.gradient_graph().forms.items():
        if form == "channel":
            ran[f"{layer}.weight"] = weights[f"{layer}.weight"] * scale[layer][:, None, None, None]
    features = torch_oracle.run(net.model, ran, torch.tensor(net.image))
    logits = features @ head[0].T + head[1]
    loss = -(torch.tensor(net.target) * torch.log_softmax(logits, 1)).sum()
    loss.backward()
    leaves = (
        weights | {f"{name}.scale": s for name, s in scale.items()} | {"head:weight": head[0], "head:bias": head[1]}
    )
    for name, gradient in found.items():
        # 1e-7: attributes such as HardSwish's 1/6 are float32 in any ONNX file.
        assert relative_error(gradient, leaves[name].grad.numpy()) < 1e-7, name


@every_net
def test_onnx_runtime_agrees_with_the_reference(net: Net) -> None:
    expected = net.run_reference()
    found = net.run_onnxruntime()
    for name, array in expected.items():
        assert found[name].shape == array.shape, name
        assert relative_error(found[name], array) < 1e-4, name


def test_an_operator_without_a_rule_is_named_with_its_node_and_with_what_there_is() -> None:
    net = Net([A, op("Softplus", "a", "y")])
    with pytest.raises(UnsupportedError, match=r"operator Softplus \(node /y\)") as caught:
        net.gradient_graph()
    for name in [*RULES, "Conv"]:
        assert name in str(caught.value)


@pytest.mark.parametrize("attributes", [{"pads": [1] * 4}, {"ceil_mode": 1}])
def test_an_average_pool_whose_windows_differ_is_refused_with_what_to_do(attributes: dict[str, object]) -> None:
    net = Net([A, op("AveragePool", "a", "y", kernel_shape=[2, 2], strides=[2, 2], **attributes)])
    with pytest.raises(UnsupportedError, match=r"AveragePool /y: .*count_include_pad=1"):
        net.gradient_graph()


def test_rules_and_forms_know_nothing_of_masks() -> None:
    import ksm_edge.autodiff

    sources = Path(ksm_edge.autodiff.__file__).parent.glob("*.py")
    assert not [s.name for s in sources if "ksm_edge.mask" in s.read_text() or "ksm_edge.training" in s.read_text()]
