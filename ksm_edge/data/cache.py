"""Images decoded once: what is larger than needed is kept reduced in one bounded file on disk, nothing stays in memory.

A photo of 12 megapixels takes longer to decode than a training step takes; reduced, it takes a millisecond. Small
originals are read from the source again, as a copy would only wear the SD card.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Iterable
from io import BytesIO
from pathlib import Path
from types import TracebackType

from PIL import Image

from ksm_edge.data.image import image_size, open_rgb
from ksm_edge.data.image_set import ImageSet, Item
from ksm_edge.errors import DataError

# Up to this many times the short side, decoding the original again costs less than a second loss of quality is worth.
_WORTHWHILE = 1.25


class ImageCache:
    """Reads the images of a set with a short side of at most `short_side` pixels; thread-safe, a context manager.

    At most `limit_bytes` go into the spill file (in `folder`, or the system's folder for temporary files on disk); what
    does not fit is decoded from the source each time. The file has no name, so that nothing is left behind, whatever
    happens to the process.
    """

    def __init__(
        self, image_set: ImageSet, short_side: int, limit_bytes: int, folder: str | Path | None = None
    ) -> None:
        self.image_set = image_set
        self.short_side = short_side
        self.limit_bytes = limit_bytes
        self.spilled_bytes = 0
        self._folder = folder
        self._places: dict[str, tuple[int, int]] = {}  # source -> offset and length in the spill file
        self._spill = -1  # file descriptor; made when the first image needs it
        self._lock = threading.Lock()

    def prepare(
        self, items: Iterable[Item], progress: Callable[[int, int], None] | None = None
    ) -> tuple[list[Item], list[tuple[str, str]]]:
        """Decode every image once: those that can be, and (source, reason) of those that cannot.

        `progress` is told how many are done, and of how many, after each. Two threads would double the memory.
        """
        items = list(items)
        good: list[Item] = []
        skipped: list[tuple[str, str]] = []
        for done, item in enumerate(items, start=1):
            try:
                self._load(item)
                good.append(item)
            except DataError as error:
                skipped.append((item.source, str(error)))
            if progress is not None:
                progress(done, len(items))
        return good, skipped

    def image(self, item: Item) -> Image.Image:
        """The image as RGB, upright, short side at most `short_side`; raises DataError naming it."""
        try:
            return self._load(item)
        except DataError as error:
            raise DataError(f"{item.source}: {error}") from error

    def close(self) -> None:
        """Give the disk space back; images can still be had, from the source."""
        with self._lock:
            if self._spill >= 0:
                os.close(self._spill)
            self._spill, self.limit_bytes = -1, 0
            self._places.clear()

    def __enter__(self) -> ImageCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _load(self, item: Item) -> Image.Image:
        kept = self._kept(item.source)
        if kept is not None:
            return open_rgb(kept)
        data = self.image_set.files.read(item.source)
        image = open_rgb(data, short_side=self.short_side)
        if min(image_size(data)) <= self.short_side * _WORTHWHILE:
            return image
        reduced = encode(image)
        self._keep(item.source, reduced)
        # Not `image`: pixels must not depend on what is in the cache, or a resumed training would see other ones.
        return open_rgb(reduced)

    def _kept(self, source: str) -> bytes | None:
        with self._lock:  # for the read too: once closed, the descriptor's number may be another file's
            if source not in self._places:
                return None
            offset, length = self._places[source]
            return os.pread(self._spill, length, offset)

    def _keep(self, source: str, data: bytes) -> None:
        with self._lock:
            if source in self._places or self.spilled_bytes + len(data) > self.limit_bytes:
                return
            try:
                if self._spill < 0:
                    self._spill = nameless_file(self._folder)
                written = os.pwrite(self._spill, data, self.spilled_bytes)
            except OSError:
                written = 0
            if written < len(data):
                self.limit_bytes = self.spilled_bytes  # the disk is full: from here on, from the source
                return
            self._places[source] = (self.spilled_bytes, len(data))
            self.spilled_bytes += len(data)


def encode(image: Image.Image) -> bytes:
    """An RGB image as the bytes of a JPEG (quality 95), or of a PNG where few colours make that smaller."""
    colours = image.getcolors(256)
    if colours is not None and all(red == green == blue for _, (red, green, blue) in colours):  # type: ignore[misc]
        image = image.convert("L")
    # Colours at full resolution: reduced as it is, the image has no detail to spare.
    jpeg = _saved(image, "JPEG", quality=95, subsampling=0)
    if colours is None:
        return jpeg
    return min(_saved(image, "PNG"), jpeg, key=len)


def _saved(image: Image.Image, kind: str, **options: int) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def nameless_file(folder: str | Path | None = None) -> int:
    """Descriptor of a new file that ends with it, by default in the `temporary_folder`."""
    descriptor, path = tempfile.mkstemp(prefix="ksm-edge-", dir=folder or temporary_folder())
    os.unlink(path)
    return descriptor


def temporary_folder() -> str:
    """/var/tmp: /tmp lies in memory on newer Debian systems, so what is put there frees nothing."""
    return "/var/tmp" if os.access("/var/tmp", os.W_OK) else tempfile.gettempdir()
