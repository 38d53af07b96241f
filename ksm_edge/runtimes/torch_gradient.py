"""The numbers of a gradient graph by torch and its autograd: on a GPU, or anywhere else to compare with.

The backbone runs with the same fused weights, so that what autograd finds for them is what the accumulators hold.
Parameters go to the GPU in one piece and their gradients come back in one, at every run. Autograd keeps the whole
forward pass: this is for who has memory, and a GPU that is idle otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from ksm_edge.bundle.layers import Bundle, Layer
from ksm_edge.errors import BudgetError, UnsupportedError
from ksm_edge.fuse import fuse_layer
from ksm_edge.runtimes.compile import CompiledGraph
from ksm_edge.runtimes.pytorch import Attributes, available, conv2d, features, on_device, read_graph

if TYPE_CHECKING:
    import torch

WARM_UP = 3  # runs in front of the one that a CUDA graph records: libraries choose their kernels there
HEAD = "head:"  # begins the names of its parameters; a layer of that name has a point behind it


class TorchGradientSession:
    """What a `GradientSession` is, in torch: image and target in, loss, logits and accumulators out."""

    def __init__(
        self,
        bundle: Bundle,
        graph: CompiledGraph,
        bound: Mapping[str, np.ndarray],
        *,
        threads: int = 1,
        device: str = "cpu",
        half: bool = False,
    ) -> None:
        """`graph`: says what there is to compute; its model is not used. `bound`: as for a `GradientSession`.

        `device`: cpu or cuda. `half`: convs in bfloat16, the parameters and what is accumulated stay float32.
        Raises UnsupportedError where torch is not installed or has no such device.
        """
        require(device)
        import torch

        torch.set_num_threads(threads)
        self._graph, self._bound = graph, bound
        self._device, self._half = torch.device(device), half
        self._backbone = on_device(read_graph(bundle.graph_path), device)
        self._layers = {layer.name: layer for layer in bundle.layers}
        self._shapes = {name: graph.inputs[name] for name in bound if _is_parameter(name)}
        self._constants = {name: self._tensor(array) for name, array in _constants(bundle, graph).items()}
        spec = graph.spec
        self.image = np.zeros((spec.micro_batch, 3, spec.size, spec.size), np.float32)
        self.target = np.zeros((spec.micro_batch, spec.classes), np.float32)
        # Where a CUDA graph finds its inputs.
        self._image = self._tensor(self.image).to(memory_format=torch.channels_last)
        self._target = self._tensor(self.target)
        self._parameters = torch.zeros(sum(map(_size, self._shapes.values())), device=device)
        self._parameters.requires_grad_(spec.backward)
        self._recorded: tuple[torch.cuda.CUDAGraph, dict[str, torch.Tensor]] | None = None
        self._outputs: dict[str, np.ndarray] = {}
        self.has_run = False

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        import torch

        return torch.tensor(array, device=self._device)

    @property
    def accumulators(self) -> dict[str, np.ndarray]:
        """The arrays that runs add to, by name."""
        return {name: self._bound[name] for name in self._graph.accumulators}

    def output(self, name: str) -> np.ndarray:
        """The output `name` of the last run."""
        return self._outputs[name]

    def run(self, *, release: bool = False) -> None:
        """One micro-batch, from `image` and `target`, into the outputs: accumulators are added to.

        `release` has nothing to do here. Raises BudgetError where the GPU's memory does not suffice.
        """
        import torch

        self._send()
        with self._deterministic():
            try:
                # What runs a few times, such as a forward pass behind an epoch, is not worth recording.
                recorded = self._device.type == "cuda" and self._graph.spec.backward
                found = self._replayed() if recorded else self._computed()
            except torch.cuda.OutOfMemoryError as error:
                images = self._graph.spec.micro_batch
                raise BudgetError(
                    f"the GPU has too little memory for {images} images at a time: give a smaller --batch ({error})"
                ) from None
            self._outputs = {name: tensor.cpu().numpy() for name, tensor in found.items()}
        if self._graph.spec.backward:
            self._accumulate(self._outputs.pop("gradient"))
        self.has_run = True

    def _send(self) -> None:
        import torch

        parts = [self._bound[name].reshape(-1) for name in self._shapes]
        with torch.no_grad():
            self._parameters.copy_(torch.from_numpy(np.concatenate(parts)) if parts else self._parameters)
            self._image.copy_(torch.from_numpy(self.image))
            self._target.copy_(torch.from_numpy(self.target))

    @contextmanager
    def _deterministic(self) -> Iterator[None]:
        """Whatever may vary from run to run is off: a training that is gone on with ends as one that never stopped."""
        import torch

        half = torch.autocast(self._device.type, torch.bfloat16, enabled=self._half, cache_enabled=False)
        # Without TF32 float32 is float32; without the cache a CUDA graph records its own casts.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False), half:
            yield

    def _computed(self) -> dict[str, torch.Tensor]:
        """All outputs, and under `gradient` that of all parameters one behind the other."""
        import torch

        spec, found = self._graph.spec, dict[str, torch.Tensor]()
        with torch.set_grad_enabled(spec.backward):
            pieces = self._parameters.split([_size(shape) for shape in self._shapes.values()])
            values = dict(self._constants)
            values |= {name: piece.view(self._shapes[name]) for name, piece in zip(self._shapes, pieces, strict=True)}
            seen = features(self._backbone, self._image, lambda *given: self._conv(values, found, *given)).float()
            if not spec.backward:
                return {"features": seen}
            with torch.autocast(self._device.type, enabled=False):  # each backward operator as its forward one was
                logits = torch.nn.functional.linear(seen, values["head:weight"], values["head:bias"])
                loss = -(self._target * torch.log_softmax(logits, 1)).sum()
                (gradient,) = torch.autograd.grad(loss, self._parameters)
        return {**found, "loss": loss.detach(), "logits": logits.detach(), "gradient": gradient}

    def _conv(
        self,
        values: Mapping[str, torch.Tensor],
        found: dict[str, torch.Tensor],
        name: str,
        x: torch.Tensor,
        attributes: Attributes,
    ) -> torch.Tensor:
        """The layer with its fused weight; with batch statistics also their mean and biased variance into `found`."""
        import torch

        layer, weight = self._layers[name], values[f"{name}.weight"]
        if f"{name}.scale" in values:
            weight = weight * values[f"{name}.scale"][:, None, None, None]
        z = conv2d(x, weight, values[f"{name}.bias"], attributes)
        if f"{name}.gamma" not in values:
            return z
        var, mean = torch.var_mean(z.float(), (0, 2, 3), correction=0)
        found |= {f"{name}.batch_mean": mean.detach(), f"{name}.batch_var": var.detach()}
        factor = values[f"{name}.gamma"] * torch.rsqrt(var + layer.eps)
        offset = values[f"{name}.beta"] - mean * factor
        return z * factor[:, None, None] + offset[:, None, None]

    def _replayed(self) -> dict[str, torch.Tensor]:
        """The same, recorded once as a CUDA graph: small convs take less time than their launches."""
        import torch

        if self._recorded is None:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    self._computed()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                outputs = self._computed()
            self._recorded = graph, outputs
        graph, outputs = self._recorded
        graph.replay()
        return outputs

    def _accumulate(self, gradient: np.ndarray) -> None:
        """Add each parameter's part to the accumulator that it belongs to."""
        pieces = np.split(gradient, np.cumsum([_size(shape) for shape in self._shapes.values()])[:-1])
        for (name, shape), piece in zip(self._shapes.items(), pieces, strict=True):
            if name.startswith(HEAD):
                self._bound[f"{HEAD}d{name.removeprefix(HEAD)}"] += piece.reshape(shape)
                continue
            owner, _, kind = name.rpartition(".")
            if kind == "weight":
                self._add_product(self._layers[owner], piece.reshape(shape))
            else:
                self._bound[f"{owner}.product" if kind == "scale" else f"{owner}.d{kind}"] += piece

    def _add_product(self, layer: Layer, gradient: np.ndarray) -> None:
        """The gradient of a weight (O, I, kh, kw), laid out as the layer's form wants it."""
        name, form = layer.name, self._graph.forms[layer.name]
        by_tap = np.moveaxis(gradient.reshape(*gradient.shape[:2], -1), 2, 0)  # (K, O, I)
        if form == "taps":
            for k, tap in enumerate(by_tap):
                self._bound[f"{name}.product.{k}"] += tap
        else:  # patches, (O, K I), of which pointwise is the case of one tap
            product = self._bound[f"{name}.product"]
            product += by_tap.transpose(1, 0, 2).reshape(product.shape)


def require(device: str) -> None:
    """UnsupportedError where torch is not there or has no such device."""
    reason = available()
    if device == "cuda":
        if reason is None:
            import torch

            reason = None if torch.cuda.is_available() else f"torch {torch.__version__} finds no CUDA GPU"
        else:
            reason = "torch is not installed"
        advice = "NVIDIA's build of torch for this JetPack, or leave out --runtime"
        reason = reason and f"{reason} here: install {advice}"
    if reason is not None:
        raise UnsupportedError(f"learning with torch is not possible: {reason}")


def has_half(device: str) -> bool:
    """Whether it has units for bfloat16, as GPUs since Ampere do; unlike float16 it needs no scaling of the loss."""
    import torch

    return device == "cuda" and torch.cuda.get_device_capability() >= (8, 0)


def _is_parameter(name: str) -> bool:
    """Of what is bound: the others are accumulators, and weights once more."""
    kind = name.replace(":", ".").rpartition(".")[2]
    return kind in ("weight", "scale", "bias", "gamma", "beta")


def _constants(bundle: Bundle, graph: CompiledGraph) -> dict[str, np.ndarray]:
    """Pristine depthwise weights behind a scale; fused weights and biases of layers that do not learn."""
    arrays: dict[str, np.ndarray] = {}
    for layer in bundle.layers:
        weights = bundle.weights[layer.name]
        if layer.name not in graph.spec.trained:
            arrays[f"{layer.name}.weight"], arrays[f"{layer.name}.bias"] = fuse_layer(layer, weights, None)
        elif graph.forms[layer.name] == "channel":
            arrays[f"{layer.name}.weight"] = weights.weight
    return arrays


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape))
