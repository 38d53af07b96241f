"""Many tasks on one frozen backbone: load packs, switch between them, predict."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from ksm_edge.app.images import as_input
from ksm_edge.bundle.layers import Bundle
from ksm_edge.bundle.load import load_bundle
from ksm_edge.errors import UnsignedError, UsageError
from ksm_edge.fuse import fuse
from ksm_edge.pack.files import load_pack, require_backbone
from ksm_edge.pack.keys import load_public_key
from ksm_edge.pack.record import Pack
from ksm_edge.runtimes import DEFAULT, load_runtime
from ksm_edge.runtimes.base import Session

if TYPE_CHECKING:
    from PIL import Image

    AnyImage = str | os.PathLike[str] | Image.Image | np.ndarray

IMAGES_A_RUN = 8  # activations of more images at once would cost memory and win next to no time


@dataclass(frozen=True)
class Prediction:
    """What a task says of one image: the best class, its probability in [0, 1], and the first few of them."""

    label: str
    probability: float
    top: tuple[tuple[str, float], ...]


class App:
    """Tasks of one backbone, by name. Thread-safe; a context manager that lets go of all memory at its end.

    A task's weights are fused when it is first used; the sessions of the `limit` tasks used last are kept.

    >>> with App("embedded") as app:                       # doctest: +SKIP
    ...     app.load("digits.ksm")
    ...     app.load("signs.ksm")
    ...     app.switch("signs")
    ...     app.predict(["photo.jpg"])[0].label
    """

    def __init__(
        self,
        bundle: Bundle | str | os.PathLike[str],
        threads: int | None = None,
        limit: int = 8,
        runtime: str = DEFAULT,
        require_signature: str | os.PathLike[str] | None = None,
    ) -> None:
        """`bundle`: a Bundle, the path of one, or "embedded"; `threads`: all of this process's cores if not given.

        `require_signature`: a PEM file with an Ed25519 public key; a pack that it does not fit is refused undecoded.
        """
        if limit < 1:
            raise UsageError(f"limit {limit}: an app keeps at least one session")
        self.bundle = bundle if isinstance(bundle, Bundle) else load_bundle(Path(bundle))
        self._keys = None if require_signature is None else (load_public_key(require_signature),)
        self._runtime = load_runtime(runtime)
        self._threads = threads or len(os.sched_getaffinity(0))
        self._limit = limit
        self._packs: dict[str, Pack] = {}
        self._sessions: OrderedDict[str, Session] = OrderedDict()  # the one used last is at the end
        self._current: str | None = None
        self._lock = threading.RLock()

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the loaded tasks, in the order they were loaded."""
        return tuple(self._packs)

    def load(self, pack: Pack | str | os.PathLike[str], name: str | None = None) -> str:
        """Load a task and return its name, the pack's own if none is given; the first one loaded becomes current.

        Raises WrongBackboneError for a pack of another backbone, UsageError for a name that is taken, UnsignedError or
        SignatureError where a signature is required.
        """
        if not isinstance(pack, Pack):
            pack = load_pack(pack, self._keys)
        elif self._keys is not None:
            raise UnsignedError(
                f"pack {pack.task!r} is in memory, where it has no signature: give the path of its file"
            )
        require_backbone(pack, self.bundle)
        name = pack.task if name is None else name
        with self._lock:
            if name in self._packs:
                raise UsageError(f"a task {name!r} is loaded already: unload it first, or give another name=")
            self._packs[name] = pack
            self._current = self._current or name
        return name

    def unload(self, name: str) -> None:
        """Forget a task and free its memory; if it was current, no task is."""
        with self._lock:
            self._pack(name)
            del self._packs[name]
            self._sessions.pop(name, None)
            self._current = None if self._current == name else self._current

    def switch(self, name: str) -> None:
        """Make a task the one that `predict` uses, and ready its session."""
        with self._lock:
            self._session(name)
            self._current = name

    def predict(self, images: AnyImage | Sequence[AnyImage], task: str | None = None, top: int = 5) -> list[Prediction]:
        """One prediction an image, by `task` or the current one; paths, PIL images or uint8 arrays (H, W, 3) or (H, W).

        Raises DataError for an image that cannot be read, UsageError for a task that is not loaded.
        """
        task = self._named(task)  # once: another thread may switch between two runs
        several = images if isinstance(images, (list, tuple)) else [images]
        predictions: list[Prediction] = []
        for start in range(0, len(several), IMAGES_A_RUN):
            part = several[start : start + IMAGES_A_RUN]
            inputs = np.stack([as_input(image, self.bundle.input) for image in part])
            predictions += _predictions(*self.logits(inputs, task), top)
        return predictions

    def logits(self, inputs: np.ndarray, task: str | None = None) -> tuple[np.ndarray, tuple[str, ...]]:
        """Preprocessed images (N, 3, S, S) float32 -> logits (N, C) float32, and the C class names."""
        with self._lock:
            name = self._named(task)
            pack, session = self._pack(name), self._session(name)
        return session.run(inputs) @ pack.head_weight.T + pack.head_bias, pack.classes

    def record(self, task: str | None = None) -> Mapping[str, Any]:
        """The training record of `task`, or of the current one."""
        with self._lock:
            return self._pack(self._named(task)).record

    def close(self) -> None:
        """Unload every task."""
        with self._lock:
            self._packs.clear()
            self._sessions.clear()
            self._current = None

    def __enter__(self) -> App:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _named(self, task: str | None) -> str:
        """The task that was asked for, or the current one."""
        name = self._current if task is None else task
        if name is None:
            raise UsageError(f"no task is current: switch to one of {', '.join(self._packs) or 'none loaded'}")
        return name

    def _pack(self, name: str) -> Pack:
        if name not in self._packs:
            raise UsageError(f"no task {name!r} is loaded; loaded are: {', '.join(self._packs) or 'none'}")
        return self._packs[name]

    def _session(self, name: str) -> Session:
        if name not in self._sessions:
            weights = fuse(self.bundle, self._pack(name))
            while len(self._sessions) >= self._limit:
                self._sessions.popitem(last=False)
            self._sessions[name] = self._runtime.Session(self.bundle.graph_path, weights, self._threads)
        self._sessions.move_to_end(name)
        return self._sessions[name]


def _predictions(logits: np.ndarray, classes: tuple[str, ...], top: int) -> list[Prediction]:
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    predictions = []
    for row in exponents / exponents.sum(axis=1, keepdims=True):
        best = tuple((classes[c], float(row[c])) for c in np.argsort(-row, kind="stable")[: max(top, 1)])
        predictions.append(Prediction(label=best[0][0], probability=best[0][1], top=best))
    return predictions
