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
    """A parent, and the digest of its file, by which its children name it."""

    pack: Pack
    sha256: str

    @staticmethod
    def of(path: Path, classes: tuple[str, ...]) -> Descent:
        """Read the parent of a task with these classes. DataError where one of its own is not among them: without
        images of it, what the parent knew of that class would be lost in what it learns of the others.
        """
        pack, data = load_pack_and_bytes(path)
        if missing := sorted(set(pack.classes) - set(classes)):
            raise DataError(
                f"{path} knows classes that there are no images of: {', '.join(missing[:5])}. "
                "Give images of them too, or start anew without the pack"
            )
        return Descent(pack, hashlib.sha256(data).hexdigest())

    @property
    def may_have_seen(self) -> bool:
        """Whether it, or what it descends from, has learned from all its images: a child may hold out the same ones."""
        record = self.pack.record
        parent = record.get("parent")
        inherited = isinstance(parent, dict) and parent.get("may_have_seen") is True
        return inherited or record.get("judged_epoch", record.get("epoch")) != record.get("epoch")

    def as_record(self) -> dict[str, Any]:
        """For the child's pack."""
        return {"task": self.pack.task, "sha256": self.sha256, "may_have_seen": self.may_have_seen}

    def settings(self, settings: Settings) -> Settings:
        """Those for a child, without which it would lose something of the parent.

        It amplifies if the parent does, where nothing else was asked for. And it has no fewer bits for batch-norm: what
        a parent of batch statistics has folded into gamma and beta would be rounded away.
        """
        amplify = settings.amplify
        if self.pack.amplifies and amplify is None and settings.method == "ksm" and settings.soft:
            amplify = True
        norm_bits = max(settings.norm_bits, self.pack.bits["norm"])
        return replace(settings, norm_bits=norm_bits, amplify=amplify)
