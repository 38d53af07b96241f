"""Whether a pack file can be relied on: whole, signed by a known key, and computing what it did when it was learned."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ksm_edge.app.app import App
from ksm_edge.bundle.golden import COUNT, TOLERANCE, golden_images, relative_error
from ksm_edge.bundle.layers import Bundle
from ksm_edge.errors import FileError
from ksm_edge.fuse import digest_of
from ksm_edge.pack.budget import budget
from ksm_edge.pack.files import load_pack_and_bytes, require_backbone
from ksm_edge.pack.record import Pack
from ksm_edge.pack.signature import require_signature

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey


@dataclass(frozen=True)
class Verdict:
    """What was checked of one pack file, in that order, and what is off."""

    path: str
    task: str | None  # None where the file cannot be read
    signed: bool  # by whomever
    checked: tuple[str, ...]  # of: format and checksums, signature, backbone, fused weights, golden outputs
    faults: tuple[str, ...]  # none: all that was checked holds

    @property
    def ok(self) -> bool:
        return not self.faults


def verify_pack(
    path: str | os.PathLike[str], keys: Sequence[Ed25519PublicKey] | None = None, bundle: Bundle | None = None
) -> Verdict:
    """Check one pack: the file itself; with `keys`, that one of them signed it; with `bundle`, what it computes there.

    The backbone must be the pack's, the fused weights those of its digest, bit for bit, and its logits for the bundle's
    golden inputs within TOLERANCE of those recorded, relative to the largest. What cannot be read, is not signed as it
    should be, or belongs to another backbone is not looked into any further.
    """
    checked = ["format and checksums"]
    faults: list[str] = []
    task, signed = None, False
    try:
        pack, data = load_pack_and_bytes(path)
        task, signed = pack.task, budget(data)["signature"] > 0
        if keys is not None:
            checked.append("signature")
            require_signature(data, keys)
        if bundle is not None:
            checked.append("backbone")
            require_backbone(pack, bundle)
            checked += ["fused weights", "golden outputs"]
            faults += _faults_of_computing(pack, bundle)
    except FileError as error:
        faults.append(str(error).removeprefix(f"{os.fspath(path)}: "))
    return Verdict(os.fspath(path), task, signed, tuple(checked), tuple(faults))


def _faults_of_computing(pack: Pack, bundle: Bundle) -> Iterator[str]:
    found = digest_of(bundle, pack)
    if found != pack.fused_digest:
        yield f"its fused weights have the digest {found}, the pack says {pack.fused_digest or 'nothing'}"
    if len(pack.golden_logits) != COUNT:  # also a bound: as many images would be made as a pack has rows
        yield f"it has golden outputs for {len(pack.golden_logits)} inputs, a bundle has {COUNT}"
        return
    with App(bundle, limit=1) as app:
        app.load(pack)
        logits, _ = app.logits(golden_images(bundle.input))
    error = relative_error(logits, pack.golden_logits)
    if not error <= TOLERANCE:
        yield f"its golden outputs are off by {error:.1e} of the largest (at most {TOLERANCE:.0e})"
