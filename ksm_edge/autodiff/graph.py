"""The graph under construction: forward nodes as they are read, ONNX nodes as they are emitted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ksm_edge.autodiff.spec import STANDARD
from ksm_edge.bundle.freeze import IR_VERSION, OPSET

CONTRIB = "com.microsoft"  # operators outside the standard that every stock onnxruntime wheel has
OWN = "ksm_edge"  # and of this project, see `autodiff.own`
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Node:
    """One operator of the backbone, its attributes decoded."""

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]

    @classmethod
    def read(cls, proto: onnx.NodeProto) -> Node:
        attributes = {a.name: helper.get_attribute_value(a) for a in proto.attribute}
        return cls(proto.op_type, proto.name or proto.output[0], tuple(proto.input), tuple(proto.output), attributes)

    @property
    def output(self) -> str:
        return self.outputs[0]


@dataclass
class Emitter:
    """Collects ONNX nodes in the order in which they are to run; every tensor gets a name of its own."""

    dtype: type[np.floating[Any]] = np.float32
    products: str = STANDARD  # where there is a choice, see `products`
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    externals: dict[str, Shape] = field(default_factory=dict)
    inputs: dict[str, tuple[type[Any], Shape]] = field(default_factory=dict)
    outputs: dict[str, tuple[type[Any], Shape]] = field(default_factory=dict)
    _views: dict[tuple[str, Shape], str] = field(default_factory=dict)

    def __call__(self, op: str, *inputs: str, name: str = "", domain: str = "", **attributes: Any) -> str:
        """Append one node with one output and return the output's name."""
        return self.many(op, *inputs, names=[name or self.fresh(op)], domain=domain, **attributes)[0]

    def many(self, op: str, *inputs: str, names: Sequence[str], domain: str = "", **attributes: Any) -> Sequence[str]:
        """Append one node with several outputs and return their names."""
        node = helper.make_node(op, list(inputs), list(names), name=f"{op}.{names[0]}", domain=domain, **attributes)
        self.nodes.append(node)
        return names

    def fresh(self, stem: str) -> str:
        return f"~{stem.lower()}{len(self.nodes)}"

    def constant(self, value: np.ndarray | float | Sequence[int], kind: type[Any] | None = None) -> str:
        """An inline constant; a number stays 0-d, because a [1]-shaped one broadcasts 100x slower in ONNX Runtime."""
        array = np.asarray(value, kind or self.dtype)
        digest = blake2b(array.tobytes(), digest_size=8).hexdigest()  # equal constants are kept once
        name = f"~const.{array.dtype}.{'x'.join(map(str, array.shape))}.{digest}"
        self.constants[name] = array
        return name

    def shape(self, value: Sequence[int]) -> str:
        """An inline int64 vector: a shape, axes, pads or sizes."""
        return self.constant(list(value), np.int64)

    def input(self, name: str, shape: Shape, kind: type[Any] | None = None) -> str:
        self.inputs[name] = (kind or self.dtype, shape)
        return name

    def external(self, name: str, shape: Shape) -> str:
        """A constant whose values are given when a session is created: weights are never copied into a model."""
        self.externals[name] = shape
        return name

    def output(self, name: str, shape: Shape, kind: type[Any] | None = None) -> str:
        self.outputs[name] = (kind or self.dtype, shape)
        return name

    def reshape(self, x: str, shape: Sequence[int]) -> str:
        """x in another shape: the same memory, but 3 us a node, so that one view serves all who want it."""
        key = (x, tuple(shape))
        if key not in self._views:
            self._views[key] = self("Reshape", x, self.shape(shape))
        return self._views[key]

    def slice(self, x: str, first: Sequence[int], last: Sequence[int], steps: Sequence[int] = ()) -> str:
        """x[:, :, first:last:step] on rows and columns."""
        return self("Slice", x, *map(self.shape, (first, last, (2, 3), *([steps] if steps else []))))

    def sum(self, x: str, axes: Sequence[int], *, keepdims: bool = False) -> str:
        return self("ReduceSum", x, self.shape(axes), keepdims=int(keepdims))

    def model(self) -> onnx.ModelProto:
        """The finished ONNX model."""
        graph = helper.make_graph(
            self.nodes,
            "gradient",
            [_value_info(name, *spec) for name, spec in self.inputs.items()],
            [_value_info(name, *spec) for name, spec in self.outputs.items()],
            [numpy_helper.from_array(array, name) for name, array in self.constants.items()]
            + [_external(name, self.dtype, shape) for name, shape in self.externals.items()],
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
        if any(node.domain == OWN for node in self.nodes):
            opsets.append(helper.make_opsetid(OWN, 1))
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="ksm_edge")


def _value_info(name: str, kind: type[Any], shape: Shape) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(kind)), shape)


def _external(name: str, kind: type[Any], shape: Shape) -> onnx.TensorProto:
    tensor = onnx.TensorProto(name=name, dims=shape, data_type=helper.np_dtype_to_tensor_dtype(np.dtype(kind)))
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="given-at-session-creation")
    return tensor
