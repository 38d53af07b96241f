"""The recipes that come with the project, each made into a bundle without torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from ksm_edge.bundle.freeze import Frozen
from ksm_edge.bundle.layers import InputContract
from ksm_edge.bundle.make import freeze_recipe, read_onnx, save_bundle
from ksm_edge.bundle.plain import plain_features, plain_weights
from ksm_edge.bundle.recipe import at_size, load_recipe, recipe_names
from ksm_edge.bundle.statedict import read_state_dict
from ksm_edge.errors import DamagedFileError, UsageError

# Conv layers, kernels and features of each backbone.
COUNTS = {
    "efficientnet_b0": (81, 3_782_368, 1280),
    "efficientnet_lite0": (49, 3_155_168, 1280),
    "mobilenet_v2": (52, 2_131_904, 1280),
    "mobilenet_v3_large": (62, 2_855_496, 960),
    "mobilenet_v3_small": (52, 855_496, 576),
    "resnet18": (20, 1_392_832, 512),
    "resnet20_cifar10": (19, 29_744, 64),
    "resnet50": (53, 13_385_920, 2048),
    "squeezenet1_1": (25, 226_496, 512),
    "vgg16_bn": (13, 1_634_496, 512),
}
# Trained parameters of the whole classifier, as its makers publish them. VGG's graph lacks its hidden Linear layers.
PARAMETERS = {
    "efficientnet_b0": 5_288_548,
    "efficientnet_lite0": 4_652_008,
    "mobilenet_v2": 3_504_872,
    "mobilenet_v3_large": 5_483_032,
    "mobilenet_v3_small": 2_542_856,
    "resnet18": 11_689_512,
    "resnet20_cifar10": 269_722,
    "resnet50": 25_557_032,
    "squeezenet1_1": 1_235_496,
}

WITHOUT_ADDRESS = {"efficientnet_lite0"}  # in a package, which pip fetches


def zeros(name: str) -> dict[str, np.ndarray]:
    """A state dict of the right shapes, read off the weightless graph."""
    asked = onnx.load(load_recipe(name).graph_path).graph.input
    shapes = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in asked}
    return {key: np.zeros(shape, np.float32) for key, shape in shapes.items() if key != "image"}


def test_the_project_brings_these_recipes() -> None:
    assert recipe_names() == sorted(COUNTS)


@pytest.mark.parametrize("name", COUNTS)
def test_layers_kernels_and_features_are_those_known(name: str) -> None:
    frozen = freeze_recipe(load_recipe(name), zeros(name))
    shapes = [layer.weight_shape for layer in frozen.layers]
    assert (len(shapes), sum(O * I for O, I, _, _ in shapes), frozen.features) == COUNTS[name]


CONV_WEIGHTS = {"resnet18": 11_166_912, "resnet50": 23_454_912, "vgg16_bn": 14_710_464}


@pytest.mark.parametrize("name", CONV_WEIGHTS)
def test_conv_weights_are_those_known(name: str) -> None:
    layers = freeze_recipe(load_recipe(name), zeros(name)).layers
    assert sum(int(np.prod(layer.weight_shape)) for layer in layers) == CONV_WEIGHTS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_graph_asks_for_every_published_parameter(name: str) -> None:
    trained = {key: tensor.size for key, tensor in zeros(name).items() if ".running_" not in key}
    assert sum(trained.values()) == PARAMETERS[name]


@pytest.mark.parametrize("name", COUNTS)
def test_a_recipe_says_where_its_weights_come_from_and_how_to_know_them(name: str) -> None:
    recipe = load_recipe(name)
    assert (recipe.download is None) == (name in WITHOUT_ADDRESS)
    first = recipe.download or recipe.weights[0]
    assert len(first.digits) >= 8
    assert recipe.source_of(first.digits + "0" * 56) is first
    assert all(source.licence and source.source for source in recipe.weights)
    assert first.top1 is not None
    assert 0.5 < first.top1 < 1
    assert (first.measured_by or "").startswith("https://")


def test_only_squeezenet_lacks_batch_norm() -> None:
    layers = {name: freeze_recipe(load_recipe(name), zeros(name)).layers for name in COUNTS}
    assert [name for name in COUNTS if not any(layer.has_norm for layer in layers[name])] == ["squeezenet1_1"]


def test_weightless_graphs_hold_no_weights() -> None:
    for name in COUNTS:
        path = load_recipe(name).graph_path
        assert path.stat().st_size < 70_000
        assert not onnx.load(path).graph.initializer


def features_of(frozen: Frozen, images: np.ndarray) -> np.ndarray:
    return plain_features(frozen.model.SerializeToString(), plain_weights(frozen.layers, frozen.weights), images)


def test_real_mobilenet_v2_names_what_is_in_real_photos(shared_data: Path) -> None:
    from PIL import Image

    from ksm_edge.data.image import to_input

    state = read_state_dict(shared_data / "mobilenet_v2_imagenet.safetensors")
    recipe = load_recipe("mobilenet_v2")
    frozen = freeze_recipe(recipe, state)
    folder = sanity_images(shared_data, 20)
    images = np.stack([to_input(Image.open(data).convert("RGB"), recipe.input) for data, _ in folder])
    logits = features_of(frozen, images) @ state["classifier.1.weight"].T + state["classifier.1.bias"]
    right = (logits.argmax(1) == [label for _, label in folder]).sum()
    assert right >= 15  # 167 of all 200


def sanity_images(shared_data: Path, n: int) -> list:
    """(JPEG, class index) of the first n check images."""
    import csv
    import io
    import zipfile

    with zipfile.ZipFile(shared_data / "imagenet_sanity.zip") as archive:
        table = csv.DictReader(io.StringIO(archive.read("labels.csv").decode()))
        rows = [row for row, _ in zip(table, range(n), strict=False)]
        return [(io.BytesIO(archive.read(row["file"])), int(row["class_index"])) for row in rows]


def test_real_resnet20_becomes_a_bundle_that_knows_its_licence(shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "resnet20_cifar10.safetensors"
    recipe = load_recipe("resnet20_cifar10")
    bundle = save_bundle(
        freeze_recipe(recipe, read_state_dict(path)), tmp_path / "b", recipe=recipe.name, input_contract=recipe.input
    )
    assert (bundle.features, bundle.input.size) == (64, 32)


def test_an_unknown_recipe_is_answered_with_those_there_are() -> None:
    with pytest.raises(UsageError, match=r"no recipe 'mobilnet'; there are efficientnet_b0, .* ending in \.toml"):
        load_recipe("mobilnet")


@pytest.mark.parametrize(
    "change",
    [
        ("size = 224", "size = 300"),
        ("title", "titel"),
        ("[input]", "[inptu]"),
        ("size =", "size"),
        ("url =", "address ="),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, change: tuple[str, str]) -> None:
    text = (load_recipe("resnet18").graph_path.parent / "resnet18.toml").read_text()
    (tmp_path / "own.toml").write_text(text.replace(*change))
    with pytest.raises(UsageError):
        load_recipe(tmp_path / "own.toml")


def test_a_recipe_of_ones_own_lies_beside_its_graph(tmp_path: Path) -> None:
    source = load_recipe("resnet18").graph_path
    (tmp_path / "own.toml").write_text(source.with_suffix(".toml").read_text())
    (tmp_path / source.name).write_bytes(source.read_bytes())
    assert load_recipe(tmp_path / "own.toml").graph_path == tmp_path / "resnet18.onnx"


def test_another_size_keeps_the_crop() -> None:
    contract = InputContract(224, 256, (0, 0, 0), (1, 1, 1))
    assert at_size(contract, 96) == InputContract(96, 110, (0, 0, 0), (1, 1, 1))
    with pytest.raises(UsageError, match="must be positive"):
        at_size(contract, 0)


def test_the_head_may_be_missing_and_another_end_may_be_named() -> None:
    state = {name: tensor for name, tensor in zeros("mobilenet_v2").items() if not name.startswith("classifier")}
    assert freeze_recipe(load_recipe("mobilenet_v2"), state).features == 1280
    with pytest.raises(UsageError, match="no node or tensor of that name"):
        freeze_recipe(load_recipe("mobilenet_v2"), state, "/features/nowhere")


@pytest.mark.parametrize("content", [b"", b"not protobuf at all", b"\x00" * 64])
def test_a_file_that_is_no_onnx_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.onnx").write_bytes(content)
    with pytest.raises(UsageError, match="not an ONNX file"):
        read_onnx(tmp_path / "x.onnx")


def test_a_state_dict_that_is_not_there_or_damaged_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        read_state_dict(tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(DamagedFileError, match="not a whole safetensors file"):
        read_state_dict(tmp_path / "w.safetensors")
