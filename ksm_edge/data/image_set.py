"""Labelled images, as people keep them: a folder or a zip with one folder for each class.

    data/train/<class>/*.jpg  and, for a test set,  data/test/<class>/*.jpg
    data/<class>/*.jpg

A zip may have all of it inside one more folder, as zips of a folder do. Classes in sorted order are the labels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ksm_edge.data.image_source import FolderSource, ImageSource, ZipSource, is_image_name
from ksm_edge.errors import DataError

LAYOUT = """expected
    DATA/train/<class>/<image>  and, if there is a test set,  DATA/test/<class>/<image>
or
    DATA/<class>/<image>
in a folder or a zip"""


@dataclass(frozen=True)
class Item:
    """One labelled image: its path inside the set, and the index of its class."""

    source: str
    label: int


@dataclass(frozen=True)
class ImageSet:
    """Classes, training images, test images (none: empty), and where their bytes are."""

    name: str
    classes: tuple[str, ...]
    train: tuple[Item, ...]
    test: tuple[Item, ...]
    files: ImageSource = field(repr=False)
    remarks: tuple[str, ...] = ()  # what was left out and why, a phrase each, to be told to the user

    def read(self, item: Item) -> bytes:
        """The bytes of an image's file; raises DataError naming it."""
        try:
            return self.files.read(item.source)
        except DataError as error:
            raise DataError(f"{item.source}: {error}") from error

    def digest(self) -> str:
        """The data digest: sha256 (hex) over class names and every image's part, path, label and length in bytes.

        It tells data sets apart without reading gigabytes; it is no proof against someone who edits pixels.
        """
        listing = [
            [part, item.source, item.label, self.files.size(item.source)]
            for part, items in (("train", self.train), ("test", self.test))
            for item in sorted(items, key=lambda item: (item.source, item.label))
        ]
        return hashlib.sha256(json.dumps([self.classes, listing]).encode()).hexdigest()


def open_image_set(path: str | Path, *, least_classes: int = 2) -> ImageSet:
    """List the images of a folder or zip; nothing is decoded.

    `least_classes` is 2 to learn from, 1 to evaluate on. Raises DataError where the layout is not the expected one, a
    class has no images, or test/ has a class that train/ has not.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such folder or zip; {LAYOUT}")
    files: ImageSource = FolderSource(path) if path.is_dir() else ZipSource(path)
    root = _root(files.paths)
    inside = [name for name in files.paths if name.startswith(root) and name != root]
    parts = {name[len(root) :].partition("/")[0] for name in inside if "/" in name[len(root) :]}
    if "test" in parts and "train" not in parts:
        raise DataError(f"{path}: has test/ but no train/; {LAYOUT}")

    remarks = []
    train = _Listing(inside, f"{root}train/" if "train" in parts else root)
    test = _Listing(inside, f"{root}test/") if "train" in parts else _Listing((), "")
    if "train" in parts:
        others = sorted(parts - {"train", "test"})
        remarks += [f"{root}{other}/ is left out: neither train/ nor test/" for other in others]
    remarks += [
        f"{listing.loose} image(s) directly in {listing.top or 'the top folder'} left out: not in a class folder"
        for listing in (train, test)
        if listing.loose and listing.by_class
    ]
    _check(path, train, test, least_classes)
    classes = tuple(sorted(train.by_class))
    name = path.resolve().name if path.is_dir() else path.stem
    return ImageSet(name, classes, train.items(classes), test.items(classes), files, tuple(remarks))


def image_files(paths: Iterable[str | Path]) -> list[Path]:
    """The image files meant by some paths: a file stands for itself, a folder for all images in and below it, sorted.

    Raises DataError where there is no such path, or a folder without images.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise DataError(f"{path}: no such file or folder; give images, or folders of images")
        if not path.is_dir():
            found.append(path)
            continue
        names = [name for name in FolderSource(path).paths if is_image_name(name)]
        if not names:
            raise DataError(f"{path}: no images in this folder; give images, or folders of images")
        found += [path / name for name in names]
    return found


class _Listing:
    """The images below one folder, by class: for top "train/", "train/cat/1.jpg" is an image of cat."""

    def __init__(self, paths: Sequence[str], top: str) -> None:
        self.top = top
        self.loose = 0  # images outside class folders
        self.by_class: dict[str, list[str]] = {}
        for path in paths:
            if not path.startswith(top) or path == top:
                continue
            label, slash, rest = path[len(top) :].partition("/")
            if slash:
                images = self.by_class.setdefault(label, [])
                images += [path] if is_image_name(rest) else []
            else:
                self.loose += is_image_name(path)

    def items(self, classes: Sequence[str]) -> tuple[Item, ...]:
        return tuple(Item(path, label) for label, name in enumerate(classes) for path in self.by_class.get(name, ()))


def _check(path: Path, train: _Listing, test: _Listing, least_classes: int) -> None:
    empty = [name for name, images in train.by_class.items() if not images]
    if len(empty) == len(train.by_class):
        loose = f"{train.loose} image(s), but no class folder with images" if train.loose else "no class folders"
        raise DataError(f"{path}: {loose}; {LAYOUT}")
    if empty:
        raise DataError(
            f"{path}: no images in class folder {_some(train.top + name for name in empty)}; "
            "put images there or remove the folder"
        )
    if len(train.by_class) < least_classes:
        raise DataError(
            f"{path}: one class only ({_some(train.by_class)}); telling things apart takes at least {least_classes}"
        )
    strangers = [name for name, images in test.by_class.items() if images and name not in train.by_class]
    if strangers:
        raise DataError(
            f"{path}: test/ has classes that train/ has not: {_some(strangers)}; train/ has {_some(train.by_class)}"
        )


def _some(names: Iterable[str], limit: int = 5) -> str:
    listed = sorted(names)
    return ", ".join(listed[:limit]) + (f" and {len(listed) - limit} more" if len(listed) > limit else "")


def _root(paths: Sequence[str]) -> str:
    """What stands in front of the layout: "photos/" where the zip of folder `photos` holds `photos/<class>/<image>`."""
    images = [path.split("/") for path in paths if is_image_name(path)]
    tops = {parts[0] for parts in images}
    if len(tops) != 1 or tops <= {"train", "test"} or any(len(parts) < 3 for parts in images):
        return ""
    return f"{tops.pop()}/"
