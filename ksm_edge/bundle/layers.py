"""What a bundle says of its backbone: the table of layers, their pristine weights, and how an image must come in."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from ksm_edge.errors import UsageError

MAX_PIXELS = 4096  # of an input's side: a pack holds no larger one

_SHARE = re.compile(r"(\d{1,2})%\.\.")


@dataclass(frozen=True)
class Layer:
    """One conv of the backbone and the batch-norm behind it, if any.

    In `backbone.onnx` it is the Conv node `name` with the inputs `name.weight` and `name.bias`.
    """

    name: str
    weight_shape: tuple[int, int, int, int]  # (O, I, kh, kw), I per group
    groups: int
    eps: float  # of the batch-norm; 0 where there is none
    has_norm: bool

    @property
    def is_depthwise(self) -> bool:
        return self.groups > 1 and self.weight_shape[1] == 1 and self.weight_shape[0] == self.groups


@dataclass(frozen=True)
class LayerWeights:
    """A layer's pristine tensors, float32 and read-only.

    A conv without batch-norm is given as one whose batch-norm does nothing: gamma 1, mean 0, var 1, eps 0, bias 0 and
    beta = the conv's own bias, so that one set of equations covers both.
    """

    weight: np.ndarray  # (O, I, kh, kw)
    bias: np.ndarray  # (O,), the conv's, in front of the batch-norm
    gamma: np.ndarray  # (O,)
    beta: np.ndarray  # (O,)
    mean: np.ndarray  # (O,)
    var: np.ndarray  # (O,)


@dataclass(frozen=True)
class InputContract:
    """How an image becomes input: short side to `resize`, centre crop to `size`, then (x / 255 - mean) / std."""

    size: int  # pixels
    resize: int  # pixels
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class Bundle:
    """A frozen backbone, as `ksm-edge export` writes it and every other command reads it."""

    path: Path
    recipe: str
    licence: str
    digest: str  # of the backbone: sorted tensor names, dtypes, shapes and bytes
    layers: tuple[Layer, ...]  # in graph order
    weights: Mapping[str, LayerWeights]  # by layer name, memory-mapped
    features: int  # F, length of the pooled feature vector
    input: InputContract
    feature_sum: float  # of a feature vector's absolute values, the mean over the golden images

    @property
    def graph_path(self) -> Path:
        """`backbone.onnx`: image (N, 3, H, W) -> features (N, F); conv weights and biases are external initializers."""
        return self.path / "backbone.onnx"


def select(patterns: str, layers: Sequence[Layer]) -> frozenset[str]:
    """Names of the layers that a list of patterns, with commas between them, selects.

    A pattern is a name, may hold the wildcards *, ? and [...], and with .. behind it means its first layer and all that
    come after that; 35%.. means all behind the first 35 % of the layers. Raises UsageError where one selects nothing.

    >>> stem, body = (Layer(name, (8, 8, 3, 3), 1, 0.0, False) for name in ("stem", "body.0"))
    >>> sorted(select("body.*", [stem, body])), sorted(select("stem..", [stem, body]))
    (['body.0'], ['body.0', 'stem'])
    """
    names, found = [layer.name for layer in layers], set[str]()
    for pattern in patterns.split(","):
        share = _SHARE.fullmatch(pattern.strip())
        first = names[int(share[1]) * len(names) // 100 :][:1] if share else []
        matches = first or [name for name in names if fnmatchcase(name, pattern.strip().removesuffix(".."))]
        if not matches:
            raise UsageError(
                f"no layer is called {pattern.strip()!r}; the backbone's {len(names)} are {', '.join(names[:3])}, ... "
                f"{', '.join(names[-2:])}"
            )
        found |= set(names[names.index(matches[0]) :] if pattern.strip().endswith("..") else matches)
    return frozenset(found)
