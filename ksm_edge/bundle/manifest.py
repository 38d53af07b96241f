"""`manifest.json`: what a bundle says of itself, and the one checksum that covers it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ksm_edge.bundle.layers import InputContract, Layer
from ksm_edge.errors import DamagedFileError, UnsupportedVersionError

FORMAT_VERSION = 1
NAME = "manifest.json"
GRAPH_NAME = "backbone.onnx"
WEIGHTS_NAME = "weights.safetensors"


def manifest_text(content: Mapping[str, Any]) -> str:
    """`content` as JSON, with the sha256 of itself as last entry."""
    return json.dumps({**content, "manifest_sha256": _checksum(content)}, indent=1) + "\n"


def read_manifest(path: Path) -> dict[str, Any]:
    """Raises DamagedFileError where the text is not what was written, UnsupportedVersionError for a newer format."""
    try:
        content = json.loads(path.read_bytes())
        version = content["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedFileError(f"{path}: not a bundle's manifest ({error!r}); export the bundle again") from error
    if version != FORMAT_VERSION:
        raise UnsupportedVersionError(
            f"{path}: format version {version!r}, this release reads {FORMAT_VERSION}; "
            "install a newer ksm-edge, or export the bundle again with this one"
        )
    stated = content.pop("manifest_sha256", None)
    if stated != _checksum(content):
        raise DamagedFileError(f"{path}: its content does not match its own checksum; export the bundle again")
    return content


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def layer_table(layers: Iterable[Layer]) -> list[dict[str, Any]]:
    """The layers as JSON objects, graph order."""
    return [asdict(layer) for layer in layers]


def read_layers(content: Mapping[str, Any]) -> tuple[Layer, ...]:
    """The inverse of `layer_table`."""
    return tuple(Layer(**{**row, "weight_shape": tuple(row["weight_shape"])}) for row in content["layers"])


def read_contract(content: Mapping[str, Any]) -> InputContract:
    """The input contract as `dataclasses.asdict` wrote it."""
    entry = content["input"]
    return InputContract(entry["size"], entry["resize"], tuple(entry["mean"]), tuple(entry["std"]))
