"""From a recipe, or a stranger's ONNX file, to a bundle on disk: no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from ksm_edge.bundle.freeze import Frozen, freeze
from ksm_edge.bundle.layers import Bundle, InputContract
from ksm_edge.bundle.load import load_bundle
from ksm_edge.bundle.plain import check_golden
from ksm_edge.bundle.recipe import Recipe
from ksm_edge.bundle.write import write_bundle
from ksm_edge.errors import UsageError

UNKNOWN_LICENCE = "not stated: that of the weights that were given"


def freeze_recipe(recipe: Recipe, tensors: Mapping[str, np.ndarray], features: str | None = None) -> Frozen:
    """The recipe's architecture with the weights of a state dict; `features` overrides where it ends."""
    return freeze(read_onnx(recipe.graph_path), tensors, features or recipe.features)


def freeze_onnx(path: Path, features: str | None = None) -> Frozen:
    """A classifier from an ONNX file that holds its weights; UsageError where that is no valid ONNX."""
    model = read_onnx(path)
    try:
        return freeze(model, {}, features)
    except (KeyError, IndexError) as missing:
        try:
            onnx.checker.check_model(model)
        except onnx.checker.ValidationError as error:
            raise UsageError(f"{path}: no valid ONNX graph ({error})") from missing
        raise


def read_onnx(path: Path) -> onnx.ModelProto:
    """Raises UsageError where `path` is no ONNX file."""
    if not Path(path).is_file():
        raise UsageError(f"{path}: no such file")
    try:
        model = onnx.load(path)
    except Exception as error:  # protobuf's parse errors share no public base class
        raise UsageError(f"{path}: not an ONNX file ({error})") from error
    if not model.graph.node:
        raise UsageError(f"{path}: not an ONNX file, or one with an empty graph")
    return model


def save_bundle(
    frozen: Frozen,
    path: Path,
    *,
    recipe: str,
    input_contract: InputContract,
    licence: str = UNKNOWN_LICENCE,
    overwrite: bool = False,
    source: Mapping[str, Any] | None = None,
) -> Bundle:
    """Write a bundle, load it again with every check, and run its golden images on what was loaded."""
    write_bundle(
        frozen, path, recipe=recipe, licence=licence, input_contract=input_contract, overwrite=overwrite, source=source
    )
    bundle = load_bundle(Path(path))
    check_golden(bundle)
    return bundle
