"""A safetensors file whose tensors can be memory-mapped: written with an aligned header, read with every check.

Format: 8 bytes little-endian header length, a JSON header padded with spaces, the tensors' bytes without gaps.
https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ksm_edge.errors import DamagedFileError

ALIGNMENT = 64  # bytes: a cache line, and the widest vector load
_LENGTH = 8
_DTYPES = {np.dtype("<f4"): "F32", np.dtype(np.uint8): "U8"}


def write_tensors(file: BinaryIO, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Write float32 or uint8 tensors, one after the other in the given order; they begin at a multiple of 64 bytes."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(_LENGTH + len(text)) % ALIGNMENT)
    file.write(len(text).to_bytes(_LENGTH, "little") + text)
    for tensor in tensors.values():
        file.write(np.ascontiguousarray(tensor).data)


def map_tensors(path: Path) -> dict[str, np.ndarray]:
    """The float32 tensors of a file, read-only and memory-mapped: a page is read when it is first looked at.

    But vectors, which are read at once: a look at one page takes those around it into the process as well, so that half
    a megabyte of ResNet-50's batch-norm would bring 23 along.
    Raises DamagedFileError where header and length do not agree.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        header_size = int.from_bytes(file.read(_LENGTH), "little")
        start = _LENGTH + header_size
        if start > size or size < _LENGTH:
            raise DamagedFileError(f"{path}: its header should take {header_size} bytes, the file has {size}")
        header = _read_header(path, file.read(header_size))
    whole = np.memmap(path, np.uint8, "r", offset=0) if size > start else np.zeros(0, np.uint8)
    views = {name: _view(path, name, entry, whole[start:]) for name, entry in header.items()}
    tensors = {name: _copied(view) if view.ndim < 2 else view for name, view in views.items()}
    let_go(whole)
    return tensors


def _copied(view: np.ndarray) -> np.ndarray:
    copy = view.copy()
    copy.flags.writeable = False
    return copy


def let_go(tensor: np.ndarray) -> None:
    """Take a mapped tensor's pages out of this process, until it is looked at again; other arrays stay as they are.

    The system keeps them in its cache of files for as long as it has room. A hint: what cannot be done is left.
    """
    if tensor.flags.writeable:  # a copy-on-write map would lose what was written to it
        return
    base: object = tensor
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        first = tensor.ctypes.data - np.frombuffer(base, np.uint8).ctypes.data
        begin = first - first % mmap.PAGESIZE
        with suppress(OSError):  # locked into memory
            base.madvise(mmap.MADV_DONTNEED, begin, first + tensor.nbytes - begin)


def _read_header(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise DamagedFileError(f"{path}: its header is not the JSON object of a safetensors file ({error})") from error
    return header


def _view(path: Path, name: str, entry: Any, data: np.ndarray) -> np.ndarray:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end))
        fits = whole and dtype == "F32" and 0 <= begin <= end <= data.size and end - begin == 4 * math.prod(shape)
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedFileError(f"{path}: the header's entry for {name!r} is malformed ({error})") from error
    if not fits:
        raise DamagedFileError(
            f"{path}: tensor {name!r} is said to be {dtype} {shape} at bytes {begin} to {end} of {data.size}; "
            "float32 of that length inside the file is needed"
        )
    return np.asarray(data[begin:end]).view("<f4").reshape(shape)
