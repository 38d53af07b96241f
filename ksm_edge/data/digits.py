"""A small real task that comes with a dependency: scikit-learn's 1,797 handwritten digits.

Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998,
CC BY 4.0; the copy in scikit-learn (BSD-3-Clause) is its test part, 8x8 pixels with values 0..16.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
from PIL import Image

from ksm_edge.data.image_set import ImageSet, Item
from ksm_edge.data.image_source import MemorySource
from ksm_edge.data.split import stratified_split
from ksm_edge.errors import UsageError

SIDE = 32  # pixels; 8 scaled up smoothly, or bilinear resizing to a backbone's input shows the grid
TEST_FRACTION = 0.25


def digits() -> ImageSet:
    """The digits as an ImageSet: classes 0 to 9, a fixed test part of 25 %. UsageError without scikit-learn."""
    pixels, labels = _load()
    train, test = stratified_split(labels, TEST_FRACTION, seed=0)
    files: dict[str, bytes] = {}
    items: dict[str, tuple[Item, ...]] = {}
    for part, indices in (("train", train), ("test", test)):
        listed = [Item(f"{part}/{labels[index]}/{index:04d}.pgm", int(labels[index])) for index in indices]
        files.update((item.source, _image_file(pixels[index])) for item, index in zip(listed, indices, strict=True))
        items[part] = tuple(sorted(listed, key=lambda item: item.source))
    return ImageSet("digits", tuple("0123456789"), items["train"], items["test"], MemorySource(files))


def _image_file(pixels: np.ndarray) -> bytes:
    """An (8, 8) array of 0..16 as a PGM file: unlike PNG, its bytes depend on no compressor's version."""
    small = Image.fromarray(np.round(pixels * (255 / 16)).astype(np.uint8))
    large = small.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return b"P5 %d %d 255\n" % large.size + large.tobytes()


def _load() -> tuple[np.ndarray, np.ndarray]:
    """Pixels (1797, 8, 8) and labels (1797,).

    Read straight from scikit-learn's folder where it is found there: importing sklearn loads scipy too, which takes
    seconds and some 100 MB on a board.
    """
    package = importlib.util.find_spec("sklearn")
    if package is None or not package.submodule_search_locations:
        raise UsageError("the digits demo needs scikit-learn: pip install 'ksm-edge[demo]'")
    table = Path(package.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
    if table.is_file():
        rows = np.loadtxt(table, delimiter=",", dtype=np.int64)
        return rows[:, :-1].reshape(-1, 8, 8), rows[:, -1]
    from sklearn.datasets import load_digits

    loaded = load_digits()
    return loaded.images, loaded.target
