"""Images as an app has them -> the backbone's input."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ksm_edge.bundle.layers import InputContract
from ksm_edge.data.image import as_rgb, open_rgb, to_input
from ksm_edge.errors import DataError

# Files are read at this many times the size at most, as adaptation reads them: so an accuracy measured here is
# comparable with the one in the pack, and a photo of 12 megapixels is never in memory whole.
READ_MARGIN = 1.25


def opened(source: str | os.PathLike[str] | bytes, contract: InputContract) -> Image.Image:
    """A file, or the bytes of one, as an image no larger than `as_input` needs, else DataError."""
    return open_rgb(source if isinstance(source, bytes) else Path(source), short_side=_short_side(contract))


def as_input(image: Any, contract: InputContract) -> np.ndarray:
    """A path, a file's bytes, a PIL image or a uint8 array (H, W, 3) or (H, W) -> float32 (3, S, S), else DataError."""
    if isinstance(image, (str, os.PathLike, bytes)):
        return to_input(opened(image, contract), contract)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.shape[2:] not in ((), (3,)) or image.ndim < 2 or not image.size:
            raise DataError(
                f"an array of shape {image.shape} and type {image.dtype} is no image: "
                "give uint8, RGB (H, W, 3) or grey (H, W)"
            )
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise DataError(f"{type(image).__name__} is no image: give a path, a PIL image or a uint8 array")
    return to_input(as_rgb(image, short_side=_short_side(contract)), contract)


def _short_side(contract: InputContract) -> int:
    return int(contract.resize * READ_MARGIN)
