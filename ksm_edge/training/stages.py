"""Which epochs are learned in images of what size.

Time and activations are in proportion to pixels. A narrow crop shows things larger than evaluation does, so that in
somewhat smaller images they have the size that the network will be judged in (Touvron et al. 2019, "Fixing the
train-test resolution discrepancy"). What is finest is learned at the end, in whole images, when rates are low.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ksm_edge.bundle.layers import Bundle, InputContract
from ksm_edge.training.settings import Settings

PIXELS = 8  # sizes are multiples of


@dataclass(frozen=True)
class Stage:
    """Some epochs (from 0), one behind the other."""

    epochs: range
    input: InputContract  # how images enter training
    views: int  # of each image, of which features are kept; more than epochs would never be looked at

    def view(self, epoch: int) -> int:
        """Which one of all that there are of an image this epoch sees; kept ones take turns."""
        turn = epoch - self.epochs.start
        return self.epochs.start + (turn % self.views if self.views else turn)

    def turn(self, epoch: int) -> float:
        """Of the kept views, where this epoch's is among them: from 0, the first, to 1, the last."""
        return (self.view(epoch) - self.epochs.start) / (self.views - 1) if self.views > 1 else 0.0


def stages(bundle: Bundle, settings: Settings) -> tuple[Stage, ...]:
    """By `train_scale` smaller than evaluation has them, to a multiple of 8 pixels, and from `whole_at` on whole."""
    whole, scale, epochs = bundle.input, settings.train_scale, settings.epochs
    size = min(whole.size, max(PIXELS, PIXELS * round(scale * whole.size / PIXELS))) if scale < 1 else whole.size
    if size == whole.size:
        return (_stage(range(epochs), whole, settings),)
    smaller = replace(whole, size=size, resize=round(whole.resize * size / whole.size))
    first_whole = epochs
    if settings.whole_at < 1 and epochs > 1:  # then the last one is
        first_whole = min(int(settings.whole_at * epochs + 0.5), epochs - 1)
    found = _stage(range(first_whole), smaller, settings), _stage(range(first_whole, epochs), whole, settings)
    return tuple(stage for stage in found if stage.epochs)


def _stage(epochs: range, contract: InputContract, settings: Settings) -> Stage:
    return Stage(epochs, contract, min(settings.views, len(epochs)))
