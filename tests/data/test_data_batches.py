from io import BytesIO

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ksm_edge.bundle.layers import InputContract
from ksm_edge.data.augment import Augmentation
from ksm_edge.data.batches import evaluation_batches, training_batches, training_order
from ksm_edge.data.cache import ImageCache
from ksm_edge.data.image import to_input
from ksm_edge.data.image_set import ImageSet, Item, open_image_set
from ksm_edge.data.image_source import MemorySource

CONTRACT = InputContract(16, 18, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
COUNT = 11


def png(seed):
    pixels = np.random.default_rng(seed).integers(0, 255, (30, 24, 3), np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def cache():
    items = tuple(Item(f"{index}.png", index % 3) for index in range(COUNT))
    files = MemorySource({item.source: png(index) for index, item in enumerate(items)})
    with ImageCache(ImageSet("made", ("a", "b", "c"), items, (), files), 18, 10**6) as cache:
        yield cache


def epoch_of(cache, first_step=0, **changes):
    options = {"batch": 4, "seed": 3, "epoch": 2, "augmentation": Augmentation(0.35, flip=True)} | changes
    return list(training_batches(cache, cache.image_set.train, CONTRACT, first_step=first_step, **options))


@given(st.integers(0, 300), st.integers(0, 2**32), st.integers(0, 1000))
def test_an_order_is_a_permutation_that_follows_from_seed_and_epoch(count, seed, epoch):
    order = training_order(count, seed, epoch)
    assert order.dtype == np.int64
    assert sorted(order) == list(range(count))
    np.testing.assert_array_equal(order, training_order(count, seed, epoch))


def test_an_epoch_may_be_of_some_of_the_images_other_ones_each_time(cache):
    np.testing.assert_array_equal(training_order(9, 3, 2, 5), training_order(9, 3, 2)[:5])
    assert len({frozenset(training_order(9, 3, epoch, 5)) for epoch in range(8)}) > 1
    shown = np.concatenate([batch.indices for batch in epoch_of(cache, shown=5)])
    np.testing.assert_array_equal(shown, training_order(COUNT, 3, 2, 5))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {tuple(training_order(50, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_an_epoch_shows_every_image_once_in_its_order(cache):
    batches = epoch_of(cache)
    assert [len(batch.labels) for batch in batches] == [4, 4, 3]
    np.testing.assert_array_equal(np.concatenate([batch.indices for batch in batches]), training_order(COUNT, 3, 2))
    for batch in batches:
        assert batch.images.shape == (len(batch.labels), 3, 16, 16)
        assert (batch.images.dtype, batch.labels.dtype, batch.indices.dtype) == (np.float32, np.int64, np.int64)
        assert batch.images.flags["C_CONTIGUOUS"]
        np.testing.assert_array_equal(batch.labels, batch.indices % 3)


@pytest.mark.parametrize("first_step", range(5))
def test_resuming_gives_exactly_the_remaining_batches(cache, first_step):
    remaining = epoch_of(cache, first_step)
    whole = epoch_of(cache)[first_step:]
    assert len(remaining) == len(whole)
    for resumed, batch in zip(remaining, whole, strict=True):
        np.testing.assert_array_equal(resumed.images, batch.images)
        np.testing.assert_array_equal(resumed.labels, batch.labels)
        np.testing.assert_array_equal(resumed.indices, batch.indices)


def by_image(batches):
    return {int(index): image for batch in batches for index, image in zip(batch.indices, batch.images, strict=True)}


@pytest.mark.parametrize(("part", "sizes"), [(1, [1] * 11), (3, [3, 1, 3, 1, 3]), (4, [4, 4, 3]), (9, [4, 4, 3])])
def test_the_parts_of_a_batch_are_that_batch(cache, part, sizes):
    parts = epoch_of(cache, part=part)
    assert [len(piece.images) for piece in parts] == sizes
    for name in ("images", "labels", "indices"):
        whole = np.concatenate([getattr(batch, name) for batch in epoch_of(cache)])
        np.testing.assert_array_equal(np.concatenate([getattr(piece, name) for piece in parts]), whole)


def test_an_images_view_does_not_depend_on_the_batch_size(cache):
    small, large = by_image(epoch_of(cache, batch=2)), by_image(epoch_of(cache, batch=11))
    assert all(np.array_equal(small[index], large[index]) for index in range(COUNT))


def test_another_epoch_shows_other_views(cache):
    one, two = by_image(epoch_of(cache)), by_image(epoch_of(cache, epoch=3))
    assert not any(np.array_equal(one[index], two[index]) for index in range(COUNT))


def test_evaluation_keeps_order_and_preprocessing(cache):
    items = cache.image_set.train
    batches = list(evaluation_batches(cache, items, CONTRACT, batch=4))
    np.testing.assert_array_equal(np.concatenate([batch.indices for batch in batches]), np.arange(COUNT))
    images = np.concatenate([batch.images for batch in batches])
    for item, image in zip(items, images, strict=True):
        np.testing.assert_array_equal(image, to_input(cache.image(item), CONTRACT))


def test_no_items_give_no_batches(cache):
    assert list(evaluation_batches(cache, (), CONTRACT, batch=4)) == []


def test_a_real_set_gives_normalised_batches(shared_data):
    images = open_image_set(shared_data / "flowers5.zip")
    contract = InputContract(96, 110, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with ImageCache(images, 110, 10**7) as cache:
        good, skipped = cache.prepare(images.train[::100])
        augmentation = Augmentation(0.35)
        batch = next(training_batches(cache, good, contract, batch=16, seed=0, epoch=0, augmentation=augmentation))
        assert cache.spilled_bytes > 0
    assert skipped == []
    assert batch.images.shape == (16, 3, 96, 96)
    assert abs(batch.images.mean()) < 1
    assert 0.7 < batch.images.std() < 1.6
