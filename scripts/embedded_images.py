"""The images the embedded backbone learns from, and the views of them that it sees.

Photographs (Caltech-101, TrashNet) are seen through a few fixed crops per image, so that the teacher looks at each crop
once and the backbone, mirrored and recoloured, as often as it likes. Characters (Omniglot) are drawn anew each time.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

CROPS = 6  # fixed crops per photograph
Box = tuple[float, float, float, float]  # left, upper, right, lower, in pixels


@dataclass(frozen=True)
class Images:
    """One split of one data set, decoded: RGB images and their labels, classes in sorted order."""

    images: tuple[Image.Image, ...]
    labels: np.ndarray  # (n,) int64
    classes: tuple[str, ...]


def load_images(archive: Path, split: str) -> Images:
    """Read `split/<class>/*` of a zip."""
    with zipfile.ZipFile(archive) as file:
        names = sorted(name for name in file.namelist() if name.startswith(f"{split}/") and not name.endswith("/"))
        classes = sorted({name.split("/")[1] for name in names})
        images = tuple(Image.open(io.BytesIO(file.read(name))).convert("RGB") for name in names)
    labels = np.array([classes.index(name.split("/")[1]) for name in names])
    return Images(images, labels, tuple(classes))


def centre_box(image: Image.Image) -> Box:
    """The largest centred square."""
    width, height = image.size
    side = min(width, height)
    left, upper = (width - side) / 2, (height - side) / 2
    return (left, upper, left + side, upper + side)


def random_box(image: Image.Image, rng: np.random.Generator, least_area: float = 0.35) -> Box:
    """A random crop of `least_area`..1 of the image, its aspect between 3:4 and 4:3, cut to what fits."""
    width, height = image.size
    area = width * height * rng.uniform(least_area, 1)
    aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    w, h = min((area * aspect) ** 0.5, width), min((area / aspect) ** 0.5, height)
    left, upper = rng.uniform(0, width - w), rng.uniform(0, height - h)
    return (left, upper, left + w, upper + h)


def fixed_boxes(images: Images, rng: np.random.Generator) -> list[list[Box]]:
    """`CROPS` boxes per image: the centred square first, the others random."""
    return [[centre_box(image), *(random_box(image, rng) for _ in range(CROPS - 1))] for image in images.images]


def crop(image: Image.Image, box: Box, size: int) -> np.ndarray:
    """The box of an image at size x size pixels: uint8 (size, size, 3)."""
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))


def character_view(image: Image.Image, size: int, rng: np.random.Generator) -> np.ndarray:
    """A character turned, scaled, moved, blurred and, half of the time, white on black: uint8 (size, size, 3)."""
    grey = image.convert("L")
    side = grey.width
    angle, zoom = np.radians(rng.uniform(-12, 12)), rng.uniform(0.6, 1.2)
    a, b = zoom * np.cos(angle), zoom * np.sin(angle)
    shear = rng.uniform(-0.2, 0.2)
    centre, move = side / 2, rng.uniform(-0.08, 0.08, 2) * side
    # Output (x, y) is read at (a x + (b + shear) y + c, -b x + a y + f), the centre going to the centre plus `move`.
    c = centre - a * centre - (b + shear) * centre + move[0]
    f = centre + b * centre - a * centre + move[1]
    grey = grey.transform(
        (side, side), Image.Transform.AFFINE, (a, b + shear, c, -b, a, f), Image.Resampling.BILINEAR, fillcolor=255
    )
    if rng.random() < 0.35:  # as coarse as a thumbnail
        coarse = int(rng.integers(10, 48))
        grey = grey.resize((coarse, coarse), Image.Resampling.BOX)
    pixels = np.asarray(grey.resize((size, size), Image.Resampling.BILINEAR), np.float32)
    ink, paper = rng.uniform(0, 90), rng.uniform(165, 255)
    if rng.random() < 0.5:
        ink, paper = paper, ink
    view = (ink + (paper - ink) * pixels / 255).astype(np.uint8)
    return np.repeat(view[:, :, None], 3, axis=2)


def recolour(batch: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Jitter brightness, contrast and saturation per image; some become grey, some negative: (N, S, S, 3) in 0..1."""
    n = len(batch)
    brightness, contrast, saturation = rng.uniform(0.7, 1.3, (3, n, 1, 1, 1)).astype(np.float32)
    saturation[rng.random(n) < 0.1] = 0
    negative = rng.random(n) < 0.05
    grey = batch.mean(axis=3, keepdims=True)
    batch = (grey + (batch - grey) * saturation) * brightness
    mean = batch.mean(axis=(1, 2, 3), keepdims=True)
    batch = np.clip(mean + (batch - mean) * contrast, 0, 1)
    batch[negative] = 1 - batch[negative]
    return batch
