"""Load a bundle: every check of its files lies here, so that nothing behind needs one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ksm_edge.bundle import manifest
from ksm_edge.bundle.digest import file_sha256
from ksm_edge.bundle.golden import feature_sum, read_golden
from ksm_edge.bundle.layers import Bundle, Layer, LayerWeights
from ksm_edge.bundle.manifest import GRAPH_NAME, WEIGHTS_NAME
from ksm_edge.bundle.tensorfile import map_tensors
from ksm_edge.errors import DamagedFileError, UsageError

EMBEDDED = "embedded"


def load_bundle(path: str | os.PathLike[str]) -> Bundle:
    """The bundle in the folder `path`, or the one that comes with this package for the text "embedded".

    Its weights are memory-mapped and read-only. Raises UsageError where there is no bundle, DamagedFileError where a
    file is not what was written, UnsupportedVersionError for a newer format.
    """
    folder = bundle_folder(path)
    if not (folder / manifest.NAME).is_file():
        raise UsageError(
            f"{folder}: no bundle there (no {manifest.NAME}); make one with: ksm-edge export RECIPE --out {folder}"
        )
    content = manifest.read_manifest(folder / manifest.NAME)
    try:
        _check_files(folder, content["files"])
        layers = manifest.read_layers(content)
        weights = _layer_weights(folder, layers, map_tensors(folder / WEIGHTS_NAME))
        return Bundle(
            folder.absolute(),  # the program may go to another folder
            content["recipe"],
            content["licence"],
            content["backbone_digest"],
            layers,
            weights,
            content["features"],
            manifest.read_contract(content),
            feature_sum(read_golden(content["golden"])),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedFileError(f"{folder / manifest.NAME}: an entry is missing or malformed ({error!r})") from error


def bundle_folder(path: str | os.PathLike[str]) -> Path:
    """Where a bundle lies; "embedded" is this package's own, and Path("embedded") a folder of that name."""
    if path == EMBEDDED:
        return Path(__file__).resolve().parent.parent / "embedded"
    return Path(path)


def _check_files(folder: Path, stated: Mapping[str, str]) -> None:
    for name in (GRAPH_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise DamagedFileError(f"{folder}: {name} is missing; copy the whole bundle again")
        found = file_sha256(folder / name)
        if found != stated[name]:
            raise DamagedFileError(
                f"{folder / name}: sha256 {found[:16]}..., the manifest says {stated[name][:16]}...; "
                "copy or export the bundle again"
            )


def _layer_weights(
    folder: Path, layers: tuple[Layer, ...], tensors: Mapping[str, np.ndarray]
) -> dict[str, LayerWeights]:
    weights = {}
    for layer in layers:
        trivial = {"bias": 0, "gamma": 1, "mean": 0, "var": 1}
        found: dict[str, Any] = {}
        for kind in ("weight", "bias", "gamma", "beta", "mean", "var"):
            shape = layer.weight_shape if kind == "weight" else layer.weight_shape[:1]
            tensor = tensors.get(f"{layer.name}.{kind}")
            if tensor is None and kind in trivial:
                tensor = np.full(shape, trivial[kind], np.float32)
                tensor.setflags(write=False)
            if tensor is None or tensor.shape != shape:
                what = "is missing" if tensor is None else f"has the shape {tensor.shape}"
                raise DamagedFileError(f"{folder / WEIGHTS_NAME}: {layer.name}.{kind} {what}, it should be {shape}")
            found[kind] = tensor
        weights[layer.name] = LayerWeights(**found)
    return weights
