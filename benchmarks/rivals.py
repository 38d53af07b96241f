"""What a workstation would do with torch: full fine-tuning, conv LoRA with the package peft, and KSM as it is written.

    python benchmarks/rivals.py full DATA --bundle BUNDLE
    python benchmarks/rivals.py lora:8 DATA --bundle BUNDLE
    python benchmarks/rivals.py ksm DATA --bundle BUNDLE      # what the device's trainer must agree with

Prints one JSON object. Images, split, order, augmentation, targets, number of steps and the rates' schedule are those
of `ksm-edge adapt`; the epoch is chosen by the same rule on the same validation split, which joins what is
learned from by the same rule, and the test set is read once, at the end. `accuracy.py` runs this.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import measure  # noqa: F401  # puts this checkout first on the path
import numpy as np
import torch

from ksm_edge.adapt.journey import CACHE_BYTES, CACHE_MARGIN
from ksm_edge.app.images import as_input
from ksm_edge.bundle.layers import Bundle, Layer, LayerWeights
from ksm_edge.bundle.load import load_bundle
from ksm_edge.data.augment import Augmentation
from ksm_edge.data.batches import Batch, evaluation_batches, training_batches
from ksm_edge.data.cache import ImageCache
from ksm_edge.data.image_set import ImageSet, open_image_set
from ksm_edge.data.split import stratified_split
from ksm_edge.exporter.torchvision_shim import import_torchvision
from ksm_edge.mask import INITIAL_SCORE, THRESHOLD
from ksm_edge.resident import peak_rss_bytes
from ksm_edge.runtimes.pytorch import Attributes, features, read_graph
from ksm_edge.training.adam import rate_factor
from ksm_edge.training.choice import as_good, is_judged
from ksm_edge.training.crops import crop_scale
from ksm_edge.training.settings import Settings
from ksm_edge.training.suited import rate_scale
from ksm_edge.training.targets import target_rows

# Each method's better one of two on the validation split of pacs_sketch7, seed 0, at 96 px, with --no-test: 3e-4 and
# 1e-4 for full, 3e-3 and 1e-3 for lora.
RATE = {"full": 3e-4, "lora": 1e-3, "ksm": Settings().score_rate}
WARMUP = 0.05  # of those that have rates of their own
EVALUATION_BATCH = 32


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", metavar="full|lora:RANK|ksm")
    parser.add_argument("data", metavar="DATA", help="folder or zip, as for `ksm-edge adapt`")
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=Settings().epochs)
    parser.add_argument("--batch", type=int, default=Settings().batch)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, help="Adam's, of all but the head (default: the method's)")
    parser.add_argument("--no-test", action="store_true", help="leave the test set alone: for choosing")
    return parser


def main() -> int:
    options = arguments().parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    settings = Settings(epochs=options.epochs, batch=options.batch, seed=options.seed)
    bundle, images = load_bundle(options.bundle), open_image_set(options.data)
    kind, _, rank = options.method.partition(":")
    network: torch.nn.Module = Network(bundle, len(images.classes))
    if kind == "lora":
        network = with_lora(network, int(rank))
    elif kind == "ksm":
        network = with_masks(network)
    elif kind != "full":
        raise SystemExit(f"method {options.method!r}: expected full, lora:RANK or ksm")
    network = network.to(memory_format=torch.channels_last)  # the faster layout on CPUs
    rate = options.rate or RATE[kind]
    began = time.perf_counter()
    report = learn(network, bundle, images, settings, rate, statistics="batch" if kind == "full" else "frozen")
    report |= {"wall_seconds": time.perf_counter() - began, "peak_rss_bytes": peak_rss_bytes()}
    if not options.no_test:
        report["test_accuracy"] = accuracy(network, _test_batches(images, bundle))
        report["test_images"] = len(images.test)
    report |= {"rate": rate, "pack_bytes": stored_bytes(network)}
    print(json.dumps(report))
    return 0


class Network(torch.nn.Module):
    """A bundle's backbone as torch modules, conv and batch-norm apart as they were learned, and a head."""

    def __init__(self, bundle: Bundle, classes: int) -> None:
        super().__init__()
        self.graph = read_graph(bundle.graph_path)
        geometry = {node.name: _geometry(node.attributes) for node in self.graph.nodes if node.op == "Conv"}
        self.convs = torch.nn.ModuleDict(
            {
                _key(layer.name): _conv(layer, bundle.weights[layer.name], geometry[layer.name])
                for layer in bundle.layers
            }
        )
        self.norms = torch.nn.ModuleDict(
            {_key(layer.name): _norm(layer, bundle.weights[layer.name]) for layer in bundle.layers if layer.has_norm}
        )
        self.head = torch.nn.Linear(bundle.features, classes)
        torch.nn.init.zeros_(self.head.bias)
        torch.nn.init.zeros_(self.head.weight)  # as the device's trainer begins

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) -> logits (N, C)."""

        def conv(name: str, x: torch.Tensor, attributes: Attributes) -> torch.Tensor:
            top, left, bottom, right = attributes.get("pads", [0] * 4)
            if (top, left) != (bottom, right):  # a Conv2d knows none that differ
                x = torch.nn.functional.pad(x, (left, right, top, bottom))
            z = self.convs[_key(name)](x)
            return self.norms[_key(name)](z) if _key(name) in self.norms else z

        return self.head(features(self.graph, images, conv))


def _key(layer: str) -> str:
    return layer.replace(".", "_")  # torch keeps the dot for itself


def _geometry(attributes: Attributes) -> dict[str, Any]:
    """How a conv's Conv2d is told where its kernel lies."""
    pads = attributes.get("pads", [0] * 4)
    return {
        "stride": attributes.get("strides", 1),
        "padding": pads[:2] if pads[:2] == pads[2:] else 0,
        "dilation": attributes.get("dilations", 1),
    }


def _conv(layer: Layer, weights: LayerWeights, geometry: dict[str, Any]) -> torch.nn.Conv2d:
    O, I, kh, kw = layer.weight_shape
    # Without batch-norm the conv's own bias is what the bundle calls beta.
    conv = torch.nn.Conv2d(I * layer.groups, O, (kh, kw), groups=layer.groups, **geometry)
    bias = weights.bias if layer.has_norm else weights.bias + weights.beta
    conv.weight.data, conv.bias.data = torch.tensor(weights.weight), torch.tensor(bias)
    if layer.has_norm and not weights.bias.any():
        conv.bias = None
    return conv


def _norm(layer: Layer, weights: LayerWeights) -> torch.nn.BatchNorm2d:
    norm = torch.nn.BatchNorm2d(layer.weight_shape[0], eps=layer.eps)
    norm.weight.data, norm.bias.data = torch.tensor(weights.gamma), torch.tensor(weights.beta)
    norm.running_mean, norm.running_var = torch.tensor(weights.mean), torch.tensor(weights.var)
    return norm


def with_lora(network: Network, rank: int) -> torch.nn.Module:
    """LoRA (Hu et al. 2021) on every conv but the depthwise ones, which it cannot factor, and an own head."""
    import_torchvision()  # peft imports it, which fails beside a CPU build of torch
    from peft import LoraConfig, get_peft_model

    names = [f"convs.{name}" for name, conv in network.convs.items() if conv.groups == 1]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names, modules_to_save=["head"])
    return get_peft_model(network, config)


class Mask(torch.autograd.Function):
    """Scores (O, I) to the soft mask, with the gradient of a sigmoid around the threshold."""

    @staticmethod
    def forward(context: Any, score: torch.Tensor) -> torch.Tensor:
        context.save_for_backward(score)
        keep = (score >= THRESHOLD).to(score)
        cut = score * (1 - keep)
        span = cut.max() - cut.min()
        scale = 0.5 * (cut - cut.min()) / span if span > 0 else torch.zeros_like(cut)
        return keep + scale * (1 - keep)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> torch.Tensor:
        (score,) = context.saved_tensors
        g = torch.sigmoid(12 * (score - THRESHOLD))
        return gradients[0] * 12 * g * (1 - g)


class MaskedConv(torch.nn.Module):
    """A frozen conv, each of its kernels times the mask of its score."""

    def __init__(self, conv: torch.nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv.requires_grad_(False)
        self.score = torch.nn.Parameter(torch.full(conv.weight.shape[:2], INITIAL_SCORE))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.conv.weight * Mask.apply(self.score)[:, :, None, None]
        return self.conv._conv_forward(x, weight, self.conv.bias)


def with_masks(network: Network) -> Network:
    """Every conv masked; batch-norm's gamma and beta and the head learn beside."""
    for name, conv in network.convs.items():
        network.convs[name] = MaskedConv(conv)
    return network


def learn(
    network: torch.nn.Module, bundle: Bundle, images: ImageSet, settings: Settings, rate: float, statistics: str
) -> dict[str, Any]:
    """Adam on whatever learns, head and KSM's batch-norm at their own rates; leaves the chosen epoch's in place."""
    with ImageCache(images, int(bundle.input.resize * CACHE_MARGIN), CACHE_BYTES) as cache:
        items, _ = cache.prepare(images.train, lambda done, total: None)
        train, held_out = stratified_split([item.label for item in items], settings.validation, settings.seed)
        learned_from, judged_on = ([items[i] for i in part] for part in (train, held_out))
        steps = settings.epochs * math.ceil(len(learned_from) / settings.batch)
        scale = rate_scale(bundle)
        rates = {"head": settings.head_rate * scale.head, "norms": rate}
        if _is_masked(network):
            rate, rates["norms"] = rate * scale.score, settings.norm_rate * scale.norm
        groups: dict[float, list[torch.nn.Parameter]] = {}
        for name, parameter in network.named_parameters():
            if parameter.requires_grad:
                own = next((own for part, own in rates.items() if part in name), rate)
                groups.setdefault(own, []).append(parameter)
        adam = torch.optim.Adam([{"params": group, "at": own} for own, group in groups.items()])
        history, best, candidates, chosen, kept, joined = [], -1.0, 0, 0, None, False
        for epoch in range(settings.epochs):
            joined = joined or (epoch >= settings.held_out_until and chosen == epoch)
            items = learned_from + judged_on if joined else learned_from
            network.train(statistics == "batch")
            batches = training_batches(
                cache, items, bundle.input, batch=settings.batch, seed=settings.seed, epoch=epoch,
                augmentation=Augmentation(crop_scale(settings, bundle.input, history, 0), flip=settings.flip),
                shown=len(learned_from),
            )  # fmt: skip
            losses, right = _epoch(network, adam, batches, settings, epoch * steps // settings.epochs, steps, images)
            history.append({"epoch": epoch + 1, "loss": float(np.mean(losses)),
                            "train_accuracy": right / len(learned_from)})  # fmt: skip
            if joined or not is_judged(epoch + 1, settings.epochs):
                continue
            judged = evaluation_batches(cache, judged_on, bundle.input, batch=EVALUATION_BATCH)
            found = accuracy(network, ((b.images, b.labels) for b in judged))
            history[-1]["validation_accuracy"] = found
            print(json.dumps(history[-1]), file=sys.stderr)
            best, candidates = max(best, found), candidates + 1
            if as_good(found, best, len(judged_on), candidates):
                chosen, kept = epoch + 1, copy.deepcopy(network.state_dict())
        if not joined:
            network.load_state_dict(kept)
        return {"validation_accuracy": history[chosen - 1]["validation_accuracy"], "judged_epoch": chosen,
                "best_epoch": settings.epochs if joined else chosen,
                "epochs": settings.epochs, "steps": steps, "history": history}  # fmt: skip


def _epoch(
    network: torch.nn.Module, adam: torch.optim.Adam, batches: Iterable[Batch], settings: Settings, done: int,
    steps: int, images: ImageSet,
) -> tuple[list[float], int]:  # fmt: skip
    """One pass over the batches, `done` of the `steps` being done: the losses, and how many answers were right."""
    losses, right = [], 0
    for step, batch in enumerate(batches, done):
        factor = rate_factor(step, steps, settings.warmup if _is_masked(network) else WARMUP)
        for group in adam.param_groups:
            group["lr"] = group["at"] * factor
        rows = target_rows(batch.labels, len(images.classes), settings.label_smoothing, None)
        adam.zero_grad()
        logits = network(_tensor(batch.images))
        loss = -(torch.from_numpy(rows) * torch.log_softmax(logits, 1)).sum()
        loss.backward()
        adam.step()
        losses.append(loss.item())
        right += int((logits.argmax(1).numpy() == batch.labels).sum())
    return losses, right


def _tensor(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).contiguous(memory_format=torch.channels_last)


def accuracy(network: torch.nn.Module, batches: Iterable[tuple[np.ndarray, np.ndarray]]) -> float:
    """The fraction of images whose first answer is right."""
    network.eval()
    with torch.inference_mode():
        right = [network(_tensor(x)).argmax(1).numpy() == labels for x, labels in batches]
    return float(np.concatenate(right).mean())


def _test_batches(images: ImageSet, bundle: Bundle) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    for start in range(0, len(images.test), EVALUATION_BATCH):
        items = images.test[start : start + EVALUATION_BATCH]
        inputs = np.stack([as_input(images.read(item), bundle.input) for item in items])
        yield inputs, np.array([item.label for item in items])


def stored_bytes(network: torch.nn.Module) -> int:
    """A safetensors file, in half precision, of all that a task has changed."""
    from safetensors.torch import save

    learned = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    if any(module.training for module in network.modules()):
        raise ValueError("judge the network first")
    statistics = {name for name in network.state_dict() if "running" in name} if _trains_norm(network) else set()
    state = {name: tensor.half() for name, tensor in network.state_dict().items() if name in learned | statistics}
    return len(save({name: tensor.contiguous() for name, tensor in state.items()}))


def _is_masked(network: torch.nn.Module) -> bool:
    return any(isinstance(module, MaskedConv) for module in network.modules())


def _trains_norm(network: torch.nn.Module) -> bool:
    return any(parameter.requires_grad for name, parameter in network.named_parameters() if name.startswith("norms."))


if __name__ == "__main__":
    sys.exit(main())
