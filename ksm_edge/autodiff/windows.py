"""Nodes of what a kernel slides over, in operators of this project (`_windows.h`).

    Windows          x -> what some taps of a kernel met, (n, taps C, h, w): zeros where that was padding
    MaxPoolGradient  dy, x -> dx: each window's gradient goes to the first of its pixels that is its maximum

Each goes over memory once, where standard operators pad, slice and join. A max pool that writes down which pixels won,
as its standard gradient needs it, takes ten times as long as one that does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ksm_edge.autodiff.graph import OWN, Emitter, Shape

OPERATORS = ("Windows", "MaxPoolGradient")


def met(emit: Emitter, x: str, shapes: tuple[Shape, Shape], geometry: Mapping[str, Any], first: int, taps: int) -> str:
    """What `taps` taps from the `first` on, row by row of the kernel, met of `x`; `shapes`: of x and of the result."""
    (n, C, H, W), (_, _, h, w) = shapes
    attributes = _sliding((n, C, H, W), (n, taps * C, h, w), geometry)
    return emit("Windows", x, domain=OWN, first=[first], **attributes)


def max_pool_gradient(emit: Emitter, dy: str, x: str, shapes: tuple[Shape, Shape], geometry: Mapping[str, Any]) -> str:
    """dx of a pool of x; `shapes`: of x and of what the pool makes."""
    return emit("MaxPoolGradient", dy, x, domain=OWN, first=[0], **_sliding(*shapes, geometry))


def _sliding(x: Sequence[int], made: Sequence[int], geometry: Mapping[str, Any]) -> dict[str, Any]:
    top, left, *_ = geometry.get("pads", [0] * 4)
    return {
        "image_shape": list(x),
        "output_shape": list(made),
        "kernel_shape": list(geometry["kernel_shape"]),
        "strides": list(geometry.get("strides", [1, 1])),
        "dilations": list(geometry.get("dilations", [1, 1])),
        "pads": [top, left],
    }


def made_shape(op: str, attributes: Mapping[str, Any]) -> Shape:
    """Of what one of these operators makes."""
    return tuple(attributes["output_shape" if op == "Windows" else "image_shape"])
