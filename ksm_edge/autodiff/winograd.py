"""Nodes of a 3x3 conv in the domain of Winograd's F(4x4, 3x3), in which its operators are written (`_winograd.h`).

    forward    y = WinogradOutput(U WinogradInput(x))
    product    S = Contraction(W, D V'), (O, I), with V = WinogradInput(x) again and D = WinogradOutputGradient(dy)
    input      dx = WinogradInputGradient(U' D)

A kernel takes part in 36 multiplications for 16 results instead of in 144. U is the weight that runs there: as the mask
is one number for a kernel, it is the same number there. What it feels is the sum over the kernel's nine taps, to which
Contraction brings D V' a few kernels at a time. So the gradient of the weight itself is never in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ksm_edge.autodiff.graph import CONTRIB, OWN, Emitter, Node, Shape
from ksm_edge.autodiff.spec import GradientSpec
from ksm_edge.autodiff.tape import Tape
from ksm_edge.autodiff.tiles import PLACES, tiles
from ksm_edge.bundle.layers import Layer

INTO = ("WinogradInput", "WinogradOutputGradient")
OPERATORS = (*INTO, "WinogradInputGradient", "WinogradOutput", "Contraction")
FEWEST_TILES = 16  # with fewer the weights take longer to read than a conv without them
LARGEST_PAD = 2


def can_do(node: Node, layer: Layer, output: Shape, spec: GradientSpec) -> bool:
    """Whether this conv is wanted to be one, can be, and gains by it."""
    if not (spec.own and spec.fast):
        return False
    O, I, *kernel = layer.weight_shape
    get = node.attributes.get
    steps = (*get("strides", [1, 1]), *get("dilations", [1, 1]))
    plain = layer.groups == 1 and kernel == [3, 3] and set(steps) == {1} and max(get("pads", [0])) <= LARGEST_PAD
    return plain and spec.tile_bytes >= 4 * PLACES * O * I and tiles(*output[2:]) >= FEWEST_TILES


def forward(emit: Emitter, node: Node, layer: Layer, shapes: tuple[Shape, Shape], output: str) -> None:
    """The conv with its bias; `shapes`: of what it reads and makes."""
    geometry = _geometry(node, *shapes)
    columns = emit("WinogradInput", node.inputs[0], domain=OWN, **geometry)
    made = emit("MatMul", f"{layer.name}.weight", columns)
    emit("WinogradOutput", made, f"{layer.name}.bias", name=output, domain=OWN, **geometry)


def backward(tape: Tape, node: Node, layer: Layer, dz: str) -> None:
    """The product into its accumulator and the gradient of the input, if it is wanted."""
    emit, x, name, kernels = tape.emit, node.inputs[0], layer.name, layer.weight_shape[:2]
    geometry = _geometry(node, tape.shapes[x], tape.shapes[node.output])
    rows = emit("WinogradOutputGradient", dz, domain=OWN, **geometry)
    columns = emit("WinogradInput", x, domain=OWN, **geometry)
    gradient = emit("FusedMatMul", rows, columns, domain=CONTRIB, transB=1)
    before, total = emit.input(f"acc:{name}.product", kernels), emit.output(f"{name}.product", kernels)
    pristine = emit.input(f"{name}.pristine", layer.weight_shape)
    emit("Contraction", pristine, gradient, before, name=total, domain=OWN, kernels=list(kernels))
    if x in tape.wanted:
        spread = emit("FusedMatMul", f"{name}.weight", rows, domain=CONTRIB, transA=1)
        tape.add(x, emit("WinogradInputGradient", spread, domain=OWN, **geometry))


def _geometry(node: Node, x: Shape, y: Shape) -> dict[str, Any]:
    top, left, *_ = node.attributes.get("pads", [0] * 4)
    return {"image_shape": list(x), "output_shape": list(y), "pads": [top, left]}


def made_shape(op: str, attributes: Mapping[str, Any]) -> Shape:
    """Of what one of these operators makes."""
    if op == "Contraction":
        return tuple(attributes["kernels"])
    x, y = (tuple(attributes[f"{which}_shape"]) for which in ("image", "output"))
    if op in INTO:
        return PLACES, (x if op == "WinogradInput" else y)[1], x[0] * tiles(*y[2:])
    return y if op == "WinogradOutput" else x
