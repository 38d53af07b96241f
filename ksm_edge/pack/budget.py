"""Where the bytes of a pack file go."""

from __future__ import annotations

from ksm_edge.pack.container import read_container
from ksm_edge.pack.signature import SIGNATURE

# What a person asks about -> the streams that make it up.
PARTS = {
    "keep_bits": ("bits",),
    "scales": ("scales", "ranges"),
    "norm": ("norm", "own"),
    "head": ("head", "bias"),
    "steps": ("steps",),
    "golden": ("golden",),
    "signature": (SIGNATURE,),
}


def budget(data: bytes) -> dict[str, int]:
    """Bytes of each part of a pack file; together they are the file. `header` is names, metadata and checksums."""
    _, streams = read_container(data)
    parts = {part: sum(streams[name].nbytes for name in names if name in streams) for part, names in PARTS.items()}
    return parts | {"header": len(data) - sum(parts.values())}
