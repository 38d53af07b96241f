"""Features in front of the layers that learn, kept for every training image in a few views.

What lies in front of those layers makes the same of the same view every time. So a few views of each image are put
through it once, and the epochs take turns with them: that is the time of the front, saved in all other epochs. Each
value takes two bytes on disk, and none in memory; half precision changes it by up to one part in 2048.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from ksm_edge.bundle.layers import Bundle
from ksm_edge.data.batches import Batch
from ksm_edge.data.cache import nameless_file, temporary_folder
from ksm_edge.errors import DataError
from ksm_edge.runtimes.compile import CompiledGraph
from ksm_edge.runtimes.engine import Engine
from ksm_edge.runtimes.workers import Session

STORED = np.dtype(np.float16)
LARGEST = float(np.finfo(STORED).max)


def stored_bytes(graph: CompiledGraph, images: int, views: int) -> int:
    """On disk, of so many views of so many images; `graph`: compiled from `front_spec`."""
    return images * views * int(np.prod(graph.outputs["features"][1:])) * STORED.itemsize


class Views:
    """The features of up to `images` training images in a few views, in a file without a name."""

    def __init__(
        self,
        bundle: Bundle,
        fronts: Sequence[tuple[CompiledGraph, int]],
        engine: Engine,
        images: int,
        folder: str | Path | None = None,
    ) -> None:
        """`fronts`: compiled from `front_spec`, one after the other to be used, each with how many views it has.

        Raises DataError where the disk has no room for the one that takes most.
        """
        self._bundle, self._engine, self._images = bundle, engine, images
        self.bytes, count = max((stored_bytes(graph, images, count), count) for graph, count in fronts)
        self.begin(fronts[0][0])
        self._file = nameless_file(folder)
        try:
            os.posix_fallocate(self._file, 0, self.bytes)
        except OSError as error:
            os.close(self._file)
            raise DataError(
                f"to keep features of {count} views of {images} images, {-(-self.bytes // 2**20)} MiB are needed in "
                f"{folder or temporary_folder()}: {error.strerror}. Make room there, or give fewer --views"
            ) from error

    def begin(self, graph: CompiledGraph) -> None:
        """Anew, with another front: what there was of the one before makes room."""
        self._graph = graph
        self._shape = graph.outputs["features"][1:]
        self._image_bytes = stored_bytes(graph, 1, 1)
        self._slots: dict[int, int] = {}  # of the views that have been put through, where they are

    @property
    def at_once(self) -> int:
        """How many images a batch may have that is put through the front."""
        return self._graph.spec.micro_batch

    def has(self, view: int) -> bool:
        """Whether it has been put through the front."""
        return view in self._slots

    def fill(self, view: int, batches: Iterable[Batch], progress: Callable[[int], None] | None = None) -> None:
        """Put a view of images through the front; batches of `at_once` at most.

        `progress` is told how many there are so far. Sessions of its own, gone behind it: kept, their memory would be
        held while learning.
        """
        workers, done = self._engine.open(self._bundle, self._graph, {}), 0
        slot = self._slots.get(view, len(self._slots))
        for indices, features in workers.map(_run, batches):
            for index, values in zip(indices, features, strict=True):
                self._write(slot, int(index), values)
            done += len(indices)
            if progress is not None:
                progress(done)
        self._slots[view] = slot

    def features(self, view: int, indices: np.ndarray) -> np.ndarray:
        """Those of some images, float32 (n, ...), as the rest of the graph wants them."""
        slot = self._slots[view]
        parts = [os.pread(self._file, self._image_bytes, self._place(slot, int(index))) for index in indices]
        return np.frombuffer(b"".join(parts), STORED).reshape(len(indices), *self._shape).astype(np.float32)

    def _write(self, slot: int, index: int, values: np.ndarray) -> None:
        data = np.clip(values, -LARGEST, LARGEST).astype(STORED).tobytes()
        if os.pwrite(self._file, data, self._place(slot, index)) < len(data):
            raise DataError("no room is left to keep features in: make some, or give fewer --views")

    def _place(self, slot: int, index: int) -> int:
        return (slot * self._images + index) * self._image_bytes

    def close(self) -> None:
        """Give the disk space back."""
        if self._file >= 0:
            os.close(self._file)
        self._file = -1


def _run(session: Session, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    session.image[: len(batch.images)] = batch.images
    session.run()
    return batch.indices, session.output("features")[: len(batch.images)].copy()
