"""What a gradient graph is asked for and what it gives, apart from its builder: training need not import onnx."""

from __future__ import annotations

from dataclasses import dataclass

from ksm_edge.autodiff.tiles import PLACES
from ksm_edge.bundle.layers import Layer

Shape = tuple[int, ...]

# The front of a backbone is all that no layer that learns lies in: what it makes of an image stays the same.
WHOLE, FRONT, REST = "whole", "front", "rest"
# Who multiplies the matrices of 1x1 convs and of accumulators: ONNX Runtime, or `_products.h`, in float32 or in half.
STANDARD, FLOATS, HALVES = "standard", "floats", "halves"


@dataclass(frozen=True)
class GradientSpec:
    """What one gradient graph is for."""

    micro_batch: int  # images per run, n
    size: int  # pixels, the image being (n, 3, size, size)
    classes: int
    trained: frozenset[str]  # names of the layers that learn; none: only the head does
    statistics: str = "frozen"  # or "batch": normalise with the micro-batch's own
    per_weight: bool = False  # products of every single weight, also in depthwise layers
    backward: bool = True  # False: image -> features, with the same parameter inputs
    fast: bool = True  # for some memory: weights a second time, as transposed convs read them, and whole stems at once
    inside: bool = False  # fused weights of k x k layers are made in the graph when they are needed, and not kept
    part: str = WHOLE  # or FRONT: image -> what the rest begins with, forward alone; REST: from there on
    own: bool = False  # with operators of `_operators.c`, see `autodiff.own`
    widened: bool = True  # with `own`: 1x1 convs are done along with the depthwise convs behind them
    tile_bytes: int = 0  # with `own` and `fast`: 3x3 convs by tiles whose weights take up to so much, see `winograd`
    half: bool = False  # keep the forward pass's tensors in half precision where that gains: see `autodiff.halved`
    products: str = STANDARD  # with `own`: or FLOATS or HALVES, see `autodiff.products`
    formed_at: int = 0  # pixels that the forms of convs are chosen for; 0: those of `size`
    recompute: bool = False  # keep little of the forward pass, and compute the rest again: see `autodiff.recompute`


# So few in-channels that a matrix product for each tap would be all overhead: 13 ms became 3 for 7 x 7 over RGB at 224
# pixels; and I kh kw that are little memory: 3 x 3 over RGB.
FEW_CHANNELS, FEW_COLUMNS = 3, 27
# Where tensors are kept in half precision, whole ones come and go between them, and leave gaps.
HALF_SHARE = 1.25
MASK_ALONE = ("channel", "contracted", "winograd")  # whose product is S: the graph has the pristine weight


def fused_shape(form: str, layer: Layer) -> Shape:
    """That of what the trainer makes: the weight, or mask times batch-norm's factor, (O,) or (O, I)."""
    if form == "channel":
        return layer.weight_shape[:1]
    return layer.weight_shape[:2] if form in MASK_ALONE else layer.weight_shape


def product_shape(form: str, layer: Layer) -> Shape:
    """The accumulator's shape: (O, I), (K, O, I), (O, K I) or (O,)."""
    O, I, kh, kw = layer.weight_shape
    shapes = {"taps": (kh * kw, O, I), "patches": (O, kh * kw * I), "channel": (O,)}
    return shapes.get(form, (O, I))


def transformed_shape(layer: Layer) -> Shape:
    """That of the weight that runs in the winograd form."""
    return (PLACES, *layer.weight_shape[:2])


def turned_shape(layer: Layer) -> Shape:
    """That of the weight as transposed convs read it, flipped."""
    O, I, kh, kw = layer.weight_shape
    return (I, O, kh, kw)
