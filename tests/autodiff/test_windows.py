"""What taps meet, and the gradient of max pools, by operators of this project: as by standard ones."""

from __future__ import annotations

import numpy as np
import pytest
from small_graphs import Net, Op, conv, op, relative_error

from ksm_edge import native

pytestmark = pytest.mark.skipif(native.operators is None, reason="installed without a C compiler")

LIMIT = 3e-5  # of the largest: sums over many pixels in float32

CONVS = {
    "1x1, every second pixel": {"kernel": (1, 1), "strides": [2, 2]},
    "1x1, every third column": {"kernel": (1, 1), "strides": [1, 3]},
    "padded": {"kernel": (5, 5), "pads": [2, 2, 2, 2]},
    "every second pixel, padded": {"kernel": (3, 3), "strides": [2, 2], "pads": [1, 1, 1, 1]},
    "unevenly padded": {"kernel": (3, 5), "strides": [2, 1], "pads": [0, 3, 2, 1]},
    "apart": {"kernel": (3, 3), "strides": [1, 2], "dilations": [2, 3], "pads": [2, 2, 2, 3]},
    "more padding than kernel": {"kernel": (3, 3), "strides": [3, 3], "pads": [4, 4, 4, 4]},
    "all that there is": {"kernel": (7, 7)},
}
POOLS = {
    "halves": {"kernel_shape": [2, 2], "strides": [2, 2]},
    "overlap": {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]},
    "the last reaches past the end": {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1},
    "each pixel": {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]},
    "apart": {"kernel_shape": [2, 3], "strides": [1, 3], "dilations": [2, 2], "pads": [1, 0, 0, 2]},
    "gaps": {"kernel_shape": [1, 2], "strides": [3, 4]},
}


def assert_same(net: Net, operators: set[str]) -> None:
    """float32 by these operators, held to float64 by standard ones."""
    model = net.gradient_graph(np.float32).model
    assert {node.op_type for node in model.graph.node} & {"Windows", "MaxPoolGradient"} == operators
    expected, found = net.run_reference(), net.run_onnxruntime()
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        assert relative_error(found[name], array) < LIMIT, name


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("channels", [3, 5], ids=["all taps at once", "tap by tap"])
@pytest.mark.parametrize("size", [7, 12, 41])
@pytest.mark.parametrize("name", CONVS)
def test_products_are_the_same_for_every_geometry(name: str, size: int, channels: int) -> None:
    attributes = dict(CONVS[name])
    kernel = attributes.pop("kernel")
    nodes = [conv("first", "image", channels, 3), conv("second", "first", 4, channels, kernel, **attributes)]
    assert_same(Net(nodes, size=size, own=True), {"Windows"})


def pooled(**attributes: object) -> list[Op]:
    # Of many windows nothing is left but zeros: the first of them wins.
    return [conv("first", "image", 5, 3), op("Relu", "first", "y"), op("MaxPool", "y", "pool", **attributes),
            conv("last", "pool", 4, 5)]  # fmt: skip


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("size", [7, 12, 41])
@pytest.mark.parametrize("name", POOLS)
def test_gradients_of_max_pools_are_the_same_for_every_geometry(name: str, size: int) -> None:
    assert_same(Net(pooled(**POOLS[name]), size=size, own=True), {"MaxPoolGradient"})


@pytest.mark.parametrize("threads", [1, 2])
def test_several_images_and_threads(threads: int) -> None:
    nodes = [*pooled(**POOLS["overlap"])[:-1], conv("last", "pool", 4, 5, (3, 3), strides=[2, 2], pads=[1, 1, 1, 1])]
    assert_same(Net(nodes, size=23, images=3, own=True, threads=threads), {"Windows", "MaxPoolGradient"})


def test_pools_write_no_indices() -> None:
    model = Net(pooled(**POOLS["overlap"]), own=True).gradient_graph(np.float32).model
    (pool,) = (node for node in model.graph.node if node.op_type == "MaxPool")
    assert len(pool.output) == 1
