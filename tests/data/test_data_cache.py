import os
import subprocess
import sys
import threading
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from ksm_edge.data import cache as module
from ksm_edge.data.cache import ImageCache, encode
from ksm_edge.data.image import open_rgb
from ksm_edge.data.image_set import ImageSet, Item
from ksm_edge.data.image_source import MemorySource
from ksm_edge.errors import DataError


class CountingSource(MemorySource):
    """Counts how often each file is read."""

    def __init__(self, files):
        super().__init__(files)
        self.reads = dict.fromkeys(files, 0)

    def read(self, path):
        self.reads[path] += 1
        return super().read(path)


def photo(width, height, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def jpeg(image):
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def image_set(files):
    items = tuple(Item(name, index % 2) for index, name in enumerate(files))
    return ImageSet("made", ("a", "b"), items, (), CountingSource(files))


@pytest.fixture
def mixed():
    """Four large photos, two small ones, three broken files."""
    large = {f"a/large{seed}.jpg": jpeg(photo(640, 480, seed)) for seed in range(4)}
    small = {f"b/small{seed}.jpg": jpeg(photo(60 + 5 * seed, 60, seed)) for seed in range(2)}
    broken = {"c/cut.jpg": large["a/large0.jpg"][:900], "c/empty.jpg": b"", "c/letter.jpg": b"dear reader"}
    return image_set(large | small | broken)


def test_prepare_tells_good_images_from_broken_ones(mixed):
    seen = []
    with ImageCache(mixed, 64, 10**6) as cache:
        good, skipped = cache.prepare(mixed.train, lambda done, total: seen.append((done, total)))
    assert good == list(mixed.train[:6])
    assert [source for source, _ in skipped] == ["c/cut.jpg", "c/empty.jpg", "c/letter.jpg"]
    for (_, reason), part in zip(skipped, ["cut short", "empty", "not an image"], strict=True):
        assert part in reason
        assert "c/" not in reason  # the source is told beside it
    assert seen == [(done, 9) for done in range(1, 10)]


def test_large_images_are_decoded_once_and_small_ones_not_copied(mixed):
    with ImageCache(mixed, 64, 10**6) as cache:
        good, _ = cache.prepare(mixed.train)
        spilled = cache.spilled_bytes
        for _ in range(2):
            for item in good:
                cache.image(item)
        reads = mixed.files.reads
        assert {reads[item.source] for item in good if "large" in item.source} == {1}
        assert {reads[item.source] for item in good if "small" in item.source} == {3}
        assert 0 < spilled == cache.spilled_bytes < 4 * 64 * 86 * 3


def test_a_cached_image_looks_like_the_reduced_original(mixed):
    item = mixed.train[0]
    with ImageCache(mixed, 64, 10**6) as cache:
        first, again = cache.image(item), cache.image(item)
    direct = open_rgb(mixed.read(item), short_side=64)
    assert first.size == again.size == direct.size == (85, 64)
    assert np.abs(np.asarray(again, int) - np.asarray(direct, int)).mean() < 2


def test_an_image_only_a_little_larger_is_not_coded_again(mixed):
    with ImageCache(mixed, 400, 10**7) as cache:
        assert min(cache.image(mixed.train[0]).size) == 400
        assert cache.spilled_bytes == 0


@pytest.mark.parametrize("limit", [0, 5000])
def test_past_the_limit_images_come_from_the_source(limit, mixed):
    with ImageCache(mixed, 64, limit) as cache:
        good, _ = cache.prepare(mixed.train)
        assert len(good) == 6
        assert cache.spilled_bytes <= limit
        assert cache.image(good[3]).size == (85, 64)
    assert mixed.files.reads["a/large3.jpg"] == 2


def test_an_image_has_the_same_pixels_whether_cached_or_not(mixed):
    item = mixed.train[0]
    with ImageCache(mixed, 64, 10**6) as roomy, ImageCache(mixed, 64, 0) as full:
        views = [np.asarray(cache.image(item)) for cache in (roomy, roomy, full, full)]
    assert all(np.array_equal(views[0], view) for view in views)


def test_a_full_disk_is_no_failure(mixed, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "pwrite", full)
    with ImageCache(mixed, 64, 10**6) as cache:
        good, _ = cache.prepare(mixed.train)
        assert len(good) == 6
        assert cache.image(good[0]).size == (85, 64)
        assert cache.spilled_bytes == 0


def test_the_spill_file_lies_in_the_folder_and_leaves_nothing(mixed, tmp_path):
    before = set(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    with ImageCache(mixed, 64, 10**6, folder=tmp_path) as cache:
        cache.prepare(mixed.train)
        assert os.fstat(cache._spill).st_dev == tmp_path.stat().st_dev
        assert os.fstat(cache._spill).st_size == cache.spilled_bytes
        assert list(tmp_path.iterdir()) == []
    if before is not None:
        assert set(os.listdir("/proc/self/fd")) == before
    assert cache.image(mixed.train[0]).size == (85, 64)


def test_a_broken_image_is_named(mixed):
    with ImageCache(mixed, 64, 10**6) as cache, pytest.raises(DataError, match=r"^c/empty\.jpg: the file is empty"):
        cache.image(mixed.train[7])


def test_threads_get_the_right_images():
    shades = {f"{shade}.png": jpeg(Image.new("RGB", (200, 200), (shade, 0, 0))) for shade in range(0, 250, 10)}
    images = image_set(shades)
    wrong = []
    with ImageCache(images, 32, 10**6) as cache:

        def read():
            for item in images.train * 3:
                red = cache.image(item).getpixel((16, 16))[0]
                if abs(red - int(item.source.removesuffix(".png"))) > 3:
                    wrong.append((item, red))

        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert cache.spilled_bytes > 0
    assert wrong == []


def test_line_art_is_kept_without_loss_and_photos_as_jpeg():
    ink = Image.fromarray((np.indices((80, 80)).sum(0) % 16 < 3).astype(np.uint8) * 255).convert("RGB")
    kept = encode(ink)
    assert kept.startswith(b"\x89PNG")
    np.testing.assert_array_equal(np.asarray(open_rgb(kept)), np.asarray(ink))
    assert encode(photo(80, 80)).startswith(b"\xff\xd8")


PREPARE = """
import sys
from ksm_edge.data.cache import ImageCache
from ksm_edge.data.image_set import open_image_set

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

images = open_image_set(sys.argv[1])
with ImageCache(images, 256, 10**8, folder=sys.argv[1]) as cache:
    before = peak()
    good, _ = cache.prepare(images.train)
print(len(good), peak() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize(("kind", "limit_kib"), [("jpg", 16_000), ("png", 90_000)])
def test_twelve_megapixels_never_stand_in_memory_twice(kind, limit_kib, tmp_path):
    """4000x3000 pixels are 48 MB in Pillow: a JPEG is never decoded in full, anything else once."""
    for label, mode in (("a", "RGB"), ("b", "RGB" if kind == "jpg" else "RGBA")):
        (tmp_path / label).mkdir()
        photo(4000, 3000).convert(mode).save(tmp_path / label / f"1.{kind}", quality=90, compress_level=1)
    command = [sys.executable, "-c", PREPARE, str(tmp_path)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    good, grown_kib = map(int, output.split())
    assert good == 2
    assert grown_kib < limit_kib
