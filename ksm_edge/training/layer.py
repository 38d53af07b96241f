"""One layer that learns: its scores and batch-norm, and the arrays that the gradient graph reads and adds to.

The gradient graph gives, summed over the micro-batches of a step, products of dz with what the layer saw. From these
and the pristine weight W, with M the soft mask, f = gamma / sqrt(var + eps) and c, mu conv bias and mean:

    S = W * product, summed over each kernel        dM = f S        df = sum_i M S + (c - mu) dbias
    dgamma = df / sqrt(var + eps)                   dbeta = dbias

Where the graph knows W (`MASK_ALONE`) its product is S already.

With batch statistics f is not part of the weight: dM = S, and dgamma and dbeta come from the graph.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from ksm_edge.autodiff.spec import MASK_ALONE, fused_shape, product_shape, transformed_shape, turned_shape
from ksm_edge.autodiff.tiles import transform_into
from ksm_edge.bundle.layers import Layer, LayerWeights
from ksm_edge.bundle.tensorfile import let_go
from ksm_edge.fuse import fuse_layer, fuse_norm, fuse_weight_into, fused_bias, norm_factor
from ksm_edge.mask import (
    INITIAL_SCORE,
    SoftMask,
    expand,
    reduce_kernels,
    score_shape,
    soft_mask,
)
from ksm_edge.pack.quantize import dequantize_difference, dequantize_scale, quantize_difference, quantize_scale
from ksm_edge.pack.record import LayerState
from ksm_edge.training.adam import Adam, CompactAdam
from ksm_edge.training.blocks import blocks
from ksm_edge.training.felt import feel
from ksm_edge.training.settings import Settings

TURNED_ROWS = 64  # of a matrix that is transposed at once: the lines they lie in stay in the first level of cache
RUNNING = np.float32(0.1)  # share of a batch's statistics in the running ones, as torch has it


class TrainedLayer:
    """State of one layer in training; `form` is how the gradient graph gives its product (see `autodiff.conv`)."""

    def __init__(
        self,
        layer: Layer,
        weights: LayerWeights,
        form: str,
        settings: Settings,
        *,
        masked: bool = True,
        turned: bool = False,
    ) -> None:
        """`masked`: it learns scores.

        `turned`: the graph also reads the weight as (I, O, kh, kw) and flipped.
        """
        self.layer, self.pristine, self.form, self.settings = layer, weights, form, settings
        O = layer.weight_shape[0]
        self.batch_norm = settings.statistics == "batch" and layer.has_norm
        shape = score_shape(layer.weight_shape, settings.granularity) if masked else (0,)
        self.score = np.full(shape, INITIAL_SCORE, np.float32)
        self.gamma, self.beta = weights.gamma.copy(), weights.beta.copy()
        self.mean, self.var = weights.mean.copy(), weights.var.copy()
        self.learning = {"beta": Adam(self.beta)}
        if layer.has_norm:
            self.learning["gamma"] = Adam(self.gamma)
        if masked:
            self.learning["score"] = (CompactAdam if settings.moment_bits == 8 else Adam)(self.score, scores=True)
        self.settled = False  # True: kept kernels stay kept, see `settle`
        self.in_pack_bits = False  # True: the graph reads what a pack would hold
        self.cut = 0  # how many of its scores are
        self.product = np.zeros(product_shape(form, layer), np.float32)
        self.dbias, self.dgamma, self.dbeta = (np.zeros(O, np.float32) for _ in range(3))
        self.weight = np.empty(fused_shape(form, layer), np.float32)
        self.turned = np.empty(turned_shape(layer), np.float32) if turned else None
        # In the domain of the winograd form the weight that runs.
        self.places = np.empty(transformed_shape(layer), np.float32) if form == "winograd" else None
        self.bias = np.empty(O, np.float32)
        self.fuse()

    def bound(self) -> dict[str, np.ndarray]:
        """The arrays a gradient session binds, by the graph's names."""
        name = self.layer.name
        arrays = {f"{name}.bias": self.bias, f"{name}.dbias": self.dbias, f"{name}.product": self.product}
        if self.form == "contracted":
            arrays |= {f"{name}.pristine": self.pristine.weight, f"{name}.mask": self.weight[:, :, None, None]}
        elif self.places is not None:
            arrays |= {f"{name}.pristine": self.pristine.weight, f"{name}.weight": self.places}
        else:
            arrays[f"{name}.scale" if self.form == "channel" else f"{name}.weight"] = self.weight
        if self.form == "pointwise":
            arrays[f"{name}.matrix"] = self.weight[:, :, 0, 0]
        if self.turned is not None:
            arrays[f"{name}.turned"] = self.turned
        if self.form == "taps":
            arrays |= {f"{name}.product.{k}": tap for k, tap in enumerate(self.product)}
        if self.batch_norm:
            arrays |= {f"{name}.gamma": self.gamma, f"{name}.beta": self.beta}
            arrays |= {f"{name}.dgamma": self.dgamma, f"{name}.dbeta": self.dbeta}
        return arrays

    def step(self, rates: dict[str, float], count: int) -> None:
        """One optimizer step from what the accumulators hold, then the next fused weights."""
        self._descend(rates, count)
        if "score" in self.learning and self.settings.cut_penalty:
            distance = self.settings.cut_penalty * rates["score"]
            pull_to_keeping(self.score, distance, from_above=bool(self.settings.amplify))
        self.fuse()

    def _descend(self, rates: dict[str, float], count: int) -> None:
        """By itself, so that the gradients have left memory when the next weights are made."""
        for name, gradient in self.gradients().items():
            if name in self.learning:
                stay = INITIAL_SCORE if self.settled and name == "score" else math.nan
                self.learning[name].step(gradient, rates[name], count, stay=stay)

    def settle(self, stays: np.ndarray) -> None:
        """Of the cut kernels only those stay cut that `stays`, in the order of the scores, is True for.

        All others are at the initial score from here on, and to be at that score is to stay there.
        """
        staying = self.mask().cut[stays]
        scores = self.score.reshape(-1)[staying]
        self.score[...] = INITIAL_SCORE
        self.score.reshape(-1)[staying] = scores
        self.settled = True
        self.fuse()

    def gradients(self) -> dict[str, np.ndarray]:
        """Gradients of beta and gamma (O,), and under `score` that of the soft mask, score-shaped.

        Made in the accumulator's own memory, where it has room for them: what it held is gone then. Scores, and whether
        they are as a pack holds them, must be those of the last `fuse`.
        """
        felt, weight = self._products()
        if "score" in self.learning and felt.shape != self.score.shape:
            if weight is not None:
                felt *= weight
            felt, weight = reduce_kernels(felt, self.settings.granularity), None
        # The mask is made again: kept, those of all layers would be 9 MiB of ResNet-18.
        mask = None if self.batch_norm else self._mask_as_run()
        total = feel(felt.reshape(len(felt), -1), weight, self._factor(), mask)
        result = {"beta": self.dbeta, "gamma": self.dgamma} if self.batch_norm else {"beta": self.dbias}
        if not self.batch_norm:
            df = total + (self.pristine.bias - self.mean) * self.dbias
            result["gamma"] = df / np.sqrt(self.var + np.float32(self.layer.eps))
        if "score" in self.learning:
            result["score"] = felt
        return result

    def _products(self) -> tuple[np.ndarray, np.ndarray | None]:
        """S, (O, I), (O, 1) in the channel form, or (O, I, kh, kw) for element-wise masks, or the two that it is the
        product of; the first is the accumulator's own memory, if that is as large.
        """
        W, product = self.pristine.weight, self.product
        O, I, kh, kw = W.shape
        if self.form == "channel":
            return product[:, None], None
        if self.form in MASK_ALONE:
            return product, None
        if self.settings.granularity == "element":
            return np.multiply(W, self._taps().transpose(1, 2, 0).reshape(O, I, kh, kw), order="C"), None
        if self.form == "pointwise":
            return product, W[:, :, 0, 0]
        return np.einsum("oik,koi->oi", W.reshape(O, I, kh * kw), self._taps(), order="C"), None

    def _taps(self) -> np.ndarray:
        """The product as (K, O, I), whichever of the forms that know single weights it has."""
        O, I, kh, kw = self.pristine.weight.shape
        if self.form == "patches":
            return self.product.reshape(O, kh * kw, I).transpose(1, 0, 2)
        return self.product.reshape(kh * kw, O, I)

    def mask(self) -> SoftMask:
        """The layer's soft mask, from its scores as they are now."""
        return soft_mask(self.score, soft=self.settings.soft, amplify=bool(self.settings.amplify))

    def _factor(self) -> np.ndarray:
        """What the graph's weight carries of batch-norm: f, or ones with batch statistics."""
        if self.batch_norm:
            return np.ones_like(self.gamma)
        return norm_factor(self._as_run(self.gamma, self.pristine.gamma), self.var, self.layer.eps)

    def _as_run(self, value: np.ndarray, pristine: np.ndarray) -> np.ndarray:
        """gamma or beta, with `in_pack_bits` as a pack would hold it: gradients go straight through that."""
        if not self.in_pack_bits:
            return value
        bits = self.settings.pack_bits["norm_bits"]
        return pristine + dequantize_difference(*quantize_difference(value - pristine, bits))

    def fuse(self) -> None:
        """Make the weight and bias that the graph reads, in place; the pristine weight then leaves memory."""
        factor, mask = self._factor(), self._mask_as_run()
        self.cut = 0 if mask is None else mask.cut.size
        if self.form in MASK_ALONE:
            self._mask_into(self.weight, mask, factor)
        else:
            fuse_weight_into(self.weight, self.pristine.weight, mask, factor, self.settings.granularity)
        self._fuse_places()
        let_go(self.pristine.weight)
        if self.turned is not None:
            self._turn(self.turned)
        if self.batch_norm:
            self.bias[:] = self.pristine.bias
        else:
            self.bias[:] = fused_bias(
                self._as_run(self.beta, self.pristine.beta), self.pristine.bias, self.mean, factor
            )

    def _fuse_places(self) -> None:
        if self.places is not None:
            transform_into(self.places, self.pristine.weight, self.weight)

    def _turn(self, out: np.ndarray) -> None:
        for rows in range(0, len(self.weight), TURNED_ROWS):
            part = slice(rows, rows + TURNED_ROWS)
            out[:, part] = self.weight[part, :, ::-1, ::-1].swapaxes(0, 1)

    def show(self, state: LayerState) -> None:
        """Put a pack's weight and bias in place of the layer's own, until the next `fuse`."""
        if self.form in MASK_ALONE:
            factor, self.bias[:] = fuse_norm(self.layer, self.pristine, state)
            self._mask_into(self.weight, state.mask, factor)
            self._fuse_places()
        else:
            _, self.bias[:] = fuse_layer(self.layer, self.pristine, state, self.settings.granularity, self.weight)
        let_go(self.pristine.weight)

    def _mask_as_run(self) -> SoftMask | None:
        """The mask that the graph's weight carries, with `in_pack_bits` as a pack would hold it."""
        if "score" not in self.learning:
            return None
        mask = self.mask()
        if not self.in_pack_bits:
            return mask
        bits = self.settings.scale_bits  # the scale has no gradient: only its values change
        return replace(mask, cut_scale=dequantize_scale(quantize_scale(mask.cut_scale, bits), bits))

    def _mask_into(self, out: np.ndarray, mask: SoftMask | None, factor: np.ndarray) -> None:
        """M f, (O,) for depthwise layers or (O, I)."""
        O, I = self.layer.weight_shape[:2]
        values = 1 if mask is None else expand(mask.values, (O, I, 1, 1), self.settings.granularity)[:, :, 0, 0]
        np.multiply(values, factor[:, None], out=out.reshape(O, I))

    def observe(self, mean: np.ndarray, var: np.ndarray, count: int) -> None:
        """Move the running statistics towards a batch's, `var` being biased, over `count` values a channel."""
        self.mean += RUNNING * (mean - self.mean)
        self.var += RUNNING * (var * np.float32(count / max(1, count - 1)) - self.var)


def pull_to_keeping(score: np.ndarray, distance: float, *, from_above: bool = False) -> None:
    """Move scores below the initial one up to it by at most `distance`, in place; others stay as they are.

    `from_above`: those above it as well, down to it. That is a step of an L1 penalty on how far they are from it, taken
    beside Adam's as weight decay is in AdamW (Loshchilov and Hutter 2019): in the gradient, Adam would divide it away.
    A score then moves away only if its gradient keeps its sign.
    """
    down = np.float32(distance if from_above else 0)
    for (part,) in blocks(score):
        np.clip(np.float32(INITIAL_SCORE), part - down, part + np.float32(distance), out=part)
