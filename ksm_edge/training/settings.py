"""How a task is learned: every choice that changes the result, in one frozen record that goes into the pack."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ksm_edge.errors import UsageError
from ksm_edge.mask import group_size
from ksm_edge.pack.format import HEAD_BITS, NORM_BITS, SCALE_BITS

METHODS = ("ksm", "norm", "head")
STATISTICS = ("frozen", "batch")
HEAD_STARTS = ("zero", "random")
MOMENT_BITS, ACTIVATION_BITS, PRODUCT_BITS = (32, 8), (32, 16), (32, 16)
# Of few images each is shown more often, so that all together are as many as this, up to so many times: as many steps
# as a task of a thousand images has, since masks have to form all the same.
SHOWN, MOST_EPOCHS = 9600, 240
NARROW_CROPS = 0.35  # least share of an image's area that crops show of what is known to the end
FEWEST_BITS = {"scale_bits": 1, "norm_bits": 2, "head_bits": 2}
# A smaller pack for some accuracy: docs/pack-size.md has both.
SMALL: Mapping[str, Any] = {"thin": 0.7, "scale_bits": 1, "norm_bits": 3, "head_bits": 3, "learn_in_bits": True}
# Less time for some accuracy: docs/engine.md has both.
FAST: Mapping[str, Any] = {"layers": "35%..", "views": 4, "product_bits": 16}


@dataclass(frozen=True)
class Settings:
    """Defaults suit a small task on a backbone with frozen statistics, where scores want the authors' small rate.

    Nothing rescales there what batch-norm's steps add up to, and a head that has learned nothing yet tells the layers
    in front of it nothing useful: at twice the rate and with a warm-up of 5 % a task far from ImageNet hardly learned.
    """

    method: str = "ksm"  # scores, batch-norm and head | norm: batch-norm and head | head
    layers: str = "*"  # that may change: names or patterns, see `ksm_edge.bundle.layers.select`
    masked: str = "*"  # of those the ones that get a mask; the others learn batch-norm alone
    granularity: str = "kernel"  # kernel, group:N, channel, element
    soft: bool = True  # False: binary masks
    amplify: bool | None = None  # kernels may also grow, to 1.5 to 2 times; None: where a pack has room, see `suited`
    statistics: str = "frozen"  # or batch: normalise with the batch's own, and let the pack have the running ones
    epochs: int = 8
    batch: int = 16  # images per optimizer step
    score_rate: float = 2e-4
    norm_rate: float = 5e-4
    head_rate: float = 5e-4
    scaled_rates: bool = True  # these three are MobileNetV2's, others have theirs: see `suited`
    head_start: str = "zero"  # or random, as torch starts a Linear layer
    cut_penalty: float = 0.0  # every step pulls scores back towards keeping, by this share of the score rate
    mask_bits: float = 0.25  # of the pack for each weight of the backbone, see `suited`: cut kernels go back until then
    thin: float | None = None  # or that share of them; either way those that the loss feels least
    thin_at: float = 0.5  # when, as a share of all steps: the masks have formed, and what is left can still learn
    learn_in_bits: bool = False  # behind the thinning learn with the values of a pack (batch-norm's: if frozen)
    moment_bits: int = 32  # of each of Adam's two for a score, 32 or 8; a plan may choose 8 where memory is short
    activation_bits: int = 32  # of what the forward pass keeps for gradients, 32 or 16, see `autodiff.halved`
    product_bits: int = 32  # of what matrix products multiply, 32, or 16 if that is faster here: `autodiff.products`
    warmup: float = 0.3  # share of all steps in which the rates rise to their full value
    label_smoothing: float = 0.1
    balanced: bool = False  # weigh classes by the inverse of their frequency
    train_scale: float = 1.0  # size of images in the first epochs, as a share of what the backbone takes
    whole_at: float = 0.75  # from when on they are whole, as a share of the epochs; 1: never
    views: int = 0  # of each image, whose features in front of the layers that learn are kept; 0: a new one each epoch
    crop_scale: float | None = None  # least share of an image's area that a training crop shows; None: see `crops`
    crop_start: float | None = None  # that share at first; None: see `crops` too
    flip: bool = False  # horizontal flips: signs and letters do not survive them
    validation: float = 0.1  # share of the training images held out for choosing, until they join
    join_at: float = 0.75  # from when on these are learned from as well, as a share of the epochs; 1: never
    seed: int = 0
    scale_bits: int = SCALE_BITS  # of each cut kernel's scale in the pack, 1 to 8
    norm_bits: int = NORM_BITS  # of each difference of gamma and beta, 2 to 8; with batch statistics 8
    head_bits: int = HEAD_BITS  # of each weight of the head, 2 to 8

    def __post_init__(self) -> None:
        _one_of("method", self.method, METHODS)
        _one_of("statistics", self.statistics, STATISTICS)
        _one_of("head_start", self.head_start, HEAD_STARTS)
        if self.granularity not in ("kernel", "channel", "element"):
            group_size(self.granularity)
        if self.amplify and not self.soft:
            raise UsageError("masks of 0 and 1 do not amplify: leave out one of --binary and --amplify")
        if self.amplify and self.scale_bits == 8:
            raise UsageError("scale_bits 8: where masks amplify, which takes one more, 7 at most")
        bits_known = {"moment_bits": MOMENT_BITS, "activation_bits": ACTIVATION_BITS, "product_bits": PRODUCT_BITS}
        for name, known in bits_known.items():
            if (bits := getattr(self, name)) not in known:
                raise UsageError(f"{name} {bits}: must be one of {', '.join(map(str, known))}")
        for name in ("seed", "views"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} {getattr(self, name)}: must not be negative")
        for name, fewest in FEWEST_BITS.items():
            if not fewest <= getattr(self, name) <= 8:
                raise UsageError(f"{name} {getattr(self, name)}: must be {fewest} to 8")
        for name in ("epochs", "batch"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} {getattr(self, name)}: must be at least 1")
        for name in (
            "score_rate",
            "norm_rate",
            "head_rate",
            "cut_penalty",
            "warmup",
            "label_smoothing",
            "validation",
        ):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{name} {getattr(self, name)}: must lie in [0, 1)")

        for name in ("train_scale", "crop_scale"):
            share = getattr(self, name)
            if share is not None and not 0 < share <= 1:
                raise UsageError(f"{name} {share}: must lie in (0, 1]")
        if self.crop_start is not None and not NARROW_CROPS <= self.crop_start <= 1:
            raise UsageError(f"crop_start {self.crop_start}: must lie in [{NARROW_CROPS}, 1]: crops narrow to that")
        for name in ("whole_at", "join_at"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name} {getattr(self, name)}: must lie in [0, 1]")
        if not 0 < self.thin_at < 1:
            raise UsageError(f"thin_at {self.thin_at}: must lie in (0, 1)")
        if not 0 <= self.mask_bits < math.inf:
            raise UsageError(f"mask_bits {self.mask_bits}: must be finite and at least 0")
        if self.thin is not None and not 0 <= self.thin < 1:
            raise UsageError(f"thin {self.thin}: must lie in [0, 1)")

    @property
    def held_out_until(self) -> int:
        """The epoch, from 1, behind which held-out images may be learned from as well; the last if they never are."""
        return max(1, math.ceil(round(self.join_at * self.epochs, 9)))

    @property
    def pack_bits(self) -> dict[str, int]:
        """As `ksm_edge.pack.format.encode` takes them.

        Statistics of a task's own are folded into gamma and beta, of which a few then differ ten times as much from the
        backbone's as most: fewer than 8 bits round the others away.
        """
        bits = {name: getattr(self, name) for name in FEWEST_BITS}
        return bits | ({"norm_bits": 8} if self.statistics == "batch" else {})


def usual_epochs(images: int) -> int:
    """Passes over that many training images, where nobody asked for another number."""
    return max(Settings().epochs, min(MOST_EPOCHS, -(-SHOWN // max(1, images))))


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"{name} {value!r}: expected one of {', '.join(known)}")
