"""Batches in an order, and with an augmentation, that follow from seed, epoch and image alone.

So a training that was interrupted goes on with exactly the batches it would have had, and needs no stored random state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ksm_edge.bundle.layers import InputContract
from ksm_edge.data.augment import Augmentation, augment
from ksm_edge.data.cache import ImageCache
from ksm_edge.data.image import to_input
from ksm_edge.data.image_set import Item

# A seed's first number tells the uses apart: numpy pads seeds with zeros, so (seed, epoch) alone would equal
# (seed, epoch, image 0).
_ORDER, _AUGMENT = 1, 2


@dataclass(frozen=True)
class Batch:
    """Images as the backbone wants them, what they show, and which of the items they are."""

    images: np.ndarray  # float32 (n, 3, S, S), or what a front made of them
    labels: np.ndarray  # int64 (n,)
    indices: np.ndarray  # int64 (n,), into the items


def training_order(count: int, seed: int, epoch: int, shown: int | None = None) -> np.ndarray:
    """The images of an epoch (from 0) in their order, int64: all `count`, or `shown` of them, other ones each time."""
    return np.random.default_rng([_ORDER, seed, epoch]).permutation(count)[:shown]


def training_batches(
    cache: ImageCache,
    items: Sequence[Item],
    contract: InputContract,
    *,
    batch: int,
    seed: int,
    epoch: int,
    augmentation: Augmentation,
    first_step: int = 0,
    part: int | None = None,
    shown: int | None = None,
) -> Iterator[Batch]:
    """An epoch's ceil(len(items) / batch) batches, shuffled and augmented, from step `first_step` on.

    The last one may be smaller. `part`: give each batch in parts of that many images, one after the other. `shown`: an
    epoch is of so many of the items. Raises DataError for an image that can no longer be read.
    """
    order = training_order(len(items), seed, epoch, shown)
    for indices in parts_of_batches(order, batch, first_step=first_step, part=part):
        yield training_views(cache, items, contract, indices, seed=seed, view=epoch, augmentation=augmentation)


def parts_of_batches(
    order: np.ndarray, batch: int, *, first_step: int = 0, part: int | None = None
) -> Iterator[np.ndarray]:
    """The order cut into batches, and these into parts, from step `first_step` on."""
    for start in range(first_step * batch, len(order), batch):
        whole = order[start : start + batch]
        for first in range(0, len(whole), part or batch):
            yield whole[first : first + (part or batch)]


def training_views(
    cache: ImageCache,
    items: Sequence[Item],
    contract: InputContract,
    indices: np.ndarray,
    *,
    seed: int,
    view: int,
    augmentation: Augmentation,
) -> Batch:
    """These images as they are seen in epoch `view` (from 0). Raises DataError for one that can no longer be read."""

    def seen(index: int) -> np.ndarray:
        rng = np.random.default_rng([_AUGMENT, seed, view, index])
        return augment(cache.image(items[index]), contract, augmentation, rng)

    return _batch(items, indices, [seen(int(index)) for index in indices])


def evaluation_batches(
    cache: ImageCache, items: Sequence[Item], contract: InputContract, *, batch: int
) -> Iterator[Batch]:
    """All items in their order, as evaluation sees them. Raises DataError for an image that can no longer be read."""
    for start in range(0, len(items), batch):
        part = items[start : start + batch]
        indices = np.arange(start, start + len(part), dtype=np.int64)
        yield _batch(items, indices, [to_input(cache.image(item), contract) for item in part])


def _batch(items: Sequence[Item], indices: np.ndarray, images: list[np.ndarray]) -> Batch:
    labels = np.array([items[index].label for index in indices], np.int64)
    return Batch(np.stack(images), labels, indices)
