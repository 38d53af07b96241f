"""Where the bytes of a set's images lie: a folder, a zip that is read in place, or memory.

A source lists what it holds as paths with "/" between the parts, relative to its root and sorted, and reads one of them
at a time. Hidden files and what macOS puts into a zip are not listed. Reading is safe from several threads.
"""

from __future__ import annotations

import lzma
import os
import stat
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

from ksm_edge.data.image import check_file_size, read_image_file
from ksm_edge.errors import DataError

IMAGE_SUFFIXES = frozenset(
    {".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jpe", ".jpeg", ".jpg"}
    | {".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)


class ImageSource(Protocol):
    @property
    def paths(self) -> tuple[str, ...]:
        """Every file, image or not, sorted; folders too, with a "/" at the end, so that empty ones are seen."""

    def read(self, path: str) -> bytes:
        """The bytes of a file; DataError, without the path, where they cannot be had."""

    def size(self, path: str) -> int:
        """Length of a file in bytes, without reading it."""


class FolderSource:
    """The files under a folder. Links are followed, except back to a folder that holds them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.paths = tuple(sorted(_walk(root, "", frozenset())))

    def read(self, path: str) -> bytes:
        return read_image_file(self.root / path)

    def size(self, path: str) -> int:
        try:
            return (self.root / path).stat().st_size
        except OSError as error:
            raise DataError(f"{self.root / path}: cannot be read ({error.strerror})") from error


class ZipSource:
    """The members of a zip, read from it without unpacking: nothing is written, so a member's name cannot do harm."""

    def __init__(self, file: Path) -> None:
        try:
            self._zip = zipfile.ZipFile(file)
        except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
            raise DataError(f"{file}: not a readable zip ({error})") from error
        # Some Windows programs write the wrong slash, and bsdtar puts "./" in front where one packs ".".
        names = ((info.filename.replace("\\", "/").removeprefix("./"), info) for info in self._zip.infolist())
        self._members = {name: info for name, info in names if name and not _is_hidden(name)}
        self.paths = tuple(sorted(self._members))

    def read(self, path: str) -> bytes:
        info = self._members[path]
        check_file_size(info.file_size)
        try:
            return self._zip.read(info)
        except NotImplementedError as error:
            raise DataError(f"cannot be read: this zip's compression is not supported ({error})") from error
        except RuntimeError as error:
            raise DataError("cannot be read: the zip is encrypted or closed") from error
        except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, OSError, EOFError) as error:
            raise DataError(f"damaged in the zip ({error})") from error

    def size(self, path: str) -> int:
        return self._members[path].file_size


class MemorySource:
    """Images that a program made: {path: bytes of an image file}."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self._files = files
        self.paths = tuple(sorted(files))

    def read(self, path: str) -> bytes:
        return self._files[path]

    def size(self, path: str) -> int:
        return len(self._files[path])


def is_image_name(path: str) -> bool:
    """Whether a file's name says that it is an image."""
    return os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES


def _is_hidden(path: str) -> bool:
    """A part that begins with a dot, which also keeps out "..", or macOS's shadow folder."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.split("/"))


def _walk(folder: Path, prefix: str, parents: frozenset[tuple[int, int]]) -> Iterator[str]:
    try:
        status = folder.stat()
        identity = (status.st_dev, status.st_ino)
        names = os.listdir(folder) if identity not in parents else []
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror})") from error
    for name in names:
        if _is_hidden(name):
            continue
        mode = _mode(folder / name)
        if stat.S_ISDIR(mode):
            yield f"{prefix}{name}/"
            yield from _walk(folder / name, f"{prefix}{name}/", parents | {identity})
        elif stat.S_ISREG(mode):
            yield prefix + name


def _mode(path: Path) -> int:
    """The kind of a file behind links; 0 for a link that leads nowhere."""
    try:
        return path.stat().st_mode
    except OSError:
        return 0
