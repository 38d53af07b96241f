"""The tiny backbone, and the images of a small task."""

from __future__ import annotations

import pytest
from shapes import make_shapes
from tiny import saved_tiny_bundle

from ksm_edge.bundle.layers import Bundle
from ksm_edge.data.image_set import ImageSet, open_image_set


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return saved_tiny_bundle(tmp_path_factory.mktemp("backbone") / "bundle")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    return open_image_set(make_shapes(tmp_path_factory.mktemp("data") / "shapes"))
