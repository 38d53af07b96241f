"""The gradient graph: one micro-batch forward, loss and backward, as an ordinary ONNX graph.

It takes fused weights and accumulates what the gradients of any mask are made from; it knows nothing of masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx

from ksm_edge.autodiff import conv, loss, norm, own
from ksm_edge.autodiff.graph import Emitter, Node, Shape
from ksm_edge.autodiff.halved import with_halves
from ksm_edge.autodiff.recompute import with_least_kept
from ksm_edge.autodiff.rules import RULES
from ksm_edge.autodiff.spec import FRONT, STANDARD, WHOLE, GradientSpec, transformed_shape
from ksm_edge.autodiff.tape import Tape, gradient_wanted
from ksm_edge.bundle.layers import Layer
from ksm_edge.errors import UnsupportedError

IMAGE, FEATURES = "image", "features"  # of every backbone, the names of its input and its output


@dataclass(frozen=True)
class GradientGraph:
    """The model and, for each trained layer, the form its product comes in (see `conv`)."""

    model: onnx.ModelProto
    spec: GradientSpec
    forms: dict[str, str]  # of every layer
    inputs: dict[str, Shape]
    outputs: dict[str, Shape]
    externals: dict[str, Shape]
    pixels: dict[str, int]  # h w of each layer's output


def build(
    backbone: onnx.ModelProto, layers: Sequence[Layer], spec: GradientSpec, dtype: type = np.float32
) -> GradientGraph:
    """Turn a frozen backbone (image -> features) into its gradient graph.

    Inputs: `image` (n, 3, S, S), `target` (n, C), `head:weight` (C, F), `head:bias` (C,), and of each trained layer
    `LAYER.weight` and `LAYER.bias`, or `LAYER.scale` and `LAYER.bias` where the form is `channel`. Where the backward
    pass reads it so, a 1x1 weight comes a second time, as `LAYER.matrix` (O, I), and one of k x k as `LAYER.turned`
    (I, O, kh, kw), flipped. Where the form is `contracted` the weight is made from `LAYER.pristine` and `LAYER.mask`,
    which is M f. Where it is `winograd`, `LAYER.weight` is (36, O, I), see `tiles`, and the backward pass reads
    `LAYER.pristine` too. The weights of layers that are not trained, pristine ones of the channel form and
    `LAYER.flipped` are external initializers.
    Outputs: `loss`, `logits`, and accumulators, each with an input `acc:NAME`: `LAYER.product` (or `LAYER.product.K`
    per tap), `LAYER.dbias`, `head:dweight`, `head:dbias`; with batch statistics also `LAYER.dgamma`, `LAYER.dbeta` and
    the plain outputs `LAYER.batch_mean`, `LAYER.batch_var`.

    With `spec.backward` off the graph ends at its one output, the backbone's `features` (n, F). Where `spec.part` is
    one of two, what lies between them is called `features` in the front, and `image` in the rest.
    Raises UnsupportedError for an operator without a rule. With `spec.own` `dtype` is float32.
    """
    table = {layer.name: layer for layer in layers}
    nodes = read_nodes(backbone)
    shapes = static_shapes(backbone, spec.micro_batch, spec.size)
    emit = Emitter(dtype, spec.products if spec.own else STANDARD)
    emit.constants.update(_constants(backbone, dtype))
    if spec.part != WHOLE:
        nodes = _part(nodes, spec, shapes)
    emit.input(IMAGE, shapes[IMAGE])
    formed_at = static_shapes(backbone, spec.micro_batch, spec.formed_at) if spec.formed_at else shapes
    builder = _Builder(emit, spec, table, nodes, shapes, formed_at)
    builder.forward()
    forward = len(emit.nodes)
    if spec.backward:
        _learn(builder, nodes[-1].output if nodes else IMAGE)
    else:
        emit.output(FEATURES, shapes[FEATURES])
    model = emit.model()
    if spec.recompute:
        model = with_least_kept(model, forward, half=spec.half)
    elif spec.half:
        model = with_halves(model, forward)
    own.declare_shapes(model)
    inputs, outputs = ({name: shape for name, (_, shape) in d.items()} for d in (emit.inputs, emit.outputs))
    pixels = {node.name: shapes[node.output][2] * shapes[node.output][3] for node in nodes if node.op == "Conv"}
    return GradientGraph(model, spec, builder.forms, inputs, outputs, dict(emit.externals), pixels)


def _learn(builder: _Builder, features: str) -> None:
    """Head, loss, and everything backwards from there."""
    shapes, spec = builder.shapes, builder.spec
    loss.forward(builder.emit, features, (shapes[features][0], shapes[features][1]), spec.classes)
    tape = Tape(builder.emit, shapes, builder.wanted, spec.own)
    loss.backward(tape, features, spec.classes)
    builder.backward(tape)


@dataclass
class _Builder:
    emit: Emitter
    spec: GradientSpec
    layers: dict[str, Layer]
    nodes: list[Node]
    shapes: dict[str, Shape]
    formed_at: dict[str, Shape]  # those that forms are chosen for

    def __post_init__(self) -> None:
        for node in self.nodes:
            if node.op != "Conv" and node.op not in RULES:
                raise UnsupportedError(
                    f"operator {node.op} (node {node.name}) has no gradient rule. Supported: "
                    f"{', '.join(sorted([*RULES, 'Conv']))}. Export a network made of these, or add a rule to "
                    "autodiff/rules.py."
                )
        self.forms = {node.name: self._form(node) for node in self.nodes if node.op == "Conv"}
        self.wanted = gradient_wanted(self.nodes, self.spec.trained) if self.spec.backward else frozenset()
        self.own: dict[str, own.Depthwise] = {}  # depthwise convs that operators of this project do
        if self.spec.own:
            may = {n: form for n, form in self.forms.items() if n in self.spec.trained and not self._normalised(n)}
            around = self.layers, self.shapes, self.emit.constants
            self.own = own.find(self.nodes, may, *around, widened=self.spec.widened)
        self.done_along = {node.name for conv in self.own.values() for node in conv.done_along}
        self.done_behind = {conv.behind.name for conv in self.own.values() if conv.behind}

    def _form(self, node: Node) -> str:
        return conv.conv_form(node, self.layers[node.name], self.formed_at[node.output], self.spec)

    def forward(self) -> None:
        for node in self.nodes:
            if node.op != "Conv" and node.name in self.done_along:
                continue
            if node.op == "Conv":
                self._conv_forward(node)
            elif node.op == "Swish":
                self.emit("Mul", node.inputs[0], self.emit("Sigmoid", node.inputs[0]), name=node.output)
            else:
                # A pool's indices cost as much as many pools: only where a gradient will go by them.
                by_indices = node.output in self.wanted and not self.spec.own
                names = node.outputs if by_indices else node.outputs[:1]
                self.emit.many(node.op, *node.inputs, names=names, **node.attributes)

    def _conv_forward(self, node: Node) -> None:
        layer, form = self.layers[node.name], self.forms[node.name]
        self._declare_parameters(layer, form)
        if node.name in self.done_along:
            return
        if node.name in self.own:
            self.own[node.name].forward(self.emit)
        elif self._normalised(layer.name):
            before = f"~{layer.name}.before_norm"
            self.shapes[before] = self.shapes[node.output]
            conv.forward(self.emit, node, layer, form, self.shapes, before)
            norm.forward(self.emit, layer, before, node.output)
        else:
            conv.forward(self.emit, node, layer, form, self.shapes, node.output)

    def _declare_parameters(self, layer: Layer, form: str) -> None:
        trained, shape, vector = layer.name in self.spec.trained, layer.weight_shape, layer.weight_shape[:1]
        changing, fixed = self.emit.input, self.emit.external
        (changing if trained else fixed)(f"{layer.name}.bias", vector)
        if form == "contracted":
            changing(f"{layer.name}.pristine", shape)
            changing(f"{layer.name}.mask", (*shape[:2], 1, 1))
            return
        if form == "winograd":
            changing(f"{layer.name}.weight", transformed_shape(layer))
            return
        (changing if trained and form != "channel" else fixed)(f"{layer.name}.weight", shape)
        if form == "channel":
            changing(f"{layer.name}.scale", vector)

    def _normalised(self, name: str) -> bool:
        return self.spec.statistics == "batch" and self.layers[name].has_norm and name in self.spec.trained

    def backward(self, tape: Tape) -> None:
        for node in reversed(self.nodes):
            if node.output not in tape.wanted:
                continue
            gradient = tape.take(node.output)
            if gradient is None:
                continue
            if node.name in self.done_behind:
                tape.add(node.inputs[0], tape.whole(gradient, node.output))
                continue
            if node.op != "Conv":
                if not (tape.own and own.gate(tape, node, gradient)):
                    RULES[node.op](tape, node, gradient)
                continue
            layer = self.layers[node.name]
            dz = tape.whole(gradient, node.output)
            if node.name in self.own:
                self.own[node.name].backward(tape, dz)
                continue
            if self._normalised(layer.name):
                dz = norm.backward(tape, layer, f"~{layer.name}.before_norm", dz)
            trained, turned = layer.name in self.spec.trained, self.spec.fast
            conv.backward(tape, node, layer, self.forms[node.name], dz, trained=trained, turned=turned)


def _part(nodes: list[Node], spec: GradientSpec, shapes: dict[str, Shape]) -> list[Node]:
    """The nodes in front or behind, and the shape of what lies between under its name there."""
    count = front_nodes(nodes, spec.trained)
    between = nodes[count - 1].output
    name, part = (FEATURES, nodes[:count]) if spec.part == FRONT else (IMAGE, nodes[count:])
    shapes[name] = shapes[between]
    called = {between: name}

    def renamed(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(called.get(name, name) for name in names)

    return [replace(node, inputs=renamed(node.inputs), outputs=renamed(node.outputs)) for node in part]


def front_nodes(nodes: Sequence[Node], trained: frozenset[str]) -> int:
    """How many there are up to the last place that all of the image goes through, and no layer of `trained` before it.

    UnsupportedError where there is none.
    """
    last_use = {name: number for number, node in enumerate(nodes) for name in node.inputs}
    alive, found = {IMAGE}, 0
    for number, node in enumerate(nodes):
        if node.name in trained:
            break
        alive = {name for name in (*alive, node.output) if last_use.get(name, len(nodes)) > number}
        if alive == {node.output}:
            found = number + 1
    if found == 0:
        raise UnsupportedError("no layer lies in front of all those that learn: nothing could be kept of an image")
    return found


def read_nodes(backbone: onnx.ModelProto) -> list[Node]:
    """The backbone's nodes, x * sigmoid(x) as one Swish, so that one tensor is kept for its gradient and not two."""
    nodes = [Node.read(proto) for proto in backbone.graph.node]
    sigmoids = {node.output: node.inputs[0] for node in nodes if node.op == "Sigmoid"}
    uses = [name for node in nodes for name in node.inputs]
    merged: list[Node] = []
    gone: set[str] = set()
    for node in nodes:
        for gate, x in (node.inputs, node.inputs[::-1]) if node.op == "Mul" else ():
            if sigmoids.get(gate) == x and uses.count(gate) == 1:
                gone.add(gate)
                node = Node("Swish", node.name, (x,), node.outputs, {})
                break
        if node.op == "MaxPool":
            node = Node(node.op, node.name, node.inputs, (node.output, f"~{node.output}.indices"), node.attributes)
        merged.append(node)
    return [node for node in merged if node.output not in gone]


def static_shapes(backbone: onnx.ModelProto, n: int, size: int) -> dict[str, Shape]:
    """The shape of every tensor of the backbone for n images of size x size."""
    model = onnx.ModelProto()
    model.CopyFrom(backbone)
    for axis, value in zip(model.graph.input[0].type.tensor_type.shape.dim, (n, 3, size, size), strict=True):
        axis.Clear()
        axis.dim_value = value
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    infos = [*graph.input, *graph.value_info, *graph.output]
    return {info.name: tuple(d.dim_value for d in info.type.tensor_type.shape.dim) for info in infos}


def _constants(backbone: onnx.ModelProto, dtype: type) -> dict[str, np.ndarray]:
    """The backbone's inline initializers (bounds, pads, slices); weights are external and come later."""
    inline = [t for t in backbone.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in inline}
    return {name: a.astype(dtype) if a.dtype == np.float32 else a for name, a in arrays.items()}
