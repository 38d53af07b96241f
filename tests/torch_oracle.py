"""The same networks and method in torch with autograd, written as the paper says: what gradients are held to."""

from __future__ import annotations

import numpy as np
import onnx
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own custom

from ksm_edge.bundle.layers import Bundle
from ksm_edge.mask import SHARPNESS, THRESHOLD, expand, soft_mask


def run(
    backbone: onnx.ModelProto, weights: dict[str, torch.Tensor], image: torch.Tensor, after_conv=None
) -> torch.Tensor:
    """Features of a canonical backbone; `after_conv(layer, z)` may stand between a conv and what follows."""
    values: dict = {
        t.name: torch.tensor(onnx.numpy_helper.to_array(t)) for t in backbone.graph.initializer if not t.external_data
    }
    values |= {"image": image, **weights}
    for node in backbone.graph.node:
        a = {x.name: onnx.helper.get_attribute_value(x) for x in node.attribute}
        values[node.output[0]] = _apply(node.op_type, [values[name] for name in node.input], a)
        if node.op_type == "Conv" and after_conv is not None:
            values[node.output[0]] = after_conv(node.name, values[node.output[0]])
    return values[backbone.graph.output[0].name]


def _apply(op: str, x: list[torch.Tensor], a: dict) -> torch.Tensor:
    if op == "Conv":
        top, left, bottom, right = a.get("pads", [0] * 4)
        padded = F.pad(x[0], (left, right, top, bottom))
        return F.conv2d(padded, x[1], x[2], a.get("strides", 1), 0, a.get("dilations", 1), a.get("group", 1))
    if op in ("MaxPool", "AveragePool"):
        top, left, bottom, right = a.get("pads", [0] * 4)
        assert (top, left) == (bottom, right) or op == "MaxPool"
        kernel, strides, ceil = a["kernel_shape"], a.get("strides", [1, 1]), bool(a.get("ceil_mode", 0))
        if op == "AveragePool":
            return F.avg_pool2d(x[0], kernel, strides, (top, left), ceil, bool(a.get("count_include_pad", 0)))
        return F.max_pool2d(F.pad(x[0], (left, right, top, bottom), value=-torch.inf), kernel, strides, 0, 1, ceil)
    if op == "Slice":
        result = x[0]
        for start, end, axis, step in zip(*(v.tolist() for v in x[1:]), strict=True):
            result = result[(slice(None),) * axis + (slice(start, min(end, result.shape[axis]), step),)]
        return result
    if op == "Pad":
        pads = x[1].tolist()
        half = len(pads) // 2
        return F.pad(x[0], [p for axis in reversed(range(half)) for p in (pads[axis], pads[axis + half])])
    simple = {
        "Relu": lambda: F.relu(x[0]),
        "Clip": lambda: F.hardtanh(x[0], float(x[1]), float(x[2])),
        "Sigmoid": lambda: torch.sigmoid(x[0]),
        "HardSigmoid": lambda: torch.clamp(x[0] * a.get("alpha", 0.2) + a.get("beta", 0.5), 0, 1),
        "HardSwish": lambda: F.hardswish(x[0]),
        "Add": lambda: x[0] + x[1],
        "Mul": lambda: x[0] * x[1],
        "Concat": lambda: torch.cat(x, a["axis"]),
        "GlobalAveragePool": lambda: x[0].mean((2, 3), keepdim=True),
        "Flatten": lambda: x[0].flatten(1),
    }
    return simple[op]()


class KsmTask:
    """One task's parameters as torch leaves, its loss, and so the gradients by autograd."""

    def __init__(self, bundle: Bundle, scores: dict[str, np.ndarray], granularity: str, *, soft: bool = True,
                 batch_statistics: bool = False, dtype: torch.dtype = torch.float32) -> None:  # fmt: skip
        self.bundle, self.granularity, self.soft = bundle, granularity, soft
        self.batch_statistics, self.dtype = batch_statistics, dtype
        leaf = lambda array: torch.tensor(np.array(array), dtype=dtype, requires_grad=True)  # noqa: E731
        self.score = {name: leaf(score) for name, score in scores.items()}
        self.gamma = {name: leaf(w.gamma) for name, w in bundle.weights.items()}
        self.beta = {name: leaf(w.beta) for name, w in bundle.weights.items()}

    def loss(self, backbone: onnx.ModelProto, head: tuple[np.ndarray, np.ndarray], image: np.ndarray,
             target: np.ndarray) -> torch.Tensor:  # fmt: skip
        """Softmax cross-entropy of weighted target rows, summed; `head` is (weight (C, F), bias (C,))."""
        self.head = [torch.tensor(h, dtype=self.dtype, requires_grad=True) for h in head]
        weights = {}
        for layer in self.bundle.layers:
            w, b = self._weight(layer)
            weights |= {f"{layer.name}.weight": w, f"{layer.name}.bias": b}
        norm = self._normalise if self.batch_statistics else None
        features = run(backbone, weights, torch.tensor(image, dtype=self.dtype), norm)
        logits = features @ self.head[0].T + self.head[1]
        return -(torch.tensor(target, dtype=self.dtype) * F.log_softmax(logits, 1)).sum()

    def _weight(self, layer) -> tuple[torch.Tensor, torch.Tensor]:
        pristine = self.bundle.weights[layer.name]
        t = lambda array: torch.tensor(np.array(array), dtype=self.dtype)  # noqa: E731
        weight = t(pristine.weight)
        if layer.name in self.score:
            weight = weight * self._mask(layer)
        if self.batch_statistics and layer.has_norm:
            return weight, t(pristine.bias)
        factor = self.gamma[layer.name] / torch.sqrt(t(pristine.var) + layer.eps)
        bias = self.beta[layer.name] + (t(pristine.bias) - t(pristine.mean)) * factor
        return weight * factor[:, None, None, None], bias

    def _mask(self, layer) -> torch.Tensor:
        """Hard forward, soft backward; the scale carries no gradient."""
        score = self.score[layer.name]
        values = torch.tensor(soft_mask(score.detach().numpy(), soft=self.soft).values, dtype=self.dtype)
        surrogate = torch.sigmoid(SHARPNESS * (score - THRESHOLD))
        mask = values + surrogate - surrogate.detach()
        if self.granularity == "element":
            return mask
        columns = expand(np.arange(mask.shape[1])[None], layer.weight_shape, self.granularity)[0, :, 0, 0]
        return mask[:, columns, None, None]

    def _normalise(self, name: str, z: torch.Tensor) -> torch.Tensor:
        layer = next(layer for layer in self.bundle.layers if layer.name == name)
        if not layer.has_norm:
            return z
        return F.batch_norm(z, None, None, self.gamma[name], self.beta[name], training=True, eps=layer.eps)
