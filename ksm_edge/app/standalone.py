"""A task as files that a runtime opens alone, with none of this project's code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from ksm_edge.bundle.layers import Bundle
from ksm_edge.bundle.mobile import HEAD_BIAS, HEAD_WEIGHT, mobile_program, task_labels
from ksm_edge.fuse import fuse
from ksm_edge.pack.record import Pack

if TYPE_CHECKING:
    import onnx


def onnx_model(bundle: Bundle, pack: Pack) -> onnx.ModelProto:
    """One model with all weights inside: image (N, 3, S, S) float32 -> logits (N, C).

    Its metadata has the task's name, and as JSON the classes in the order of the logits and the input contract.
    """
    import onnx

    model = onnx.load(bundle.graph_path, load_external_data=False)
    put_inside(model, fuse(bundle, pack) | {HEAD_WEIGHT: pack.head_weight, HEAD_BIAS: pack.head_bias})
    (features,) = model.graph.output
    inputs = [features.name, HEAD_WEIGHT, HEAD_BIAS]
    model.graph.node.append(onnx.helper.make_node("Gemm", inputs, ["logits"], "ksm_edge.head", transB=1))
    batch = model.graph.input[0].type.tensor_type.shape.dim[0].dim_param or "N"
    del model.graph.output[:]
    model.graph.output.append(
        onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, [batch, len(pack.classes)])
    )
    contract = {name: getattr(bundle.input, name) for name in ("size", "resize", "mean", "std")}
    facts = {"task": pack.task, "classes": json.dumps(pack.classes, ensure_ascii=False), "input": json.dumps(contract)}
    onnx.helper.set_model_props(model, facts)
    onnx.checker.check_model(model)
    return model


def put_inside(model: onnx.ModelProto, weights: Mapping[str, np.ndarray]) -> None:
    """Give a graph its weights, in the place of initializers that lay outside."""
    import onnx

    own = [tensor for tensor in model.graph.initializer if tensor.name not in weights]
    del model.graph.initializer[:]
    model.graph.initializer.extend(own)
    tensors = (onnx.numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in weights.items())
    model.graph.initializer.extend(tensors)


def executorch_files(bundle: Bundle, pack: Pack) -> tuple[bytes, str]:
    """A data file that ExecuTorch opens beside the bundle's `backbone.pte`, and as JSON the classes and the input.

    Raises UnsupportedError for a bundle without a program, UsageError for more classes than that has rows.
    """
    program = mobile_program(bundle.path)
    data = program.data_with(fuse(bundle, pack), pack.head_weight, pack.head_bias)
    return data, task_labels(bundle, program, pack.classes)
