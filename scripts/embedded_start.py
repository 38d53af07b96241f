"""The embedded backbone's starting point: the teacher with fewer channels, fitted layer by layer on a few images.

Between blocks MobileNetV2's tensors have no activation, so there any basis will do: the leading eigenvectors of the
teacher's second moments are kept. Hidden channels are chosen by what they contribute to their block's output. Every
1x1 conv is then the least-squares fit of what the teacher has there, given what the narrow network already computes
(in the manner of He et al., "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017), and every
batch-norm takes its statistics from the narrow network and its output's moments from the teacher.
"""

from __future__ import annotations

import torch
from embedded_net import InvertedResidual, MobileNetV2
from torch import Tensor, nn

POSITIONS = 20_000  # pixels of all images together that a fit looks at
RIDGE = 1e-4  # relative to the inputs' mean square


@torch.no_grad()
def start_from(wide: MobileNetV2, narrow: MobileNetV2, images: Tensor) -> None:
    """Set every parameter of `narrow` from `wide`, of the same depth; images (n, 3, S, S) as the networks take them."""
    wide.eval(), narrow.eval()
    generator = torch.Generator().manual_seed(0)
    stem, *blocks, last = zip(wide.features, narrow.features, strict=True)
    chosen = _top(_response(stem[0](images)), stem[1][0].out_channels)
    stem[1][0].weight.copy_(stem[0][0].weight[chosen])
    there, here = stem[0](images), stem[1][0](images)
    _moments(stem[1][1], here, stem[0][1](stem[0][0](images))[:, chosen])
    here = stem[1](images)
    bases = _bases([block for block, _ in blocks], there, [block.conv[-1].num_features for _, block in blocks])
    for (block, narrow_block), basis in zip(blocks, bases, strict=True):
        there, here, chosen = _block(block, narrow_block, basis, (there, here, chosen), generator)
    conv, norm, _ = last[1]
    reply = last[0][1](last[0][0](there))
    chosen = _top(last[0][2](reply).mean(dim=(2, 3)).std(dim=0), conv.out_channels)
    _fit(conv, here, reply[:, chosen], generator)
    _moments(norm, conv(here), reply[:, chosen])


def _block(
    block: InvertedResidual,
    narrow: InvertedResidual,
    basis: Tensor,
    state: tuple[Tensor, Tensor, Tensor],
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fit one block. state: the wide and the narrow tensor in front of it, and which channels the latter holds."""
    there, here, chosen = state
    wide_out = block(there)
    *expand, depthwise, project, project_norm = block.conv
    *narrow_expand, narrow_depthwise, narrow_project, narrow_norm = narrow.conv
    hidden = there
    for stage in (*expand, depthwise):
        hidden = stage(hidden)
    if expand:
        weight = basis @ (project.weight[:, :, 0, 0] * _factor(project_norm)[:, None])
        chosen = _top(_response(hidden) * weight.norm(dim=0), narrow_project.in_channels)
        reply = expand[0][1](expand[0][0](there))[:, chosen]
        _fit(narrow_expand[0][0], here, reply, generator)
        _moments(narrow_expand[0][1], narrow_expand[0][0](here), reply)
    narrow_hidden = narrow_expand[0](here) if expand else here
    wide_hidden = expand[0](there) if expand else there
    narrow_depthwise[0].weight.copy_(depthwise[0].weight[chosen])
    reply = depthwise[1](depthwise[0](wide_hidden))[:, chosen]
    _moments(narrow_depthwise[1], narrow_depthwise[0](narrow_hidden), reply)
    narrow_hidden = narrow_depthwise(narrow_hidden)
    target = torch.einsum("oi,nihw->nohw", basis, wide_out)
    if narrow.shortcut:
        target = target - here  # also makes up for what earlier blocks lost
    bias = _fit(narrow_project, narrow_hidden, target, generator)
    made = narrow_project(narrow_hidden)
    _moments(narrow_norm, made, made + bias[:, None, None])
    return wide_out, narrow(here), chosen


def _bases(blocks: list[InvertedResidual], x: Tensor, widths: list[int]) -> list[Tensor]:
    """For the output of each block the basis (width, channels) that keeps most of it; a stage's blocks share one."""
    moments: list[Tensor] = []
    for block in blocks:
        x = block(x)
        moment = torch.einsum("nihw,njhw->ij", x, x) / x[:, 0].numel()
        if block.shortcut:
            moments.append(moments[-1])
            moments[-1] += moment  # in place: the stage's first block holds the same tensor
        else:
            moments.append(moment)
    return [torch.linalg.eigh(m).eigenvectors.flip(1)[:, :w].T for m, w in zip(moments, widths, strict=True)]


def _fit(conv: nn.Conv2d, x: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
    """Set a 1x1 conv to the least-squares map x -> target, both (N, C, H, W); the offset (C,) is returned."""
    rows, goals = x.transpose(0, 1).flatten(1).T, target.transpose(0, 1).flatten(1).T
    picked = torch.randperm(len(rows), generator=generator)[:POSITIONS]
    rows, goals = rows[picked].double(), goals[picked].double()
    mean, goal_mean = rows.mean(dim=0), goals.mean(dim=0)
    rows, goals = rows - mean, goals - goal_mean
    gram = rows.T @ rows
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    weight = torch.linalg.solve(gram, rows.T @ goals).T
    conv.weight.copy_(weight[:, :, None, None])
    return (goal_mean - weight @ mean).float()


def _moments(norm: nn.BatchNorm2d, x: Tensor, target: Tensor) -> None:
    """Give batch-norm the statistics of its input x, and an output with the mean and variance of `target`."""
    norm.running_mean.copy_(x.mean(dim=(0, 2, 3)))
    norm.running_var.copy_(x.var(dim=(0, 2, 3)))
    norm.weight.copy_(target.std(dim=(0, 2, 3)))
    norm.bias.copy_(target.mean(dim=(0, 2, 3)))


def _factor(norm: nn.BatchNorm2d) -> Tensor:
    return norm.weight / (norm.running_var + norm.eps).sqrt()


def _response(x: Tensor) -> Tensor:
    """Root mean square of every channel, (C,)."""
    return x.square().mean(dim=(0, 2, 3)).sqrt()


def _top(score: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest scores, ascending."""
    return score.topk(count).indices.sort().values
