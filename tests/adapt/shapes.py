"""A folder of images small enough to learn in seconds: squares, discs and stripes in their own colours, with noise."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("disc", "square", "stripes")


def draw(kind: str, rng: np.random.Generator, side: int = 22) -> Image.Image:
    rows, columns = np.mgrid[:side, :side]
    row, column = rng.integers(side // 3, 2 * side // 3, 2)
    shape = {
        "disc": (rows - row) ** 2 + (columns - column) ** 2 < 36,
        "square": np.maximum(abs(rows - row), abs(columns - column)) < 5,
        "stripes": (rows + row) % 6 < 3,
    }[kind]
    colour = {"disc": (200, 60, 60), "square": (60, 200, 60), "stripes": (60, 60, 200)}[kind]
    pixels = np.where(shape[:, :, None], colour, 128) + rng.normal(0, 25, (side, side, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def make_shapes(folder: Path, count: int = 14, test: int = 0, corrupt: Mapping[str, int] | None = None) -> Path:
    """`count` images a class, in train/ where there is a test/ too; `corrupt` ones a class come on top."""
    rng = np.random.default_rng(0)
    for part, n in (("train" if test else "", count), ("test", test)):
        for kind in CLASSES if n else ():
            place = folder / part / kind
            place.mkdir(parents=True)
            for i in range(n):
                draw(kind, rng).save(place / f"{i:02}.png")
    for kind, n in (corrupt or {}).items():
        place = folder / ("train" if test else "") / kind
        place.mkdir(parents=True, exist_ok=True)
        for i in range(n):
            (place / f"broken{i}.png").write_bytes(b"\x89PNG\r\n\x1a\nbut no image")
    return folder
