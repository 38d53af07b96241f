"""The bundle that comes with the package: small, whole, and what its manifest says."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ksm_edge.bundle.golden import TOLERANCE, golden_images, read_golden, relative_error
from ksm_edge.bundle.layers import Bundle
from ksm_edge.bundle.load import load_bundle
from ksm_edge.bundle.plain import golden_features

LIMIT_BYTES = 2 << 20


@pytest.fixture(scope="module")
def embedded() -> Bundle:
    return load_bundle("embedded")


def test_the_embedded_bundle_is_at_most_2_mib(embedded: Bundle) -> None:
    files = ("weights.safetensors", "backbone.onnx", "manifest.json", "README.md")
    assert sum((embedded.path / name).stat().st_size for name in files) <= LIMIT_BYTES


def test_the_embedded_backbone_gives_its_golden_features(embedded: Bundle) -> None:
    manifest = json.loads((embedded.path / "manifest.json").read_text())
    features = golden_features(embedded.graph_path, embedded.layers, embedded.weights, embedded.input)
    assert features.shape == (len(golden_images(embedded.input)), embedded.features)
    assert relative_error(features, read_golden(manifest["golden"])) <= TOLERANCE


def test_the_embedded_backbone_takes_96_pixel_images_and_has_batch_norm_everywhere(embedded: Bundle) -> None:
    assert (embedded.input.size, embedded.features) == (96, 512)
    assert all(layer.has_norm for layer in embedded.layers)


def test_the_embedded_features_are_alive_and_tell_images_apart(embedded: Bundle) -> None:
    features = golden_features(embedded.graph_path, embedded.layers, embedded.weights, embedded.input)
    assert (features > 0).any(axis=0).mean() > 0.5
    assert not np.allclose(features[0], features[1], rtol=0.1)


def test_the_manifest_and_the_readme_say_where_the_embedded_weights_come_from(embedded: Bundle) -> None:
    source = json.loads((embedded.path / "manifest.json").read_text())["source"]
    readme = (embedded.path / "README.md").read_text()
    assert {"script", "data", "seed", "steps", "test_accuracy", "digits_linear_probe"} <= set(source)
    for text in (
        "Omniglot",
        "MIT",
        "Caltech-101",
        "CC BY 4.0",
        "TrashNet",
        "MobileNetV2",
        "Apache-2.0",
        source["script"],
    ):
        assert text in readme
    for name, accuracy in source["test_accuracy"].items():
        assert f"| {name} |" in readme
        assert f"{accuracy:.1%}".replace("%", " %") in readme
    assert f"{source['digits_linear_probe']:.1%}".replace("%", " %") in readme
