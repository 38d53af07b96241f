"""The self-test: the same images on every machine, and an error when the features are not those stored."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from incoming_nets import graph

from ksm_edge.bundle import manifest, plain
from ksm_edge.bundle.freeze import freeze
from ksm_edge.bundle.golden import golden_images, golden_pixels, read_golden
from ksm_edge.bundle.layers import InputContract
from ksm_edge.bundle.make import save_bundle
from ksm_edge.errors import DamagedFileError

CONTRACT = InputContract(24, 24, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def test_golden_images_never_change() -> None:
    digests = {size: hashlib.sha256(golden_pixels(size).tobytes()).hexdigest()[:16] for size in (32, 224)}
    assert digests == {32: "a65ececad5b5ca79", 224: "ab6e0b7887d7b83d"}


def test_golden_images_are_smooth_normalised_and_differ() -> None:
    images = golden_images(CONTRACT)
    assert (images.shape, images.dtype) == ((2, 3, 24, 24), np.float32)
    assert images.min() >= -2
    assert images.max() <= 2
    assert images.std() > 0.5
    assert np.abs(np.diff(images, axis=3)).mean() < images.std() / 2
    assert not np.array_equal(images[0], images[1])


@pytest.mark.parametrize("size", [1, 2, 9, 10])
def test_the_smallest_images_can_be_made(size: int) -> None:
    assert golden_pixels(size).shape == (2, 3, size, size)


def test_a_bundle_answers_its_golden_images(tmp_path: Path) -> None:
    bundle = save_bundle(freeze(graph(), {}), tmp_path / "b", recipe="small", input_contract=CONTRACT)
    stored = read_golden(manifest.read_manifest(bundle.path / manifest.NAME)["golden"])
    assert stored.shape == (2, bundle.features)
    assert plain.check_golden(bundle) == 0
    assert bundle.feature_sum == pytest.approx(np.abs(stored).sum() / 2)


def test_other_features_are_refused_with_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = save_bundle(freeze(graph(), {}), tmp_path / "b", recipe="small", input_contract=CONTRACT)
    right = plain.golden_features
    monkeypatch.setattr(plain, "golden_features", lambda *args: right(*args) * np.float32(1.001))
    with pytest.raises(DamagedFileError, match=r"differ by 1\.0e-03 .*at most 1e-04"):
        plain.check_golden(bundle)
