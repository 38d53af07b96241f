"""Checkpoints: the whole state of a training, written atomically, so that a power cut costs minutes and not the task.

A safetensors file: every changing array, the best pack so far as bytes, and one JSON record of where training stood.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from ksm_edge.atomic import atomic_write
from ksm_edge.bundle.tensorfile import write_tensors
from ksm_edge.errors import DamagedFileError, UnsupportedVersionError, UsageError
from ksm_edge.training.choice import as_good

VERSION = 21
BEST = "best_pack"


@dataclass
class Progress:
    """Where a training stands: between two optimizer steps."""

    epoch: int = 0
    step: int = 0  # within the epoch
    steps_done: int = 0  # in all
    loss_sum: float = 0.0  # of the epoch's steps so far
    correct: int = 0  # answers, and of how many images, in the epoch so far
    count: int = 0
    candidates: int = 0  # judged epochs that could be chosen
    highest_accuracy: float = -1.0  # theirs on the validation split; below 0: there was none yet
    best_epoch: int = -1  # the chosen one, see `choice`
    joined: bool = False  # the held-out images: they are learned from as well
    calibration: dict[str, Any] | None = None  # what they said of probabilities while they were held out
    history: list[dict[str, float]] = field(default_factory=list)  # a record of each epoch that ended

    def add(self, loss: float, correct: int, count: int) -> None:
        """One optimizer step has been done."""
        self.step += 1
        self.steps_done += 1
        self.loss_sum += loss
        self.correct += correct
        self.count += count

    def finish_epoch(self, validation: float | None) -> None:
        """All steps of the epoch have been done, and the pack judged, if this epoch's is."""
        self.epoch += 1
        record: dict[str, float] = {"epoch": self.epoch, "loss": self.loss_sum / self.step}
        record["train_accuracy"] = self.correct / self.count
        self.history.append(record if validation is None else record | {"validation_accuracy": validation})
        self.step, self.loss_sum, self.correct, self.count = 0, 0.0, 0, 0

    def choose(self, validation: float | None, images: int) -> bool:
        """Whether the epoch that just ended, with its accuracy on so many images, is the chosen one from here on.

        Where there are none to judge by, it is.
        """
        if validation is not None:
            self.highest_accuracy = max(self.highest_accuracy, validation)
            self.candidates += 1
            if not as_good(validation, self.highest_accuracy, images, self.candidates):
                return False
        self.best_epoch = self.epoch
        return True

    @property
    def judged_epoch(self) -> int | None:
        """The epoch whose accuracy stands for the chosen one's: itself, or the last before held-out images joined."""
        judged = (record for record in reversed(self.history[: self.best_epoch]) if "validation_accuracy" in record)
        return next((int(record["epoch"]) for record in judged), None)

    @property
    def best_accuracy(self) -> float | None:
        """That epoch's on the validation split."""
        epoch = self.judged_epoch
        return None if epoch is None else self.history[epoch - 1]["validation_accuracy"]


def save_checkpoint(
    path: Path,
    state: Mapping[str, np.ndarray],
    progress: Progress,
    best_pack: bytes | None,
    identity: Mapping[str, Any],
) -> None:
    """`identity`: what must be equal for the training to go on from here: data, backbone, settings."""
    arrays = dict(state)
    if best_pack is not None:
        arrays[BEST] = np.frombuffer(best_pack, np.uint8)
    record = json.dumps(
        {
            "version": VERSION,
            "progress": asdict(progress),
            "identity": dict(identity),
            "checksum": _checksum(arrays),
        },
        sort_keys=True,
    )
    with atomic_write(path) as file:
        # Tensor by tensor: the library's own writer first makes a copy of them all, as much memory as training has.
        write_tensors(file, arrays, {"ksm_edge_checkpoint": record})


def load_checkpoint(path: Path, identity: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], Progress, bytes | None]:
    """Raises UsageError where there is none or it belongs to another training, FileError where it cannot be read."""
    own, progress, state = _read(path)
    for name, value in identity.items():
        now = json.loads(json.dumps(value))
        if own.get(name) != now:
            raise UsageError(
                f"{path} belongs to another training: {_differences(name, own.get(name), now)}. "
                "Resume with what it was started with, or start anew by --fresh."
            )
    best = state.pop(BEST, None)
    return state, progress, None if best is None else best.tobytes()


def _differences(name: str, then: Any, now: Any) -> str:
    """Of two tables what differs alone."""
    if not (isinstance(then, dict) and isinstance(now, dict)):
        then, now = {name: then}, {name: now}
    differing = [key for key in {**then, **now} if then.get(key, ...) != now.get(key, ...)]
    before, after = ([repr(table[key]) if key in table else "absent" for key in differing] for table in (then, now))
    return ", ".join(f"its {key} is {a}, now {b}" for key, a, b in zip(differing, before, after, strict=True))


def read_identity(path: Path) -> dict[str, Any]:
    """What the training behind a checkpoint was started with; raises what `load_checkpoint` raises."""
    return _read(path)[0]


def _read(path: Path) -> tuple[dict[str, Any], Progress, dict[str, np.ndarray]]:
    if not path.exists():
        raise UsageError(f"there is no checkpoint {path} to resume from; leave out --resume to start anew")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            record = json.loads((file.metadata() or {})["ksm_edge_checkpoint"])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        if record["version"] != VERSION:
            raise UnsupportedVersionError(
                f"{path} is a checkpoint of version {record['version']}, this release reads {VERSION}: "
                "resume with the release that wrote it, or start anew by --fresh"
            )
        if record["checksum"] != _checksum(state):
            raise ValueError("its checksum does not hold")
        return dict(record["identity"]), Progress(**record["progress"]), state
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise DamagedFileError(f"{path} is no readable checkpoint ({error}); start anew by --fresh") from error


def _checksum(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(arrays):
        digest.update(name.encode() + b"\0" + str(arrays[name].shape).encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()
