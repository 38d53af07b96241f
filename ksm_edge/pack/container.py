"""The outside of a pack: a safetensors file of a few named streams and one metadata text.

Any safetensors library reads it. This reader is its own because a pack may come from anywhere: every length is checked
before it is believed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors.numpy import save

from ksm_edge.errors import DamagedFileError

MAX_FILE_BYTES = 256 << 20
MAX_HEADER_BYTES = 1 << 20
METADATA_KEY = "ksm_edge"  # the only one: with several, their order in the file would be left to chance
DTYPES: dict[str, np.dtype[Any]] = {"U8": np.dtype("u1"), "F32": np.dtype("<f4")}


def write_container(metadata: str, streams: Mapping[str, np.ndarray]) -> bytes:
    """`streams` are uint8 or float32 arrays; equal input gives equal bytes."""
    return save(dict(streams), {METADATA_KEY: metadata})


def read_container(data: bytes) -> tuple[str, dict[str, np.ndarray]]:
    """The metadata text and the streams, as read-only views of `data`; DamagedFileError for whatever does not hold."""
    header, body = _split(data)
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or not isinstance(metadata.get(METADATA_KEY), str):
        raise DamagedFileError(
            f"this safetensors file is no task pack: it has no {METADATA_KEY!r} in its metadata. "
            "Packs are written by `ksm-edge adapt`"
        )
    streams = {name: _stream(name, entry, body) for name, entry in header.items()}
    used = 0
    for start, end in sorted(tuple(entry["data_offsets"]) for entry in header.values()):
        if start != used:  # a byte of two streams has two meanings, a byte of none is covered by no checksum
            raise DamagedFileError(
                f"the streams overlap or leave a gap: one ends at byte {used}, the next is at {start}"
            )
        used = end
    if used != len(body):
        raise DamagedFileError(f"the streams hold {used} bytes, the file {len(body)} behind its header")
    return metadata[METADATA_KEY], streams


def parse_json(text: str) -> Any:
    """What the text says; ValueError or RecursionError where it is not JSON, or where a name comes twice in one object,
    of which two readers might each take another one.
    """
    return json.loads(text, object_pairs_hook=_object)


def place(data: bytes, name: str) -> slice:
    """Where in the file's bytes the stream `name` lies, for `data` that `read_container` has passed."""
    header, body = _split(data)
    start, end = header[name]["data_offsets"]
    first = len(data) - len(body)
    return slice(first + start, first + end)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name comes twice in one object")
    return found


def _split(data: bytes) -> tuple[dict[str, Any], memoryview]:
    """The header, parsed, and the bytes behind it."""
    if not 8 <= len(data) <= MAX_FILE_BYTES:
        raise DamagedFileError(f"{len(data)} bytes are no task pack: 8 to {MAX_FILE_BYTES} are possible")
    length = int.from_bytes(data[:8], "little")
    if length > min(MAX_HEADER_BYTES, len(data) - 8):
        raise DamagedFileError(
            f"the header claims {length} bytes: at most {MAX_HEADER_BYTES} are possible and {len(data) - 8} are there. "
            "This is no task pack, or it is cut short"
        )
    try:
        header = parse_json(data[8 : 8 + length].decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"the header cannot be read: {error}") from error
    if not isinstance(header, dict):
        raise DamagedFileError("the header is not an object of streams")
    return header, memoryview(data)[8 + length :]


def _stream(name: str, entry: Any, body: memoryview) -> np.ndarray:
    """One stream as an array."""
    try:
        dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
        start, end = entry["data_offsets"]
        fits = (
            all(type(n) is int and 0 <= n <= MAX_FILE_BYTES for n in (*shape, start, end))  # 0 x 2^63 is no shape
            and len(shape) <= 2
            and start <= end
            and math.prod(shape) * dtype.itemsize == end - start
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedFileError(f"stream {name!r}: its entry cannot be read: {entry!r:.200}") from error
    if not fits or end > len(body):
        raise DamagedFileError(
            f"stream {name!r}: {entry!r:.200} does not fit the {len(body)} bytes that are there. "
            "The file is cut short or damaged"
        )
    return np.frombuffer(body[start:end], dtype).reshape(shape)
