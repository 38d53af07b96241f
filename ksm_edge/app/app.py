"""Many tasks on one frozen backbone: load packs, switch between them, predict."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from ksm_edge.app.images import as_input
from ksm_edge.app.residents import Resident, Residents
from ksm_edge.bundle.layers import Bundle
from ksm_edge.bundle.load import load_bundle
from ksm_edge.cores import MAX_THREADS, fast_cores
from ksm_edge.errors import BudgetError, UnsignedError, UnsupportedError, UsageError
from ksm_edge.fuse import fuse
from ksm_edge.pack.calibration import Calibration
from ksm_edge.pack.files import load_pack_and_bytes, require_backbone
from ksm_edge.pack.format import encode
from ksm_edge.pack.keys import load_public_key
from ksm_edge.pack.reader import decode
from ksm_edge.pack.record import Pack
from ksm_edge.pack.signature import unsigned_digest
from ksm_edge.runtimes import DEFAULT, load_runtime
from ksm_edge.runtimes.base import Session
from ksm_edge.runtimes.prepared import PreparedGraph, prepare, prepared

if TYPE_CHECKING:
    from PIL import Image

    AnyImage = str | os.PathLike[str] | Image.Image | np.ndarray

IMAGES_A_RUN = 8  # activations of more images at once would cost memory and win next to no time


@dataclass(frozen=True)
class Prediction:
    """What a task says of one image: the best class, its probability in [0, 1], and the first few of them.

    `known` is False where the best class is less likely than all but a few of the images that the task was judged on:
    the image is perhaps of none of its classes.
    """

    label: str
    probability: float
    top: tuple[tuple[str, float], ...]
    known: bool = True


@dataclass(frozen=True)
class _Loaded:
    """A task that is loaded: as the bytes of its file, a sixth of what they take decoded, or as it was given."""

    data: bytes | None
    pack: Pack | None

    def decoded(self) -> Pack:
        return decode(self.data) if self.data is not None else self.pack  # type: ignore[return-value]


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
        memory_budget: int | None = None,
        runtime: str = DEFAULT,
        require_signature: str | os.PathLike[str] | None = None,
    ) -> None:
        """`bundle`: a Bundle, the path of one, or "embedded"; `threads`: as many as there are fast cores, if not
        given.

        `limit`: sessions kept; `memory_budget`: bytes that the fused weights of all of them may take, and BudgetError
        where these are fewer than one task's. `require_signature`: a PEM file with an Ed25519 public key; a pack that
        it does not fit is refused undecoded.
        """
        self.bundle = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
        if threads is not None and not 1 <= threads <= MAX_THREADS:
            raise UsageError(f"threads {threads}: must be 1 to {MAX_THREADS}")
        self._keys = None if require_signature is None else (load_public_key(require_signature),)
        self._runtime = load_runtime(runtime)
        self._prepares = runtime == DEFAULT
        self._graph = _if_faster(prepared(self.bundle)) if self._prepares else None
        self._threads = threads or len(fast_cores())
        self._tasks: dict[str, _Loaded] = {}
        self._fresh: tuple[str, Pack] | None = None  # the pack loaded last, decoded, until something is made of it
        self._residents = Residents(self._make, self._sessions(limit, memory_budget))
        self._current: str | None = None
        self._lock = threading.RLock()

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the loaded tasks, in the order they were loaded."""
        return tuple(self._tasks)

    @property
    def ready(self) -> tuple[str, ...]:
        """Names of the tasks whose weights are in memory, the one used last at the end."""
        return self._residents.names

    def prepare(self) -> None:
        """Optimise the backbone's graph for this machine, once for all apps on it: seconds now, faster sessions then.

        Which way to make a session is the faster one is measured in doing so, and that one is taken from then on.
        Does nothing where that was done, or where the runtime optimises in a way that does not allow it.
        """
        if self._graph is None and self._prepares:
            with suppress(UnsupportedError):
                self._graph = _if_faster(prepare(self.bundle))

    def load(self, pack: Pack | str | os.PathLike[str], name: str | None = None) -> str:
        """Load a task and return its name, the pack's own if none is given; the first one loaded becomes current.

        Raises WrongBackboneError for a pack of another backbone, UsageError for a name that is taken, UnsignedError or
        SignatureError where a signature is required.
        """
        if isinstance(pack, Pack):
            if self._keys is not None:
                raise UnsignedError(
                    f"pack {pack.task!r} is in memory, where it has no signature: give the path of its file"
                )
            loaded = _Loaded(None, pack)
        else:
            pack, data = load_pack_and_bytes(pack, self._keys)
            loaded = _Loaded(data, None)
        require_backbone(pack, self.bundle)
        name = pack.task if name is None else name
        with self._lock:
            if name in self._tasks:
                raise UsageError(f"a task {name!r} is loaded already: unload it first, or give another name=")
            self._tasks[name] = loaded
            self._fresh = name, pack
            self._current = name if self._current is None else self._current
        return name

    def unload(self, name: str) -> None:
        """Forget a task and free its memory; if it was current, no task is."""
        with self._lock:
            self._loaded(name)
            del self._tasks[name]
            self._residents.forget(name)
            self._fresh = None if self._fresh and self._fresh[0] == name else self._fresh
            self._current = None if self._current == name else self._current

    def switch(self, name: str) -> None:
        """Make a task the one that `predict` uses, and ready its session."""
        self.prefetch(name)
        with self._lock:
            self._loaded(name)  # another thread may have unloaded it
            self._current = name

    def prefetch(self, name: str) -> None:
        """Ready a task's session, which may take the place of the one used least recently.

        Other threads' predictions go on meanwhile: call it in a thread of its own to have it in the background.
        """
        self._loaded(name)
        with self._residents.use(name):
            pass

    def pin(self, name: str) -> None:
        """Ready a task's session and keep it, whatever else is used, until `unpin`; BudgetError where no session would
        be left for the other tasks.
        """
        with self._lock:
            self._loaded(name)
            is_new = self._residents.pin(name)
        try:
            self.prefetch(name)
        except BaseException:
            if is_new:
                self._residents.unpin(name)
            raise

    def unpin(self, name: str) -> None:
        """Undo `pin`: the task's session may leave again."""
        self._loaded(name)
        self._residents.unpin(name)

    def predict(self, images: AnyImage | Sequence[AnyImage], task: str | None = None, top: int = 5) -> list[Prediction]:
        """One prediction an image, by `task` or the current one; paths, PIL images or uint8 arrays (H, W, 3) or (H, W).

        A PIL image is turned by its EXIF tag, as files are: who has turned it takes the tag away, as
        `PIL.ImageOps.exif_transpose` does. Raises DataError for an image that cannot be read, UsageError for a task
        that is not loaded.
        """
        task = self._named(task)  # once: another thread may switch between two runs
        return self.predict_all(images, [task], top)[task]

    def predict_all(
        self, images: AnyImage | Sequence[AnyImage], tasks: Iterable[str] | None = None, top: int = 5
    ) -> dict[str, list[Prediction]]:
        """Predictions by each of several tasks, all loaded ones if none are given; every image is read once."""
        names = list(dict.fromkeys(self.tasks if tasks is None else tasks))
        several = images if isinstance(images, (list, tuple)) else [images]
        predictions: dict[str, list[Prediction]] = {self._named(name): [] for name in names}
        for start in range(0, len(several), IMAGES_A_RUN):
            part = several[start : start + IMAGES_A_RUN]
            inputs = np.stack([as_input(image, self.bundle.input) for image in part])
            for name in names:
                with self._residents.use(name) as resident:
                    predictions[name] += _predictions(resident, inputs, top)
            names.reverse()  # the tasks used last are the ones that are ready
        return predictions

    def logits(self, inputs: np.ndarray, task: str | None = None) -> tuple[np.ndarray, tuple[str, ...]]:
        """Preprocessed images (N, 3, S, S) float32 -> logits (N, C) float32, and the C class names.

        Raises UsageError for anything else: the backbone would take images of some other sizes, and say nothing.
        """
        found, side = np.asarray(inputs), self.bundle.input.size
        if found.dtype != np.float32 or found.ndim != 4 or found.shape[1:] != (3, side, side):
            raise UsageError(
                f"inputs {found.dtype} {found.shape}: needed are float32 (N, 3, {side}, {side}); `predict` takes images"
            )
        with self._residents.use(self._named(task)) as resident:
            return resident.logits(found), resident.classes

    def calibration(self, task: str | None = None) -> Calibration:
        """What turns the task's logits into probabilities, and which of them are too low to be known."""
        with self._residents.use(self._named(task)) as resident:
            return resident.calibration

    def record(self, task: str | None = None) -> Mapping[str, Any]:
        """The training record of `task`, or of the current one."""
        return self._loaded(self._named(task)).decoded().record

    def digest(self, task: str | None = None) -> str:
        """SHA-256 (hex) of the task's pack, signed or not: it tells answers of one pack from those of another."""
        loaded = self._loaded(self._named(task))
        return unsigned_digest(encode(loaded.decoded()) if loaded.data is None else loaded.data)

    def close(self) -> None:
        """Unload every task."""
        with self._lock:
            self._tasks.clear()
            self._residents.clear()
            self._fresh = self._current = None

    def __enter__(self) -> App:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _sessions(self, limit: int, budget: int | None) -> int:
        """How many may be kept."""
        if limit < 1:
            raise UsageError(f"limit {limit}: an app keeps at least one session")
        if budget is None:
            return limit
        each = 4 * sum(w.weight.size + w.bias.size for w in self.bundle.weights.values())
        if budget < each:
            raise BudgetError(f"memory budget {budget} bytes: the fused weights of one task take {each}")
        return min(limit, budget // each)

    def _named(self, task: str | None) -> str:
        """The loaded task that was asked for, or the current one."""
        name = self._current if task is None else task
        if name is None:
            raise UsageError(f"no task is current: switch to one of {', '.join(self._tasks) or 'none loaded'}")
        self._loaded(name)
        return name

    def _loaded(self, name: str) -> _Loaded:
        loaded = self._tasks.get(name)
        if loaded is None:
            raise UsageError(f"no task {name!r} is loaded; loaded are: {', '.join(self._tasks) or 'none'}")
        return loaded

    def _make(self, name: str) -> Resident:
        """Decode, fuse and open."""
        with self._lock:
            loaded, fresh = self._loaded(name), self._fresh
            if fresh is not None and fresh[0] == name:
                self._fresh = None
        pack = fresh[1] if fresh is not None and fresh[0] == name else loaded.decoded()
        weights = fuse(self.bundle, pack)
        if self._graph is not None:
            session: Session = self._graph.session(weights, self._threads)
        else:
            session = self._runtime.Session(self.bundle.graph_path, weights, self._threads)
        return Resident(session, pack.head_weight, pack.head_bias, pack.classes, Calibration.from_record(pack.record))


def _if_faster(graph: PreparedGraph | None) -> PreparedGraph | None:
    return graph if graph is not None and graph.is_faster else None


def _predictions(resident: Resident, inputs: np.ndarray, top: int) -> list[Prediction]:
    classes, calibration = resident.classes, resident.calibration
    predictions = []
    for row in calibration.probabilities(resident.logits(inputs)):
        best = tuple((classes[c], float(row[c])) for c in np.argsort(-row, kind="stable")[: max(top, 1)])
        label, probability = best[0]
        predictions.append(Prediction(label, probability, best, probability >= calibration.threshold))
    return predictions
