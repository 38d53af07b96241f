"""Training images are never seen twice the same: a random crop, a little colour jitter, a flip where labels survive it.

One resize and one pass over the pixels: brightness, contrast and saturation are all linear in a pixel, and so is the
backbone's normalisation, so their product is one 3x3 matrix and one offset.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ksm_edge.bundle.layers import InputContract
from ksm_edge.data.image import centre_crop, normalise

_GREY = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as Pillow's own conversion
_FLIP_CHANCE = 0.5

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Augmentation:
    """What may happen to a training image. A strength of 0.2 means a random factor in [0.8, 1.2]."""

    crop_scale: float | None  # least share of the image's area, up to all of it; None: the evaluation's crop
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height
    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2
    flip: bool = False  # left and right; traffic signs and text do not survive it

    @classmethod
    def none(cls) -> Augmentation:
        """Training on exactly what evaluation sees."""
        return cls(crop_scale=None, brightness=0, contrast=0, saturation=0)


def augment(
    image: Image.Image, contract: InputContract, augmentation: Augmentation, rng: np.random.Generator
) -> np.ndarray:
    """A random view of an RGB image as the backbone's input: float32 (3, S, S), contiguous, S = `contract.size`.

    The generator is asked for the same numbers whatever is switched on, so that switching one thing leaves the others.
    """
    factors = 1 + np.array([augmentation.brightness, augmentation.contrast, augmentation.saturation]) * rng.uniform(
        -1, 1, 3
    )
    flip = rng.random() < _FLIP_CHANCE and augmentation.flip
    if augmentation.crop_scale is None:
        view = centre_crop(image, contract)
    else:
        box = random_box(image.size, (augmentation.crop_scale, 1.0), augmentation.crop_ratio, rng)
        view = image.resize((contract.size, contract.size), Image.Resampling.BILINEAR, box=box)
    if flip:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return normalise(view, contract) if np.all(factors == 1) else _jittered(view, contract, *factors)


def random_box(
    size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> Box:
    """Left, top, right, bottom (pixels, fractions allowed) of a part with a random share of the area and shape.

    Shares are uniform, shapes log-uniform, as in random resized cropping everywhere; of 10 tries the first that fits
    inside the image. A strip too narrow for any gives its middle, with the nearest shape allowed.
    """
    width, height = size
    shares = rng.uniform(*scale, 10)
    ratios = np.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1]), 10))
    places = rng.random((10, 2))
    widths, heights = np.sqrt(shares * width * height * ratios), np.sqrt(shares * width * height / ratios)
    fitting = np.flatnonzero((widths <= width) & (heights <= height))
    if fitting.size:
        first = fitting[0]
        w, h = float(widths[first]), float(heights[first])
        x, y = places[first]
    else:
        w, h = min(width, height * ratio[1]), min(height, width / ratio[0])
        x, y = 0.5, 0.5
    left, top = float(x) * (width - w), float(y) * (height - h)
    # Rounding may pass the edge by an ulp, which Pillow refuses.
    return left, top, min(left + w, width), min(top + h, height)


def _jittered(
    image: Image.Image, contract: InputContract, brightness: float, contrast: float, saturation: float
) -> np.ndarray:
    """Normalised (3, S, S) of an image whose colours are changed in that order and then clipped to black and white.

    x -> b x, then x -> c x + (1 - c) grey(mean of x), then x -> s x + (1 - s) grey(x)
    """
    pixels = np.moveaxis(np.asarray(image), 2, 0)
    planes = np.ascontiguousarray(pixels, np.float32).reshape(3, -1)
    colour = saturation * np.eye(3) + (1 - saturation) * _GREY  # keeps greys, so the offset passes unchanged
    offset = (1 - contrast) * brightness * float(_GREY @ planes.mean(axis=1))
    mean, std = np.array(contract.mean), np.array(contract.std)

    matrix = (contrast * brightness * colour / (255 * std[:, None])).astype(np.float32)
    shift = ((offset / 255 - mean) / std).astype(np.float32)
    jittered = matrix @ planes
    for plane, change, black, white in zip(jittered, shift, -mean / std, (1 - mean) / std, strict=True):
        plane += change
        np.clip(plane, np.float32(black), np.float32(white), out=plane)
    return jittered.reshape(pixels.shape)
