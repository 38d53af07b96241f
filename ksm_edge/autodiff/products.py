"""Nodes of matrix products by operators of this project (`_products.h`).

    Product, HalfProduct          A, B -> A B
    ProductFrom, HalfProductFrom  A, B, C -> A B + C

of one A for all images, or of an A for each, and then the sum over images of A B^T. Several images share what is read,
put in order or written once. The first of each two is float32 throughout; where a 1x1 conv has few pixels, or few
channels on one side, it leaves more of a processor's arithmetic to use than ONNX Runtime does.

For HALVES A and B are rounded to bfloat16 where they are multiplied, by which each of their numbers errs by up to 2^-8
of itself. Sums, and all that lies between two products, are float32. Convs in Winograd's domain stay as they are: what
comes back from there errs by ten times as much as what is multiplied in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ksm_edge.autodiff.graph import OWN, Emitter, Shape
from ksm_edge.autodiff.spec import FLOATS, HALVES
from ksm_edge.bundle.layers import Layer

# By what sums begin with: nothing, or C.
BY_PRECISION = {FLOATS: ("Product", "ProductFrom"), HALVES: ("HalfProduct", "HalfProductFrom")}
OPERATORS = tuple(name for names in BY_PRECISION.values() for name in names)
# What sums begin with, by its number there.
NOTHING, EACH, BY_ROW = range(3)
# Columns of a right side, and words of each sum, that are in order at once, as in _words.h.
COLUMNS_KEPT, WORDS_KEPT = 256, 240


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
    emit(
        BY_PRECISION[emit.products][start > NOTHING],
        *given,
        name=name,
        domain=OWN,
        output_shape=list(made),
        **attributes,
    )


def made_shape(attributes: Mapping[str, Any]) -> Shape:
    """Of what one of these operators makes."""
    return tuple(attributes["output_shape"])


def room_words(op: str, attributes: Mapping[str, Any]) -> int:
    """Of four bytes: where parts of both sides lie in order while it runs, and a result that has to be turned."""
    (n, rows, columns, terms), is_summed = attributes["sides"], bool(attributes["summed"][0])
    is_half = op in BY_PRECISION[HALVES]
    is_swapped = is_summed and (columns - rows) * terms * n > 16 * rows * columns
    words = (terms + 1) // 2 if is_half else terms
    together = max(1, min(n, WORDS_KEPT // words)) if is_summed else 1
    in_place = not is_half and together == 1
    kept = COLUMNS_KEPT + (0 if in_place else columns if is_swapped else rows)
    return kept * together * min(words, WORDS_KEPT) + (rows * columns if is_swapped else 0)


def operations(attributes: Mapping[str, Any]) -> float:
    """Multiplications and additions."""
    return 2.0 * math.prod(attributes["sides"])
