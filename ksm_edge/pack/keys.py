"""Ed25519 keys from PEM files, as `openssl` writes them; through the package cryptography, which only these need."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ksm_edge.errors import KeyFileError, UnsupportedError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

MAX_KEY_FILE_BYTES = 1 << 16
MAKE_PRIVATE = "openssl genpkey -algorithm ed25519 -out key.pem"
MAKE_PUBLIC = "openssl pkey -in key.pem -pubout -out public.pem"
PRIVATE, ENCRYPTED, PUBLIC = "PRIVATE KEY", "ENCRYPTED PRIVATE KEY", "PUBLIC KEY"  # labels of PEM blocks
NEEDED_PRIVATE = f"an Ed25519 private key in PEM. Make one with: {MAKE_PRIVATE}"
NEEDED_PUBLIC = f"an Ed25519 public key in PEM. Take it from its private key with: {MAKE_PUBLIC}"


def load_private_key(path: str | os.PathLike[str], passphrase: Callable[[], bytes]) -> Ed25519PrivateKey:
    """The key to sign with; `passphrase` is called only where the file is encrypted.

    Raises KeyFileError for a file that holds anything else, UnsupportedError where cryptography is not installed.
    """
    serialization, ed25519 = _cryptography()
    data, label = _pem(path)
    if label not in (PRIVATE, ENCRYPTED):
        raise _wrong(path, _named(label), NEEDED_PRIVATE)
    secret = passphrase() if label == ENCRYPTED else None
    key = _parsed(lambda: serialization.load_pem_private_key(data, secret), path, label)
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise _wrong(path, f"a key of another kind, {type(key).__name__}", NEEDED_PRIVATE)
    return key


def load_public_key(path: str | os.PathLike[str]) -> Ed25519PublicKey:
    """The key that tells whether a signature fits.

    Raises KeyFileError for a file that holds anything else, UnsupportedError where cryptography is not installed.
    """
    serialization, ed25519 = _cryptography()
    data, label = _pem(path)
    if label != PUBLIC:
        raise _wrong(path, _named(label), NEEDED_PUBLIC)
    key = _parsed(lambda: serialization.load_pem_public_key(data), path, label)
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise _wrong(path, f"a key of another kind, {type(key).__name__}", NEEDED_PUBLIC)
    return key


def fits(key: Ed25519PublicKey, signature: bytes, message: bytes) -> bool:
    """Whether the private half of `key` made `signature`, 64 bytes, for this very message."""
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(signature, message)
    except InvalidSignature:
        return False
    return True


def _cryptography() -> tuple[Any, Any]:
    """Its modules `serialization` and `ed25519`."""
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise UnsupportedError(
            "signatures need the package cryptography, which is not installed: pip install 'ksm_edge[sign]'"
        ) from error
    return serialization, ed25519


def _pem(path: str | os.PathLike[str]) -> tuple[bytes, str | None]:
    """The file's bytes and the label of its first PEM block, None where there is none."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_KEY_FILE_BYTES)
    except OSError as error:
        raise KeyFileError(f"{os.fspath(path)}: cannot be read as a key: {error.strerror}") from error
    match = re.search(rb"^-----BEGIN ([A-Z0-9 ]+)-----", data, re.MULTILINE)
    return data, match[1].decode() if match else None


def _parsed(load: Callable[[], Any], path: str | os.PathLike[str], label: str) -> Any:
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        return load()
    except (TypeError, ValueError, UnsupportedAlgorithm) as error:
        fault = "the passphrase is wrong or the file is damaged" if label == ENCRYPTED else "the file is damaged"
        raise KeyFileError(f"{os.fspath(path)}: {_named(label)} is there but cannot be read: {fault}") from error


def _named(label: str | None) -> str:
    return "no PEM block" if label is None else f"a PEM block {label!r}"


def _wrong(path: str | os.PathLike[str], found: str, needed: str) -> KeyFileError:
    return KeyFileError(f"{os.fspath(path)}: holds {found}; needed {needed}")
