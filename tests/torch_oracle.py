"""The same networks and method in torch with autograd, written as the paper says: what gradients are held to."""

from __future__ import annotations

import numpy as np
import onnx
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own custom

from ksm_edge.bundle.layers import Bundle
from ksm_edge.mask import SHARPNESS, THRESHOLD, expand, soft_mask
from ksm_edge.runtimes.pytorch import decoded, features, with_weights


def run(
    backbone: onnx.ModelProto, weights: dict[str, torch.Tensor], image: torch.Tensor, after_conv=None
) -> torch.Tensor:
    """Features of a canonical backbone; `after_conv(layer, z)` may stand between a conv and what follows."""
    plain = with_weights(weights)
    conv = plain if after_conv is None else lambda name, x, a: after_conv(name, plain(name, x, a))
    return features(decoded(backbone.graph), image, conv)


class KsmTask:
    """One task's parameters as torch leaves, its loss, and so the gradients by autograd."""

    def __init__(
        self,
        bundle: Bundle,
        scores: dict[str, np.ndarray],
        granularity: str,
        *,
        soft: bool = True,
        amplify: bool = False,
        batch_statistics: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.bundle, self.granularity, self.soft, self.amplify = bundle, granularity, soft, amplify
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
        mask = soft_mask(score.detach().numpy(), soft=self.soft, amplify=self.amplify)
        values = torch.tensor(mask.values, dtype=self.dtype)
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
