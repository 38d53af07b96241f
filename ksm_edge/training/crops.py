"""How much of an image a training crop shows at least, by how much of the task is known already.

A wide crop is near to what the network will be judged on, with most backbones a part of the image; a narrow one shows
things larger than that, and parts of them alone. So what is not known yet is learned soonest from wide crops, and a
small backbone, which is far from knowing its training images to the end, gains most by them. One that knows them all
learns nothing more from what it knows: narrow crops keep saying something new. Views that are kept narrow one by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ksm_edge.bundle.layers import InputContract
from ksm_edge.training.settings import NARROW_CROPS, Settings

WIDE_CROPS = 0.8  # least share that crops show while little is known, of what evaluation sees of a square image
UNKNOWN = 0.2  # share of the training images that are answered wrong, from which on crops are wide


def narrows(settings: Settings) -> bool:
    """Whether crops are wide at first, and narrow then.

    Smaller images make up for what narrow crops enlarge.
    """
    return settings.crop_scale is None and settings.train_scale == 1


def crop_scale(
    settings: Settings, contract: InputContract, history: Sequence[Mapping[str, float]], turn: float
) -> float:
    """The least share of an image's area that a crop shows in the epoch behind these.

    `contract`: how evaluation makes an image the backbone's input.
    `history`: a record of each epoch so far, whose training accuracy is that of the images as they were cropped then.
    A training that starts from a pack starts wide as well: nobody knows yet how much it knows.
    `turn`: of views that are kept, which come back when more is known: 0 for the first of them, 1 for the last. Each
    narrows by as much as the one before, and a single one is wide.
    """
    if not narrows(settings):
        return NARROW_CROPS if settings.crop_scale is None else settings.crop_scale
    wide = 1 - turn
    if not settings.views:
        unknown = 1 - history[-1]["train_accuracy"] if history else 1.0
        wide = min(1.0, unknown / UNKNOWN)
    return NARROW_CROPS + (_start(settings, contract) - NARROW_CROPS) * wide


def _start(settings: Settings, contract: InputContract) -> float:
    if settings.crop_start is not None:
        return settings.crop_start
    seen = min(1.0, contract.size / contract.resize) ** 2
    return max(NARROW_CROPS, WIDE_CROPS * seen)
