"""The backbone digest: one number for a backbone's tensors, whatever file they lie in."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np


def backbone_digest(tensors: Mapping[str, np.ndarray]) -> str:
    """SHA-256, hex, over the sorted names, dtypes, shapes and little-endian bytes of `tensors`.

    >>> backbone_digest({"a": np.zeros(2, np.float32)})[:8]
    'd59797b5'
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
        # The length in front keeps ("ab", "c") and ("a", "bc") apart.
        head = f"{name} {array.dtype.name} {','.join(map(str, array.shape))}".encode()
        digest.update(len(head).to_bytes(8, "little") + head)
        digest.update(array.tobytes())
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, hex, read in blocks of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
