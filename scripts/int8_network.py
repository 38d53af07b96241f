r"""A network of int8 weights as ONNX in float32, for `ksm-edge export --onnx`.

    python scripts/int8_network.py mcunet-5fps_int8_imagenet.safetensors mcunet_5fps.onnx
    ksm-edge export --onnx mcunet_5fps.onnx --size 128 --resize 146 --mean 0.502 0.502 0.502 --std 0.5 0.5 0.5 \
        --licence MIT --out BUNDLE

The weights are those of github.com/mit-han-lab/tiny-training (MIT): int8 with a scale for each output channel, biases
in units of what both scales make, and beside them a .json of the layers. Batch-norm is folded in.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file

OPSET, IR_VERSION = 17, 8
LOWEST = -128  # a zero point there: what is below 0 was cut off, and what is above 6 by the scale


class Int8Network:
    """ONNX nodes and float32 weights, layer by layer."""

    def __init__(self, weights: Mapping[str, np.ndarray]) -> None:
        """`weights`: the file's tensors, `<layer>.weight`, `<layer>.weight_scale` and `<layer>.bias`."""
        self._weights = weights
        self.nodes: list[onnx.NodeProto] = []
        bounds = {"zero": np.float32(0), "six": np.float32(6)}
        self.initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in bounds.items()]

    def add(self, layer: Mapping[str, Any], x: str) -> str:
        """A layer that takes tensor `x`: the name of what it gives."""
        match layer["op"]:
            case "block":
                return self._block(layer, x)
            case "global_avg_pool":
                return self._node("Flatten", [self._node("GlobalAveragePool", [x], "pool")], "features")
            case "conv" if layer.get("is_classifier"):
                weight, bias = self._parameters(layer, flat=True)
                return self._node("Gemm", [x, weight, bias], "logits", transB=1)
            case "conv":
                return self._conv(layer, x)
            case unknown:
                raise SystemExit(f"no layer of kind {unknown!r} is known")

    def _block(self, block: Mapping[str, Any], x: str) -> str:
        y = x
        for conv in block["convs"]:
            y = self._conv(conv, y)
        return self._node("Add", [x, y], f"blocks.{block['index']}.sum") if block["residual"] else y

    def _conv(self, conv: Mapping[str, Any], x: str) -> str:
        name, size, pad = conv["tensor"], conv["kernel"], conv["padding"]
        attributes = {"kernel_shape": [size] * 2, "strides": [conv["stride"]] * 2, "pads": [pad] * 4}
        z = self._node("Conv", [x, *self._parameters(conv)], name, group=conv["groups"], **attributes)
        return self._node("Clip", [z, "zero", "six"], f"{name}.relu6") if conv["out_zero"] == LOWEST else z

    def _parameters(self, layer: Mapping[str, Any], *, flat: bool = False) -> tuple[str, str]:
        name = layer["tensor"]
        scale = self._weights[f"{name}.weight_scale"].astype(np.float64)
        weight = self._weights[f"{name}.weight"] * scale.reshape(-1, 1, 1, 1)
        bias = self._weights[f"{name}.bias"] * scale * layer["in_scale"]
        named = {f"{name}.weight": weight.reshape(len(weight), -1) if flat else weight, f"{name}.bias": bias}
        self.initializers += [numpy_helper.from_array(array.astype(np.float32), key) for key, array in named.items()]
        return f"{name}.weight", f"{name}.bias"

    def _node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output


def to_onnx(weights: Path) -> onnx.ModelProto:
    """The classifier: float32 images (n, 3, S, S) in -1 to 1 to float32 logits (n, classes)."""
    described = json.loads(weights.with_suffix(".json").read_text())
    network, x = Int8Network(load_file(weights)), "image"
    for layer in described["layers"]:
        x = network.add(layer, x)
    size, classes = described["input"]["size"], described["classes"]
    graph = helper.make_graph(
        network.nodes,
        described["name"].replace("-", "_"),
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, size, size])],
        [helper.make_tensor_value_info(x, TensorProto.FLOAT, ["n", classes])],
        network.initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model, full_check=True)
    return model


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help=".safetensors, with a .json of the same name beside it")
    parser.add_argument("out", type=Path, help=".onnx")
    options = parser.parse_args()
    onnx.save(to_onnx(options.weights), options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
