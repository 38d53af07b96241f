"""A pack's signature: Ed25519 over the whole file, kept in one more stream of that file.

    signature   U8 (64,)   of every byte of the file, with these 64 set to zero

So no bit of header, metadata or streams can change unnoticed, and a signed pack is still one safetensors file.
Checksums say that a file is whole, a signature says who vouches for it. A `Pack` does not carry it: one written anew is
unsigned.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ksm_edge.errors import DamagedFileError, SignatureError, UnsignedError
from ksm_edge.pack.container import place, read_container, write_container
from ksm_edge.pack.keys import fits

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

SIGNATURE = "signature"
SIGNATURE_BYTES = 64
_BLANK = bytes(SIGNATURE_BYTES)


def signed(data: bytes, key: Ed25519PrivateKey) -> bytes:
    """A pack's bytes, signed; a signature that is there is replaced, all other streams and the metadata stay."""
    text, streams = read_container(data)
    blank = write_container(text, streams | {SIGNATURE: np.frombuffer(_BLANK, np.uint8)})
    return _with_signature(blank, key.sign(blank))


def require_signature(data: bytes, keys: Sequence[Ed25519PublicKey]) -> None:
    """UnsignedError for a pack without a signature, SignatureError unless it fits these bytes and one of `keys`.

    Nothing of the pack is decoded for this, only its streams' places are read.
    """
    signature = take_signature(read_container(data)[1])
    if signature is None:
        raise UnsignedError(
            "the pack is not signed, and a signature is required. "
            "Whoever vouches for it signs it with: ksm-edge sign PACK --key PRIVATE.pem"
        )
    message = _with_signature(data, _BLANK)
    if not any(fits(key, signature, message) for key in keys):
        raise SignatureError(
            f"the pack's signature fits none of the {len(keys)} public key(s) given: it was signed with another key, "
            "or changed since. Get it again from where it was signed, or give that signer's public key"
        )


def unsigned_digest(data: bytes) -> str:
    """SHA-256 (hex) of a pack's bytes without a signature: the same before and after it is signed."""
    text, streams = read_container(data)
    take_signature(streams)
    return hashlib.sha256(write_container(text, streams)).hexdigest()


def take_signature(streams: dict[str, np.ndarray]) -> bytes | None:
    """Take the signature out of a pack's streams; None where it has none, DamagedFileError where it cannot be one."""
    stream = streams.pop(SIGNATURE, None)
    if stream is None:
        return None
    if stream.dtype != np.uint8 or stream.shape != (SIGNATURE_BYTES,):
        raise DamagedFileError(
            f"stream {SIGNATURE!r} holds {stream.dtype} of shape {stream.shape}; needed uint8 of ({SIGNATURE_BYTES},)"
        )
    return stream.tobytes()


def _with_signature(data: bytes, signature: bytes) -> bytes:
    where = place(data, SIGNATURE)
    return data[: where.start] + signature + data[where.stop :]
