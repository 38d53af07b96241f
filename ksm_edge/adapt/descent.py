"""The pack that a training goes on from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ksm_edge.errors import DataError
from ksm_edge.pack.files import load_pack_and_bytes
from ksm_edge.pack.record import Pack
from ksm_edge.training.settings import Settings


@dataclass(frozen=True)
class Descent:
    """What is to be known of a parent while its child learns; its masks would be memory for nothing by then."""

    task: str
    sha256: str  # of its file, by which its children name it
    may_have_seen: bool  # it, or what it descends from, has learned from all its images: a child may hold out the same
    amplifies: bool
    norm_bits: int

    @staticmethod
    def of(pack: Pack, data: bytes) -> Descent:
        """From a pack and its file's bytes."""
        parent = pack.record.get("parent")
        inherited = isinstance(parent, dict) and parent.get("may_have_seen") is True
        has_joined = pack.record.get("judged_epoch", pack.record.get("epoch")) != pack.record.get("epoch")
        digest = hashlib.sha256(data).hexdigest()
        return Descent(pack.task, digest, inherited or has_joined, pack.amplifies, pack.bits["norm"])

    def as_record(self) -> dict[str, Any]:
        """For the child's pack."""
        return {"task": self.task, "sha256": self.sha256, "may_have_seen": self.may_have_seen}

    def settings(self, settings: Settings) -> Settings:
        """Those for a child, without which it would lose something of the parent.

        It amplifies if the parent does, where nothing else was asked for. And it has no fewer bits for batch-norm: what
        a parent of batch statistics has folded into gamma and beta would be rounded away.
        """
        amplify = settings.amplify
        if self.amplifies and amplify is None and settings.method == "ksm" and settings.soft:
            amplify = True
        return replace(settings, norm_bits=max(settings.norm_bits, self.norm_bits), amplify=amplify)


def read_parent(path: Path, classes: tuple[str, ...]) -> tuple[Descent, bytes]:
    """The parent of a task with these classes, and its file's bytes. DataError where one of its own is not among them:
    without images of it, what the parent knew of that class would be lost in what it learns of the others.
    """
    pack, data = load_pack_and_bytes(path)
    if missing := sorted(set(pack.classes) - set(classes)):
        raise DataError(
            f"{path} knows classes that there are no images of: {', '.join(missing[:5])}. "
            "Give images of them too, or start anew without the pack"
        )
    return Descent.of(pack, data), data
