"""Convolutions: six forms of forward, product and input gradient, each the best measured for its kind.

    pointwise  1x1, dense            product (O, I) = dz x^T, one Gemm with the accumulator as its C
    taps       k x k, or grouped     product (K, O, I), one such matrix per tap of the kernel
    patches    k x k, few channels   product (O, K I), all taps in one: the RGB stem
    contracted the same              product (O, I), the taps' summed with W as weights; V is made from W when needed
    winograd   3x3, dense            product (O, I), the same sum in another domain: see `winograd`
    channel    depthwise             product (O,) = sum dz conv(x, W), W the pristine weight

The channel form serves masks that are one number per filter. Its weight is a constant of the graph, which ONNX Runtime
turns into its blocked layout, and the mask is a channel scale behind it: 24 ms an image for MobileNetV2 against 30 in
a study on one AMD Zen 5 core.
The contracted form keeps neither V nor the taps' products, each as large as W, which is memory-mapped.
A depthwise product needs no conv of its own: a conv and its transpose are adjoint, so that, channel by channel,
sum dz conv(x, W) = sum x conv^T(dz, W), and the right side is what the input gradient is made from anyway.

`dz` (n, O, h, w) is the gradient at the conv's output, `x` (n, C, H, W) its input; P = h w.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from ksm_edge.autodiff import products, windows, winograd
from ksm_edge.autodiff.graph import CONTRIB, Emitter, Node, Shape
from ksm_edge.autodiff.rules import transposed_conv
from ksm_edge.autodiff.spec import FEW_CHANNELS, FEW_COLUMNS, STANDARD, GradientSpec
from ksm_edge.autodiff.tape import OVER_IMAGES, Tape
from ksm_edge.bundle.layers import Layer

FEW_TO_SPREAD = 1024  # pixels of dz, see `_channel_spread`
FEW_PIXELS = 256  # of a 1x1 layer, see `_pointwise_input_gradient`


@dataclass(frozen=True)
class Geometry:
    """Strides, pads (top, left, bottom, right), dilations and kernel of one conv."""

    strides: tuple[int, int]
    pads: tuple[int, int, int, int]
    dilations: tuple[int, int]
    kernel: tuple[int, int]

    @classmethod
    def of(cls, node: Node, layer: Layer) -> Geometry:
        get = node.attributes.get
        strides, dilations = get("strides", [1, 1]), get("dilations", [1, 1])
        return cls(tuple(strides), tuple(get("pads", [0] * 4)), tuple(dilations), layer.weight_shape[2:])

    @property
    def attributes(self) -> dict[str, Any]:
        return {
            "strides": list(self.strides),
            "pads": list(self.pads),
            "dilations": list(self.dilations),
            "kernel_shape": list(self.kernel),
        }


def conv_form(node: Node, layer: Layer, y: Shape, spec: GradientSpec) -> str:
    """One of the forms above for a conv whose output is `y`.

    `spec.fast`: the patches of a large kernel may take memory, kh kw times that of the layer's input for each output
    pixel, and weights four times theirs. `spec.inside`: weights of k x k layers may be made in the graph.
    """
    # The weights of a layer that does not learn come fused, so there is no channel scale behind them.
    per_weight = spec.per_weight or layer.name not in spec.trained
    if layer.is_depthwise and not per_weight:
        return "channel"
    _, I, kh, kw = layer.weight_shape
    if layer.groups == 1 and (kh, kw) == (1, 1) and not any(Geometry.of(node, layer).pads):
        return "pointwise"
    few = I * kh * kw <= FEW_COLUMNS or (spec.fast and I <= FEW_CHANNELS)
    if few and layer.groups == 1:
        return "patches"
    if not per_weight and winograd.can_do(node, layer, y, spec):
        return "winograd"
    return "contracted" if spec.inside and layer.groups == 1 and not per_weight else "taps"


def forward(emit: Emitter, node: Node, layer: Layer, form: str, shapes: Mapping[str, Shape], output: str) -> None:
    """The conv with its bias, from x to `output`."""
    if form == "winograd":
        winograd.forward(emit, node, layer, (shapes[node.inputs[0]], shapes[node.output]), output)
        return
    if form == "pointwise" and emit.products != STANDARD and Geometry.of(node, layer).strides == (1, 1):
        products.pointwise(emit, layer, node.inputs[0], shapes[node.inputs[0]], output)
        return
    x, geometry = node.inputs[0], Geometry.of(node, layer).attributes
    bias, O = f"{layer.name}.bias", layer.weight_shape[0]
    if form != "channel":
        emit("Conv", x, _fused(emit, layer, form), bias, name=output, group=layer.groups, **geometry)
        return
    plain = emit("Conv", x, f"{layer.name}.weight", name=_plain(layer), group=layer.groups, **geometry)
    zero, one = emit.constant(np.zeros(O)), emit.constant(np.ones(O))
    emit("BatchNormalization", plain, f"{layer.name}.scale", bias, zero, one, name=output, epsilon=0.0)


def backward(tape: Tape, node: Node, layer: Layer, form: str, dz: str, *, trained: bool, turned: bool) -> None:
    """The layer's product into its accumulator, if it is trained, then the gradient of its input, if it is wanted.

    `turned`: the trainer may keep the weight a second time, as the transposed conv reads it.
    """
    if trained:
        accumulate(tape, f"{layer.name}.dbias", (layer.weight_shape[0],), tape.channel_sum(dz))
    if form in BOTH:
        BOTH[form](tape, node, layer, dz)
        return
    # The product comes first: what only it needs is free before the input gradient is made.
    if trained:
        PRODUCTS[form](tape, node, layer, dz)
    if (x := node.inputs[0]) not in tape.wanted:
        return
    if form == "pointwise" and Geometry.of(node, layer).strides == (1, 1):
        tape.add(x, _pointwise_input_gradient(tape, node, layer, dz, trained=trained))
    elif turned and trained and _turns(tape, node, layer):
        tape.add(x, _turned_conv(tape, node, layer, dz))
    else:
        tape.add(x, _spread(tape, node, layer, _fused(tape.emit, layer, form), dz))


def _fused(emit: Emitter, layer: Layer, form: str) -> str:
    """The weight that runs, V: as it was given, or made now from the pristine one and what the mask and f make."""
    if form != "contracted":
        return f"{layer.name}.weight"
    return emit("Mul", f"{layer.name}.pristine", f"{layer.name}.mask")


def accumulate(tape: Tape, name: str, shape: Shape, value: str) -> None:
    """name := acc.name + value, both bound to the same memory by the trainer."""
    tape.emit("Add", tape.emit.input(f"acc:{name}", shape), value, name=tape.emit.output(name, shape))


def _pointwise(tape: Tape, node: Node, layer: Layer, dz: str) -> None:
    _accumulate_gemm(tape, f"{layer.name}.product", (dz, tape.shapes[node.output]), _subsampled(tape, node, layer))


def _subsampled(tape: Tape, node: Node, layer: Layer) -> tuple[str, Shape]:
    """The pixels of x that a strided 1x1 conv reads, and their shape."""
    x, strides = node.inputs[0], Geometry.of(node, layer).strides
    if strides == (1, 1):
        return x, tape.shapes[x]
    shape = _window_shape(tape, node)
    if tape.own:
        return _met(tape, node, layer, 0, 1), shape
    return tape.emit.slice(x, (0, 0), tape.shapes[x][2:], strides), shape


def _by_channel(tape: Tape, x: str, shape: Shape) -> str:
    """(n, C, h, w) as (C, n h w): free for one image, one transposition for more."""
    n, C, h, w = shape
    if n > 1:
        x = tape.emit("Transpose", x, perm=[1, 0, 2, 3])
    return tape.emit.reshape(x, (C, n * h * w))


def _accumulate_gemm(tape: Tape, name: str, dz: tuple[str, Shape], x: tuple[str, Shape]) -> None:
    """name (O, I) := acc + dz x^T over images and pixels; `dz`, `x`: names, and shapes (n, O, h, w), (n, I, h, w)."""
    emit, (n, O, h, w), I = tape.emit, dz[1], x[1][1]
    before, total = emit.input(f"acc:{name}", (O, I)), emit.output(name, (O, I))
    if emit.products != STANDARD:
        products.accumulated(emit, before, dz[0], x[0], (n, O, I, h * w), total)
    else:
        emit("Gemm", _by_channel(tape, *dz), _by_channel(tape, *x), before, name=total, transB=1)


def _taps(tape: Tape, node: Node, layer: Layer, dz: str) -> None:
    """One product (O, I) per tap."""
    shape = _window_shape(tape, node)
    for k, window in enumerate(_windows(tape, node, layer)):
        _tap_product(tape, layer, f"{layer.name}.product.{k}", dz, window, shape)


def _contracted(tape: Tape, node: Node, layer: Layer, dz: str) -> None:
    """sum_k W_k * (dz x_k^T), (O, I)."""
    emit, (O, I, kh, kw), shape = tape.emit, layer.weight_shape, _window_shape(tape, node)
    flat = emit.reshape(f"{layer.name}.pristine", (O * I, kh * kw))
    by_tap = emit.reshape(emit("Transpose", flat, perm=[1, 0]), (kh * kw, O, I))
    rows = _by_channel(tape, dz, (shape[0], O, *shape[2:]))
    total = emit.input(f"acc:{layer.name}.product", (O, I))
    for k, window in enumerate(_windows(tape, node, layer)):
        product = emit("FusedMatMul", rows, _by_channel(tape, window, shape), domain=CONTRIB, transB=1)
        weight = emit("Gather", by_tap, emit.constant(k, np.int64), axis=0)
        last = {"name": emit.output(f"{layer.name}.product", (O, I))} if k == kh * kw - 1 else {}
        total = emit("Add", total, emit("Mul", weight, product), **last)


def _patches(tape: Tape, node: Node, layer: Layer, dz: str) -> None:
    """All taps' products (O, K I) at once: their windows as one input of K I channels, tap by tap."""
    O, I, kh, kw = layer.weight_shape
    n, _, h, w = _window_shape(tape, node)
    if tape.own:
        patches = _met(tape, node, layer, 0, kh * kw)
    else:
        patches = tape.emit("Concat", *_windows(tape, node, layer), axis=1)
    given = (dz, (n, O, h, w)), (patches, (n, kh * kw * I, h, w))
    _accumulate_gemm(tape, f"{layer.name}.product", *given)


def _window_shape(tape: Tape, node: Node) -> Shape:
    """(n, C, h, w) of what one tap meets: the input's channels, the output's pixels."""
    return (*tape.shapes[node.inputs[0]][:2], *tape.shapes[node.output][2:])


def _windows(tape: Tape, node: Node, layer: Layer) -> Iterator[str]:
    """For each tap the pixels that it met, (n, C, h, w): a strided window of the padded input."""
    if tape.own:
        for k in range(math.prod(layer.weight_shape[2:])):
            yield _met(tape, node, layer, k, 1)
        return
    emit, geometry, x = tape.emit, Geometry.of(node, layer), node.inputs[0]
    (_, _, H, W), (_, _, h, w) = tape.shapes[x], tape.shapes[node.output]
    top, left, bottom, right = geometry.pads
    if any(geometry.pads):
        x = emit("Pad", x, emit.shape([0, 0, top, left, 0, 0, bottom, right]))
    whole = H + top + bottom, W + left + right
    (di, dj), (sy, sx) = geometry.dilations, geometry.strides
    phases: dict[tuple[int, int], str] = {}
    for i, j in product(*map(range, geometry.kernel)):
        # Every sy-th row and sx-th column is gathered element by element, so once for all taps that read the same.
        (top, first_row), (left, first_column) = divmod(i * di, sy), divmod(j * dj, sx)
        first = first_row, first_column
        if first not in phases:
            phases[first] = x if (sy, sx) == (1, 1) else emit.slice(x, first, whole, (sy, sx))
        yield emit.slice(phases[first], (top, left), (top + h, left + w))


def _met(tape: Tape, node: Node, layer: Layer, first: int, taps: int) -> str:
    """The windows of some taps, (n, taps C, h, w), by the operator that makes them from the input itself."""
    shapes = tape.shapes[node.inputs[0]], tape.shapes[node.output]
    return windows.met(tape.emit, node.inputs[0], shapes, Geometry.of(node, layer).attributes, first, taps)


def _tap_product(tape: Tape, layer: Layer, name: str, dz: str, window: str, shape: Shape) -> None:
    """Accumulate dz x_k^T over images and pixels, (O, I), for one tap's window (n, C, h, w)."""
    emit, (O, I, _, _), (n, _, h, w) = tape.emit, layer.weight_shape, shape
    if layer.groups == 1:
        _accumulate_gemm(tape, name, (dz, (n, O, h, w)), (window, shape))
    elif layer.is_depthwise:
        total = emit.sum(emit("Mul", dz, window), OVER_IMAGES)
        accumulate(tape, name, (O, I), emit.reshape(total, (O, 1)))
    else:
        G = layer.groups
        left, right = emit.reshape(dz, (n, G, O // G, h * w)), emit.reshape(window, (n, G, I, h * w))
        total = emit.sum(emit("FusedMatMul", left, right, domain=CONTRIB, transB=1), [0])
        accumulate(tape, name, (O, I), emit.reshape(total, (O, I)))


def _channel(tape: Tape, node: Node, layer: Layer, dz: str) -> None:
    """Product and input gradient from one transposed conv with the pristine weight; the mask's scale stays pending."""
    emit, x, geometry = tape.emit, node.inputs[0], Geometry.of(node, layer)
    spread = _channel_spread(tape, node, layer, dz)
    # With strides the conv's output is the smaller side of the identity, and so small that it can be kept.
    left, right = (x, spread) if geometry.strides == (1, 1) else (_plain(layer), dz)
    accumulate(tape, f"{layer.name}.product", layer.weight_shape[:1], emit.sum(emit("Mul", left, right), OVER_IMAGES))
    tape.add(x, spread, scale=f"{layer.name}.scale")


def _channel_spread(tape: Tape, node: Node, layer: Layer, dz: str) -> str:
    """The transposed conv of dz as a conv with the flipped kernel, which ONNX Runtime runs in its blocked layout.

    A stride s is undone by zeros between the elements of dz: 1.5 to 3 times as fast as ConvTranspose up to 28 x 28
    pixels on one EPYC core, equal at 56 x 56, where the zeros would only take memory.
    """
    emit, geometry, flipped = tape.emit, Geometry.of(node, layer), _flipped(tape, node, layer)
    n, C, h, w = tape.shapes[node.output]
    strided = geometry.strides != (1, 1)
    if min(flipped["pads"]) < 0 or (strided and (h * w > FEW_TO_SPREAD or emit.dtype != np.float32)):
        return _spread(tape, node, layer, f"{layer.name}.weight", dz)
    if strided:
        sy, sx = geometry.strides
        corners = np.arange(n * C * h * sy * w * sx).reshape(n, C, h * sy, w * sx)[:, :, ::sy, ::sx]
        dz = emit("MaxUnpool", dz, emit.constant(corners, np.int64), kernel_shape=(sy, sx), strides=(sy, sx))
    return emit("Conv", dz, emit.external(f"{layer.name}.flipped", layer.weight_shape), group=layer.groups, **flipped)


def _plain(layer: Layer) -> str:
    """conv(x, W) of the channel form, in front of the mask's scale."""
    return f"~{layer.name}.plain"


def _spread(tape: Tape, node: Node, layer: Layer, weight: str, dz: str) -> str:
    """The transposed conv of dz, shaped like the conv's input."""
    g, x = Geometry.of(node, layer), node.inputs[0]
    return transposed_conv(tape, dz, weight, x, node.output, g.kernel, g.strides, g.pads, g.dilations, layer.groups)


def _pointwise_input_gradient(tape: Tape, node: Node, layer: Layer, dz: str, *, trained: bool) -> str:
    """V^T dz; for few pixels of one image as (dz^T V)^T, which leaves V as it lies: what is turned is small.

    For (2048, 512) and 7 x 7 pixels 2.8 ms instead of 3.2 on one EPYC core with AVX2, as fast as from a turned copy of
    V; from 28 x 28 on V^T dz is faster.
    """
    emit, (O, I, _, _), (n, _, h, w) = tape.emit, layer.weight_shape, tape.shapes[node.output]
    if emit.products != STANDARD:
        return products.pointwise_input_gradient(emit, layer, dz, (n, O, h, w))
    columns = emit.reshape(dz, (O, h * w) if n == 1 else (n, O, h * w))
    # V a second time, as a matrix: ONNX Runtime copies a graph input that is reshaped.
    matrix = f"{layer.name}.matrix"
    matrix = emit.input(matrix, (O, I)) if trained else emit.reshape(f"{layer.name}.weight", (O, I))
    if n == 1 and h * w <= FEW_PIXELS:
        rows = emit("FusedMatMul", columns, matrix, domain=CONTRIB, transA=1)
        spread = emit("Transpose", rows, perm=[1, 0])
    else:
        spread = emit("FusedMatMul", matrix, columns, domain=CONTRIB, transA=1)
    return emit.reshape(spread, tape.shapes[node.inputs[0]])


def _turns(tape: Tape, node: Node, layer: Layer) -> bool:
    """Whether the transposed conv is a conv: without strides, and with no more padding than the kernel reaches."""
    geometry = Geometry.of(node, layer)
    return layer.groups == 1 and geometry.strides == (1, 1) and min(_flipped(tape, node, layer)["pads"]) >= 0


def _turned_conv(tape: Tape, node: Node, layer: Layer, dz: str) -> str:
    """The transposed conv of dz as a conv with a flipped copy (I, O, kh, kw) of the weight that the trainer keeps.

    70 to 100 GFLOP/s for 3 x 3 over 64 to 512 channels and 7 to 224 pixels, on one EPYC core, where ConvTranspose has
    38 to 81, and no columns: ConvTranspose takes kh kw times its output for them.
    """
    O, I, kh, kw = layer.weight_shape
    weight = tape.emit.input(f"{layer.name}.turned", (I, O, kh, kw))
    return tape.emit("Conv", dz, weight, **_flipped(tape, node, layer))


def _flipped(tape: Tape, node: Node, layer: Layer) -> dict[str, Any]:
    """A conv's transpose as a conv of stride 1 with the flipped kernel, over dz with s - 1 zeros behind each element.

    Pads d (k - 1) - p in front; behind, what makes the result as large as the image.
    """
    geometry, image, output = Geometry.of(node, layer), tape.shapes[node.inputs[0]][2:], tape.shapes[node.output][2:]
    full = [d * (k - 1) for d, k in zip(geometry.dilations, geometry.kernel, strict=True)]
    front = [full[a] - geometry.pads[a] for a in (0, 1)]
    back = [image[a] - output[a] * geometry.strides[a] - front[a] + full[a] for a in (0, 1)]
    return geometry.attributes | {"strides": [1, 1], "pads": front + back}


# Product and input gradient of these come from the same tensors.
BOTH = {"channel": _channel, "winograd": winograd.backward}
# How the product of each other form is accumulated.
PRODUCTS = {"pointwise": _pointwise, "taps": _taps, "contracted": _contracted, "patches": _patches}
