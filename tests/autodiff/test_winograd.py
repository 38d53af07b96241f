"""3x3 convs by Winograd's F(4x4, 3x3): the same results and gradients as by convs, whatever the geometry."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_graphs import Conv, Net, Op, conv, op, relative_error, transformed
from test_fast_forms import SETTINGS, errors, steps
from whole_network import random_bundle

from ksm_edge import native
from ksm_edge.autodiff import tiles, winograd
from ksm_edge.autodiff.tiles import KERNEL, transform_into
from ksm_edge.bundle.layers import Bundle
from ksm_edge.training.settings import Settings
from ksm_edge.training.trainer import gradient_spec

pytestmark = pytest.mark.skipif(native.operators is None, reason="installed without a C compiler")

# Of the largest; a conv's own sums are exact to a tenth of that.
LIMIT = 3e-5


@pytest.fixture(autouse=True)
def however_few_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "FEWEST_TILES", 1)


def two_convs(**attributes: object) -> list[Conv | Op]:
    return [
        conv("stem", "image", 6, 3),
        conv("first", "stem", 5, 6, (3, 3), **attributes),
        op("Relu", "first", "first_y"),
        conv("second", "first_y", 7, 5, (3, 3), pads=[1, 1, 1, 1]),
    ]


def assert_as_by_convs(net: Net, made: set[str]) -> None:
    """float32 in tiles, held to float64 by convs; of products what masks feel: summed over the kernel, times W."""
    expected, found = dict(net.run_reference()), net.run_onnxruntime()
    forms = net.gradient_graph(np.float32).forms
    assert {name for name, form in forms.items() if form == "winograd"} == made
    for name in made:
        weight = net.weights[f"{name}.weight"].reshape(*net.weights[f"{name}.weight"].shape[:2], 9)
        expected[f"{name}.product"] = sum(weight[:, :, k] * expected.pop(f"{name}.product.{k}") for k in range(9))
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        assert relative_error(found[name], array) < LIMIT, name


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("size", [4, 7, 8, 13, 33, 70])  # less than a register, and more than one, of tiles in a row
@pytest.mark.parametrize("pads", [[1, 1, 1, 1], [0, 0, 0, 0], [2, 2, 2, 2], [0, 1, 2, 0], [2, 0, 0, 1]], ids=str)
def test_gradients_are_the_same_for_every_geometry(size: int, pads: list[int]) -> None:
    assert_as_by_convs(Net(two_convs(pads=pads), size=size, own=True), {"first", "second"})


@pytest.mark.usefixtures("loops")
def test_products_of_more_kernels_than_a_part_of_the_work_and_its_registers_hold() -> None:
    nodes = [conv("stem", "image", 33, 3), conv("first", "stem", 17, 33, (3, 3), pads=[1, 1, 1, 1])]
    assert_as_by_convs(Net(nodes, size=9, own=True), {"first"})


@pytest.mark.parametrize("size", [(64, 48), (5, 3)], ids=str)
def test_weights_by_tiles_are_made_without_a_library_that_counts_cores(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(np, "matmul", None)
    weight, mask = np.ones((*size, 3, 3), np.float32), np.ones(size, np.float32)
    transform_into(found := np.empty((36, *size), np.float32), weight, mask)
    np.testing.assert_allclose(found, transformed(weight.astype(float)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("block", [1, 10, 35])
def test_weights_by_tiles_are_the_same_in_blocks(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    weight, mask = rng.standard_normal((8, 5, 3, 3)).astype(np.float32), rng.random((8, 5)).astype(np.float32)
    found, whole = np.empty((2, 36, 8, 5), np.float32)
    transform_into(whole, weight, mask)
    monkeypatch.setattr(tiles, "BLOCK", block)
    transform_into(found, weight, mask)
    np.testing.assert_array_equal(found, whole)


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("threads", [1, 2])
def test_gradients_are_the_same_for_several_images_and_threads(images: int, threads: int) -> None:
    nodes = two_convs(pads=[1, 1, 1, 1])
    assert_as_by_convs(Net(nodes, size=19, images=images, own=True, threads=threads), {"first", "second"})


@pytest.mark.parametrize(
    "changes",
    [
        {"strides": [2, 2], "pads": [1, 1, 1, 1]},
        {"dilations": [2, 2], "pads": [2, 2, 2, 2]},
        {"pads": [3, 3, 3, 3]},  # more than the kernel reaches
    ],
    ids=str,
)
def test_other_geometries_stay_convs(changes: dict[str, list[int]]) -> None:
    assert_as_by_convs(Net(two_convs(**changes), size=16, own=True), {"second"})


@pytest.mark.parametrize(
    "change",
    [
        {"frozen": ["first", "second"]},
        {"per_weight": True},
        {"tile_bytes": 0},
        {"own": False},
    ],
    ids=str,
)
def test_where_more_or_less_is_wanted_than_a_masks_gradient_they_stay_convs(change: dict[str, object]) -> None:
    net = Net(two_convs(), **{"own": True, **change})  # type: ignore[arg-type]
    assert "winograd" not in net.gradient_graph(np.float32).forms.values()


def test_large_weights_and_few_tiles_stay_convs(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = 4 * 36 * 6 * 5
    for tile_bytes, fewest in ((whole - 1, 1), (whole, 7)):
        monkeypatch.setattr(winograd, "FEWEST_TILES", fewest)
        # 7 x 7 pixels are 2 x 3 tiles, the last one of each row counted.
        net = Net(two_convs(pads=[1, 1, 1, 1]), own=True, tile_bytes=tile_bytes)
        assert net.gradient_graph(np.float32).forms["first"] == "taps"


def test_a_kernel_there_is_what_makes_a_conv() -> None:
    """In one dimension, where it can be written down: y = A' (G w . B' d)."""
    back = np.array([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]])
    into = np.array(
        [[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0], [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0],
         [0, 4, 0, -5, 0, 1]]
    )  # fmt: skip
    rng = np.random.default_rng(0)
    w, d = rng.standard_normal(3), rng.standard_normal(6)
    np.testing.assert_allclose(back @ ((KERNEL @ w) * (into @ d)), np.correlate(d, w), rtol=1e-12)
    W, mask = rng.standard_normal((4, 5, 3, 3)).astype(np.float32), rng.random((4, 5)).astype(np.float32)
    found = np.empty((36, 4, 5), np.float32)
    transform_into(found, W, mask)
    expected = transformed((W * mask[:, :, None, None]).astype(float))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module", params=["resnet18", "resnet20_cifar10", "vgg16_bn"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return random_bundle(request.param, 64, tmp_path_factory.mktemp(request.param))


def test_a_batchs_own_statistics_keep_convs(bundle: Bundle) -> None:
    by_tiles = {s: gradient_spec(bundle, 3, Settings(statistics=s), 2).tile_bytes for s in ("frozen", "batch")}
    assert by_tiles == {"frozen": 2**22, "batch": 0}


@pytest.mark.parametrize("changes", [{}, {"granularity": "group:3"}, {"granularity": "channel"}], ids=str)
def test_whole_networks_have_the_same_gradients(changes: dict[str, str], bundle: Bundle, tmp_path: Path) -> None:
    by_convs, by_tiles = (
        steps(bundle, tmp_path / str(most), replace(SETTINGS, **changes), tile_bytes=most) for most in (0, 2**22)
    )
    # One of a hundred thousand ReLUs that is given next to nothing may let through what it did not before, and then
    # all in front of it differs, by up to some hundredths: not for each of five draws of images.
    worst = [max(errors(one, other).values()) for one, other, _ in zip(by_convs, by_tiles, range(5), strict=False)]
    assert min(worst) < 1e-5
