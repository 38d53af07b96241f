"""Recipes: a backbone's architecture as a weightless graph, where its weights come from, how an image must come in."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ksm_edge.bundle.layers import MAX_PIXELS, InputContract
from ksm_edge.errors import UsageError
from ksm_edge.resources import data_folder

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class WeightSource:
    """One file of weights a recipe knows."""

    source: str  # who made it
    licence: str
    url: str | None = None
    sha256: str | None = None  # of the whole file, where it is known
    strip_prefix: str = ""  # in front of every tensor's name
    top1: float | None = None  # 0..1
    measured_on: str | None = None
    measured_by: str | None = None  # address of who says so

    @property
    def digits(self) -> str:
        """What the file's sha256 begins with: torch's hubs end a file's name in eight of its digits.

        >>> WeightSource("", "", "https://download.pytorch.org/models/resnet18-f37072fd.pth").digits
        'f37072fd'
        """
        if self.sha256:
            return self.sha256
        found = re.search(r"-([0-9a-f]{8,64})\.\w+$", self.url or "")
        return found.group(1) if found else ""


@dataclass(frozen=True)
class Recipe:
    """What `export/NAME.toml` says."""

    name: str
    title: str
    graph_path: Path  # weightless: parameters are graph inputs, named as in the state dict
    features: str | None  # the node the backbone ends at; None: the input of the first Linear layer
    input: InputContract
    weights: tuple[WeightSource, ...]

    @property
    def download(self) -> WeightSource | None:
        """The weights `auto` stands for."""
        return next((source for source in self.weights if source.url), None)

    def source_of(self, sha256: str) -> WeightSource | None:
        """The known weights whose file has this sha256."""
        return next((s for s in self.weights if s.digits and sha256.startswith(s.digits)), None)


def recipe_names() -> list[str]:
    """The names of the recipes that come with this package, sorted."""
    return sorted(path.stem for path in data_folder("ksm_edge.recipes").glob("*.toml"))


def load_recipe(name_or_path: str | Path) -> Recipe:
    """A recipe by name, or from a TOML file of one's own; its graph lies beside it.

    Raises UsageError for an unknown name, and for a file that is no recipe, naming the entry at fault.

    >>> load_recipe("resnet18").input.size
    224
    """
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = data_folder("ksm_edge.recipes") / f"{name_or_path}.toml"
    if not path.is_file():
        known = ", ".join(recipe_names())
        raise UsageError(f"no recipe {str(name_or_path)!r}; there are {known}, or give a path ending in .toml")
    try:
        return _read(path, tomllib.loads(path.read_text(encoding="utf-8")))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        examples = data_folder("ksm_edge.recipes")
        raise UsageError(f"{path} is not a recipe: {error!r}; compare it with those in {examples}") from error


def _read(path: Path, content: Mapping[str, Any]) -> Recipe:
    entry = content["input"]
    return Recipe(
        name=path.stem,
        title=content["title"],
        graph_path=path.parent / content["graph"],
        features=content.get("features"),
        input=input_contract(entry["size"], entry["resize"], entry["mean"], entry["std"]),
        weights=tuple(WeightSource(**source) for source in content.get("weights", ())),
    )


def input_contract(size: int, resize: int, mean: tuple[float, ...], std: tuple[float, ...]) -> InputContract:
    """An input contract; raises UsageError for one no image can meet."""
    if not 1 <= size <= resize <= MAX_PIXELS:
        raise UsageError(
            f"an input of {size} pixels cropped from {resize}: the crop must be positive and not larger, and images "
            f"have {MAX_PIXELS} pixels at most"
        )
    if len(mean) != 3 or len(std) != 3 or not all(map(math.isfinite, (*mean, *std))) or min(std) <= 0:
        raise UsageError(f"mean {tuple(mean)} and std {tuple(std)}: three numbers each are needed, std above 0")
    a, b, c = map(float, mean)
    d, e, f = map(float, std)
    return InputContract(int(size), int(resize), (a, b, c), (d, e, f))


def at_size(contract: InputContract, size: int) -> InputContract:
    """The same input at another size, in pixels, cropped from as much more as before.

    >>> at_size(InputContract(224, 256, (0, 0, 0), (1, 1, 1)), 160).resize
    183
    """
    return input_contract(size, round(size * contract.resize / contract.size), contract.mean, contract.std)


def without_prefix(tensors: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The tensors with `prefix` taken off their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
