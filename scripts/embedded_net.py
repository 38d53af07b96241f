"""MobileNetV2 of any width in plain torch, with torchvision's state-dict names: the teacher and the embedded backbone.

Source: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018 (arXiv 1801.04381), table 2.
Written out because it needs no torchvision, whose class fixes the width of the last conv at 1280.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

Stage = tuple[int, int, int, int]  # expansion, out-channels, blocks, stride of the first block

TEACHER_STAGES: tuple[Stage, ...] = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
# Width 0.35, rounded to multiples of 8 as the paper's code does.
EMBEDDED_STAGES: tuple[Stage, ...] = (
    (1, 8, 1, 1),
    (6, 8, 2, 2),
    (6, 16, 3, 2),
    (6, 24, 4, 2),
    (6, 32, 3, 1),
    (6, 56, 3, 2),
    (6, 112, 1, 1),
)


def conv_norm(i: int, o: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Conv without bias, batch-norm, ReLU6."""
    conv = nn.Conv2d(i, o, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(o), nn.ReLU6())


class InvertedResidual(nn.Module):
    """1x1 expand, 3x3 depthwise, linear 1x1; a shortcut where shapes allow."""

    def __init__(self, i: int, o: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = i * expansion
        expand = [conv_norm(i, hidden, 1)] if expansion != 1 else []
        depthwise = conv_norm(hidden, hidden, 3, stride, groups=hidden)
        self.conv = nn.Sequential(*expand, depthwise, nn.Conv2d(hidden, o, 1, bias=False), nn.BatchNorm2d(o))
        self.shortcut = stride == 1 and i == o

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.shortcut else self.conv(x)


class MobileNetV2(nn.Module):
    """image (N, 3, H, W) -> pooled features (N, last)."""

    def __init__(self, stem: int, stages: Sequence[Stage], last: int) -> None:
        super().__init__()
        blocks: list[nn.Module] = [conv_norm(3, stem, 3, 2)]
        width = stem
        for expansion, o, count, stride in stages:
            for index in range(count):
                blocks.append(InvertedResidual(width, o, stride if index == 0 else 1, expansion))
                width = o
        self.features = nn.Sequential(*blocks, conv_norm(width, last, 1))
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, image: Tensor) -> Tensor:
        return self.pool(self.features(image)).flatten(1)


def embedded_backbone() -> MobileNetV2:
    """The network of `ksm_edge/embedded`: 16-channel stem, width 0.35, 512 features."""
    return MobileNetV2(16, EMBEDDED_STAGES, 512)


def teacher(weights: Path) -> MobileNetV2:
    """MobileNetV2 1.0 without its classifier, 1280 features, in evaluation mode; `weights` has torchvision's names."""
    net = MobileNetV2(32, TEACHER_STAGES, 1280)
    state = {name: tensor for name, tensor in load_file(weights).items() if name.startswith("features.")}
    net.load_state_dict(state)
    return net.eval().requires_grad_(False)
