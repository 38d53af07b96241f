"""Nodes of matrix products in half precision, in operators of this project (`_halves.h`).

    HalfProduct      A, B -> A B
    HalfProductFrom  A, B, C -> A B + C

of one A for all images, or of an A for each, and then the sum over images of A B^T. Several images share what is read,
rounded or written once: A and its words, or what is added to.

A and B are rounded to bfloat16 where they are multiplied, by which each of their numbers errs by up to 2^-8 of itself.
Sums, and all that lies between two products, are float32. Convs in Winograd's domain stay as they are: what comes back
from there errs by ten times as much as what is multiplied in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ksm_edge.autodiff.graph import OWN, Emitter, Shape
from ksm_edge.bundle.layers import Layer

OPERATORS = ("HalfProduct", "HalfProductFrom")
# What sums begin with, by its number there.
NOTHING, EACH, BY_ROW = range(3)
COLUMNS_KEPT, DEEPEST = 256, 512  # columns of a right side, and terms, that are in half precision at once, as there


def pointwise(emit: Emitter, layer: Layer, x: str, shape: Shape, output: str) -> None:
    """V x + v for each image, (n, O, h, w); `shape`: of `x`."""
    (n, I, h, w), O = shape, layer.weight_shape[0]
    given = f"{layer.name}.weight", x, f"{layer.name}.bias"
    _emit(emit, given, (n, O, h * w, I), (n, O, h, w), output, start=BY_ROW)


def pointwise_input_gradient(emit: Emitter, layer: Layer, dz: str, shape: Shape) -> str:
    """V^T dz for each image, (n, I, h, w); `shape`: of `dz`."""
    (n, O, h, w), I = shape, layer.weight_shape[1]
    sides, name = (n, I, h * w, O), emit.fresh("dx")
    _emit(emit, (f"{layer.name}.weight", dz), sides, (n, I, h, w), name, turned=True)
    return name


def accumulated(emit: Emitter, before: str, dz: str, x: str, sides: tuple[int, int, int, int], total: str) -> None:
    """total := before + the sum over images of dz x^T, of dz (n, O, P) and x (n, I, P); `sides`: n, O, I, P."""
    _emit(emit, (dz, x, before), sides, sides[1:3], total, summed=True, start=EACH)


def _emit(
    emit: Emitter, given: tuple[str, ...], sides: Shape, made: Shape, name: str, *,
    turned: bool = False, summed: bool = False, start: int = NOTHING,
) -> None:  # fmt: skip
    """`sides`: how many images, and of each rows, columns and terms; `made`: the result's shape.

    `turned`: the left side is read transposed. `summed`: the right one is, and the sums go over all images.
    """
    attributes = {"sides": list(sides), "turned": [int(turned)], "summed": [int(summed)], "start": [start]}
    emit(OPERATORS[start > NOTHING], *given, name=name, domain=OWN, output_shape=list(made), **attributes)


def made_shape(attributes: Mapping[str, Any]) -> Shape:
    """Of what one of these operators makes."""
    return tuple(attributes["output_shape"])


def room_shape(attributes: Mapping[str, Any]) -> Shape:
    """Of words: where parts of both sides lie in half precision while it runs."""
    n, rows, _, terms = attributes["sides"]
    words = (min(terms, DEEPEST) + 1) // 2
    together = max(1, min(n, DEEPEST // 2 // words)) if attributes["summed"][0] else 1
    return rows + COLUMNS_KEPT, together * words


def operations(attributes: Mapping[str, Any]) -> float:
    """Multiplications and additions."""
    return 2.0 * math.prod(attributes["sides"])
