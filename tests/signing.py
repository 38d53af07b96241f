"""Key files as `openssl` writes them, made anew for each run, and the smallest pack that is one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_pack

from ksm_edge.app.app import App
from ksm_edge.bundle.golden import golden_images
from ksm_edge.bundle.layers import Bundle
from ksm_edge.fuse import digest_of
from ksm_edge.pack.reader import quantized
from ksm_edge.pack.record import Pack

PASSPHRASE = b"open sesame"


@dataclass(frozen=True)
class KeyFiles:
    """Paths of PEM files; `other` and `other_public` are a second pair."""

    private: Path
    public: Path
    encrypted: Path  # the first private key, under PASSPHRASE
    other: Path
    other_public: Path


def write_key_files(folder: Path) -> KeyFiles:
    """Skips the test that asks where cryptography is missing."""
    reason = "signatures need cryptography: pip install 'ksm_edge[sign]'"
    serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization", reason=reason)
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    first, second = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    plain, secret = serialization.NoEncryption(), serialization.BestAvailableEncryption(PASSPHRASE)
    contents = {
        "private": private_pem(first, plain),
        "public": public_pem(first),
        "encrypted": private_pem(first, secret),
        "other": private_pem(second, plain),
        "other_public": public_pem(second),
    }
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        (folder / f"{name}.pem").write_bytes(content)
    return KeyFiles(**{name: folder / f"{name}.pem" for name in contents})


def private_pem(key: Any, encryption: Any) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, PrivateFormat

    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)


def public_pem(key: Any) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def smallest_pack() -> Pack:
    """One class and one layer: few enough bits to flip every one."""
    whole = tiny_pack(classes=1)
    return replace(
        whole,
        task="t",
        classes=("c",),
        layers={"project": whole.layers["project"]},
        weight_shapes={"project": whole.weight_shapes["project"]},
        record={},
    )


def finished_pack(bundle: Bundle, task: str = "tiny") -> Pack:
    """A pack of this bundle with its true digest and golden outputs, these from the reference runtime."""
    pack = quantized(tiny_pack(cut=0.3, changes={"backbone": bundle.digest, "task": task}))
    with App(bundle, threads=1, runtime="reference") as app:
        app.load(pack)
        logits, _ = app.logits(golden_images(bundle.input))
    return replace(pack, fused_digest=digest_of(bundle, pack), golden_logits=logits.astype(np.float32))
