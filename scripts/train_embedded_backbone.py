"""Train the backbone of `ksm_edge/embedded` on permissively licensed images, compressing and distilling MobileNetV2.

    OMP_NUM_THREADS=1 python scripts/train_embedded_backbone.py --data ../shared/data --out ksm_edge/embedded

It starts from the teacher with fewer channels (embedded_start.py). The loss is cross-entropy of one linear head per
data set (Caltech-101, TrashNet, Omniglot), plus, for photographs, one minus the cosine between a linear projection of
the features and the teacher's standardised ones for the same crop. The last step writes the bundle's three files into
`--out`. scikit-learn's digits are the demo task and are never trained on; they are probed at the end.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from embedded_images import CROPS, Box, Images, centre_box, character_view, crop, fixed_boxes, load_images, recolour
from embedded_net import MobileNetV2, embedded_backbone, teacher
from embedded_start import start_from
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from ksm_edge.bundle.freeze import freeze
from ksm_edge.bundle.layers import InputContract
from ksm_edge.bundle.write import write_bundle
from ksm_edge.exporter.weightless import weightless_graph

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE, TEACHER_SIZE = 96, 128  # pixels
SHARES = {"caltech100": 16, "trashnet": 6, "omniglot_small1": 10}  # images of each set in a batch
BATCH = sum(SHARES.values())
START_VIEWS = 8  # batches that the starting point is fitted on
DISTILL = 4.0  # weight of the cosine term
LEARNING_RATE, WEIGHT_DECAY, WARM_UP = 2e-3, 0.02, 300


@dataclass
class Source:
    """A data set in training: where its next image comes from."""

    images: Images
    boxes: list[list[Box]] | None  # None: characters, which have no fixed crops
    targets: Tensor | None  # (n, CROPS, 1280), the teacher's standardised features
    order: np.ndarray
    at: int = 0

    def take(self, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, Tensor | None]:
        """The next `count` views, uint8 (count, SIZE, SIZE, 3), their labels, and the teacher's features if any."""
        if self.at + count > len(self.order):
            self.order, self.at = rng.permutation(len(self.order)), 0
        indices = self.order[self.at : self.at + count]
        self.at += count
        labels = self.images.labels[indices]
        if self.boxes is None or self.targets is None:
            return np.stack([character_view(self.images.images[i], SIZE, rng) for i in indices]), labels, None
        crops = rng.integers(0, CROPS, count)
        views = np.stack(
            [crop(self.images.images[i], self.boxes[i][k], SIZE) for i, k in zip(indices, crops, strict=True)]
        )
        mirrored = rng.random(count) < 0.5
        views[mirrored] = views[mirrored, :, ::-1]
        return views, labels, self.targets[indices, crops]


def normalised(views: np.ndarray) -> Tensor:
    """(N, S, S, 3) in 0..1 -> what the network takes, (N, 3, S, S) in channels-last memory."""
    scaled = (views - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    return torch.from_numpy(scaled.astype(np.float32)).permute(0, 3, 1, 2)


@torch.no_grad()
def features_of(net: nn.Module, images: list[np.ndarray], batch: int = 16) -> Tensor:
    """Features of uint8 images (S, S, 3): (n, F)."""
    net.eval()
    stacks = (np.stack(images[at : at + batch]) for at in range(0, len(images), batch))
    return torch.cat([net(normalised(stack / np.float32(255))) for stack in stacks])


def teacher_targets(net: MobileNetV2, images: Images, boxes: list[list[Box]]) -> Tensor:
    """(n, CROPS, 1280): the teacher's view of every fixed crop."""
    columns = []
    for k in range(CROPS):
        views = [crop(image, box[k], TEACHER_SIZE) for image, box in zip(images.images, boxes, strict=True)]
        columns.append(features_of(net, views))
    return torch.stack(columns, dim=1)


def starting_point(wide: MobileNetV2, sources: dict[str, Source], seed: int) -> MobileNetV2:
    """The narrow network fitted to the teacher on the first views."""
    rng = np.random.default_rng(seed + 2)
    views = [sources[name].take(START_VIEWS * share, rng)[0] for name, share in SHARES.items()]
    net = embedded_backbone().to(memory_format=torch.channels_last)
    start_from(wide, net, normalised(np.concatenate(views) / np.float32(255)))
    return net


def load_sources(wide: MobileNetV2, data: Path, cache: Path) -> dict[str, Source]:
    """All training images with the teacher's standardised features; the features are kept in `cache`."""
    rng = np.random.default_rng(0)  # whatever the run's seed, or the cache would be of other crops
    sources = {}
    for name in SHARES:
        images = load_images(data / f"{name}.zip", "train")
        boxes = None if name == "omniglot_small1" else fixed_boxes(images, rng)
        sources[name] = Source(images, boxes, None, rng.permutation(len(images.labels)))
    photographs = [source for source in sources.values() if source.boxes is not None]
    if cache.is_file():
        targets = list(torch.load(cache, weights_only=True))
    else:
        targets = [teacher_targets(wide, source.images, source.boxes or []) for source in photographs]
        torch.save(targets, cache)
    everything = torch.cat([target.flatten(0, 1) for target in targets])
    mean, std = everything.mean(dim=0), everything.std(dim=0) + 1e-3
    for source, target in zip(photographs, targets, strict=True):
        source.targets = (target - mean) / std
    return sources


def train(net: MobileNetV2, sources: dict[str, Source], steps: int, seed: int) -> nn.ModuleDict:
    """Train the backbone; the heads that were trained with it, one per data set, are returned."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed + 1)
    heads = nn.ModuleDict({name: nn.Linear(512, len(source.images.classes)) for name, source in sources.items()})
    project = nn.Linear(512, 1280)
    parameters = [*net.parameters(), *heads.parameters(), *project.parameters()]
    # Weight decay on matrices only: vectors are biases and batch-norm's.
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=min(0.3, WARM_UP / steps), cycle_momentum=False
    )
    started = time.monotonic()
    net.train()
    for step in range(1, steps + 1):
        parts = {name: sources[name].take(share, rng) for name, share in SHARES.items()}
        views = np.concatenate([part[0] for part in parts.values()]) / np.float32(255)
        features = net(normalised(recolour(views, rng)))
        loss, report, at = torch.zeros(()), {}, 0
        for name, (part, labels, target) in parts.items():
            mine = features[at : at + len(part)]
            at += len(part)
            error = functional.cross_entropy(heads[name](mine), torch.from_numpy(labels), label_smoothing=0.1)
            loss = loss + error * len(part) / BATCH
            report[name] = error.item()
            if target is not None:
                distance = 1 - functional.cosine_similarity(project(mine), target).mean()
                loss = loss + DISTILL * distance * len(part) / BATCH
                report[f"{name} cosine"] = 1 - distance.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps:
            figures = ", ".join(f"{name} {value:.3f}" for name, value in report.items())
            rate = step * BATCH / (time.monotonic() - started)
            print(f"step {step}/{steps}: {figures}; {rate:.0f} images/s", file=sys.stderr, flush=True)
    return heads


def test_accuracies(net: MobileNetV2, heads: nn.ModuleDict, data: Path) -> dict[str, float]:
    """Accuracy of each head on the test part of its data set, centre crop."""
    accuracies = {}
    for name, head in heads.items():
        images = load_images(data / f"{name}.zip", "test")
        features = features_of(net, [crop(image, centre_box(image), SIZE) for image in images.images])
        accuracies[name] = float((head(features).argmax(dim=1).numpy() == images.labels).mean())
    return accuracies


def digits_probe(net: MobileNetV2, seed: int) -> float:
    """Held-out accuracy (a quarter, stratified) of logistic regression on the features of scikit-learn's digits."""
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    digits = load_digits()
    pictures = [Image.fromarray((image * 255 / 16).astype(np.uint8)).convert("RGB") for image in digits.images]
    features = features_of(net, [crop(picture, centre_box(picture), SIZE) for picture in pictures]).numpy()
    parts = train_test_split(features, digits.target, test_size=0.25, stratify=digits.target, random_state=seed)
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=2000)).fit(parts[0], parts[2])
    return float(probe.score(parts[1], parts[3]))


def write_embedded(net: MobileNetV2, report: dict[str, Any], out: Path) -> None:
    """Freeze the backbone and put the bundle's files into `out`, which may hold others (`__init__.py`, README.md)."""
    graph = weightless_graph(net, SIZE)
    frozen = freeze(graph, {name: tensor.numpy() for name, tensor in net.state_dict().items()}, features="output")
    with tempfile.TemporaryDirectory() as folder:
        write_bundle(
            frozen,
            Path(folder) / "bundle",
            recipe="embedded",
            licence="Apache-2.0",
            input_contract=InputContract(SIZE, SIZE, MEAN, STD),
            source={"script": f"scripts/{Path(__file__).name}", "data": list(SHARES), **report},
        )
        for path in (Path(folder) / "bundle").iterdir():
            shutil.copy(path, out / path.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the zips and the teacher's weights")
    parser.add_argument("--steps", type=int, default=9000, help=f"optimizer steps of {BATCH} images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state", type=Path, default=Path("embedded_state.safetensors"), help="state dict to write")
    parser.add_argument("--cache", type=Path, default=Path("embedded_teacher.pt"), help="the teacher's features")
    parser.add_argument("--out", type=Path, help="folder to put the bundle's files into, such as ksm_edge/embedded")
    options = parser.parse_args()
    torch.set_num_threads(1)

    started = time.monotonic()
    wide = teacher(options.data / "mobilenet_v2_imagenet.safetensors").to(memory_format=torch.channels_last)
    sources = load_sources(wide, options.data, options.cache)
    net = starting_point(wide, sources, options.seed)
    print(f"images and teacher ready after {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    heads = train(net, sources, options.steps, options.seed)
    save_file({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, options.state)
    report = {
        "seed": options.seed,
        "steps": options.steps,
        "seconds": round(time.monotonic() - started),
        "test_accuracy": test_accuracies(net, heads, options.data),
        "digits_linear_probe": digits_probe(net, options.seed),
    }
    options.state.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    if options.out:
        write_embedded(net, report, options.out)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
