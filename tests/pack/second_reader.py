"""A second reader of task packs, from docs/pack-format.md alone: the standard library and numpy, nothing of ours.

The numbers in brackets are the bullets of that document; `second_coding` reads what is coded.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from typing import Any

import numpy as np
from second_coding import RefusedError, read_codes, read_groups, read_packed, require, split

STREAMS = {"bits": "U8", "scales": "U8", "norm": "U8", "head": "U8"} | dict.fromkeys(
    ("ranges", "steps", "bias", "own", "golden"), "F32"
)
F32 = np.dtype("<f4")


def read_pack(data: bytes) -> dict[str, Any]:
    """Everything a pack says: `metadata`; `layers`, for each name its arrays; `head`, `bias`, `golden`."""
    header, body = read_header(data)
    metadata = read_metadata(header)
    streams = read_streams(header, body, metadata)
    names = [name for name, *_ in metadata["layers"]]
    masks = read_masks(metadata, streams)
    differences = read_norm(metadata, streams)
    own = read_own(metadata, streams)
    layers = {name: masks[i] | differences[i] | own.get(i, {}) for i, name in enumerate(names)}
    head = read_head(metadata, streams)
    require(streams["golden"].ndim == 2 and streams["golden"].shape[1] == len(head), "shape of golden (9)")
    return {
        "metadata": metadata,
        "layers": layers,
        "head": head,
        "bias": shaped(streams, "bias", (len(head),)),
        "golden": streams["golden"],
    }


def signed_message(data: bytes) -> tuple[bytes, bytes] | None:
    """The signature and what it was made of, None where there is none (39)."""
    header, body = read_header(data)
    if "signature" not in header:
        return None
    start, end = (len(data) - len(body) + offset for offset in header["signature"]["data_offsets"])
    return data[start:end], data[:start] + bytes(64) + data[end:]


def fuse_layer(pack: dict[str, Any], name: str, backbone: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """V and v of one layer (30 to 33); `backbone` has its weight, bias, gamma, beta, mean, var and eps."""
    layer = pack["layers"].get(name)
    W, gamma, beta = backbone["weight"], backbone["gamma"], backbone["beta"]
    mean, var = backbone["mean"], backbone["var"]
    masked = W
    if layer is not None:
        gamma, beta = gamma + layer["gamma"], beta + layer["beta"]
        mean, var = layer.get("mean", mean), layer.get("var", var)
        if "keep" in layer:
            M = np.where(layer["keep"], np.float32(1), layer["scale"])
            masked = W * widened(M, W.shape, pack["metadata"]["granularity"])
    f = gamma / np.sqrt(var + np.float32(backbone["eps"]))
    return masked * f[:, None, None, None], beta + (backbone["bias"] - mean) * f


def widened(mask: np.ndarray, shape: tuple[int, ...], granularity: str) -> np.ndarray:
    """A mask of scores as one of weights (16)."""
    if granularity == "element":
        return mask
    per_score = {"kernel": 1, "channel": shape[1]}.get(granularity) or int(granularity[6:])
    columns = np.arange(shape[1]) // per_score
    return np.broadcast_to(mask[:, columns, None, None], shape)


def fused_digest(tensors: dict[str, np.ndarray]) -> str:
    """(35)"""
    parts = (name.encode() + b"\0" + tensors[name].astype(F32).tobytes() for name in sorted(tensors, key=str.encode))
    return hashlib.sha256(b"".join(parts)).hexdigest()


def golden_images(size: int, mean: list[float], std: list[float], n: int = 2) -> np.ndarray:
    """(n, 3, size, size) (36)"""
    corners = np.frombuffer(hashlib.shake_256(b"ksm_edge golden images 1").digest(n * 3 * 81), np.uint8)
    images = np.empty((n, 3, size, size), F32)
    for image, channel, y, x in np.ndindex(images.shape):
        g = corners.reshape(n, 3, 9, 9)[image, channel].astype(int)
        (row, down), (column, right) = (cell(p, size) for p in (y, x))
        h = g[row] * (256 - down) + g[row + 1] * down
        byte = (h[column] * (256 - right) + h[column + 1] * right) // 65536
        level = F32.type(byte) / F32.type(255)
        images[image, channel, y, x] = (level - F32.type(mean[channel])) / F32.type(std[channel])
    return images


def cell(p: int, size: int) -> tuple[int, int]:
    a = p * 2048 // max(size - 1, 1)
    j = min(a // 256, 7)
    return j, a - 256 * j


# Container


def read_header(data: bytes) -> tuple[dict[str, Any], bytes]:
    """(5 to 7)"""
    require(8 <= len(data) <= 2**28, "size of the file (5)")
    (N,) = struct.unpack("<Q", data[:8])
    require(N <= 2**20 and len(data) >= 8 + N, "length of the header (5)")
    header, body = parse(data[8 : 8 + N]), data[8 + N :]
    require(type(header) is dict, "header (5)")
    places = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        require(type(entry) is dict and {"dtype", "shape", "data_offsets"} <= entry.keys(), f"{name}: its entry (6)")
        shape, offsets = entry["shape"], entry["data_offsets"]
        require(entry["dtype"] in ("U8", "F32"), f"{name}: dtype (6)")
        require(type(shape) is list and len(shape) <= 2 and all(map(is_count, shape)), f"{name}: shape (6)")
        require(max(shape, default=0) <= 2**28, f"{name}: shape (6)")
        require(type(offsets) is list and len(offsets) == 2 and all(map(is_count, offsets)), f"{name}: offsets (6)")
        size = math.prod(shape) * (4 if entry["dtype"] == "F32" else 1)
        require(size == offsets[1] - offsets[0], f"{name}: size (6)")
        places.append(tuple(offsets))
    position = 0
    for start, end in sorted(places):
        require(start == position, "gap or overlap (7)")
        position = end
    require(position == len(body), "end of the body (7)")
    return header, body


def read_streams(header: dict[str, Any], body: bytes, metadata: dict[str, Any]) -> dict[str, Any]:
    """Each stream by name, coded ones as bytes, others as arrays (9, 10, 13)."""
    found = header.keys() - {"__metadata__", "signature"}
    require(found == STREAMS.keys() == metadata["checksums"].keys(), "names of the streams (9, 13)")
    if "signature" in header:
        require((header["signature"]["dtype"], header["signature"]["shape"]) == ("U8", [64]), "signature (39)")
    streams: dict[str, Any] = {}
    for name, dtype in STREAMS.items():
        require(header[name]["dtype"] == dtype, f"{name}: dtype (9)")
        start, end = header[name]["data_offsets"]
        raw = body[start:end]
        require(checksum(raw) == metadata["checksums"][name], f"{name}: checksum (13)")
        if dtype == "F32":
            streams[name] = np.frombuffer(raw, F32).reshape(header[name]["shape"])
            require(bool(np.isfinite(streams[name]).all()), f"{name}: not finite (10)")
        else:
            streams[name] = raw
    return streams


# Metadata


def read_metadata(header: dict[str, Any]) -> dict[str, Any]:
    """(8, 11 to 14)"""
    extra = header.get("__metadata__")
    require(type(extra) is dict and type(extra.get("ksm_edge")) is str, "no metadata (8)")
    try:
        raw = extra["ksm_edge"].encode()
    except UnicodeEncodeError as error:
        raise RefusedError("half of a surrogate pair (12)") from error
    require(raw.startswith(b'{"checksum":"'), "how the text begins (11)")
    require(checksum(raw[29:]).encode() == raw[13:29], "the text's checksum (11)")
    metadata = parse(raw)
    require(is_count(metadata.get("format")) and metadata["format"] == 1, f"format {metadata.get('format')} (2)")
    check_fields(metadata)
    return metadata


def check_fields(m: dict[str, Any]) -> None:
    texts = ("task", "backbone", "recipe", "granularity", "statistics", "fused_digest")
    kinds = dict.fromkeys(texts, str) | dict.fromkeys(("classes", "layers", "own_statistics"), list)
    kinds |= dict.fromkeys(("input", "bits", "codecs", "checksums", "record"), dict) | {"soft": bool, "features": int}
    for field, kind in kinds.items():
        require(type(m.get(field)) is kind, f"{field} (13)")
    image, L = m["input"], len(m["layers"])
    require(len(m["classes"]) >= 1 and all(type(name) is str for name in m["classes"]), "classes (13)")
    require(
        bool(re.fullmatch("kernel|channel|element|group:(?=[0-9]{1,9}$)0*[1-9][0-9]*", m["granularity"])),
        "granularity (13)",
    )
    require(m["statistics"] in ("frozen", "batch"), "statistics (13)")
    require(is_count(image.get("size")) and is_count(image.get("resize")), "input (13)")
    require(0 < image["size"] <= image["resize"] <= 4096, "input (13)")
    for part in ("mean", "std"):
        require(type(image.get(part)) is list and len(image[part]) == 3, f"input {part} (13)")
        require(all(type(number) in (int, float) and is_finite(number) for number in image[part]), f"input {part} (13)")
    require(min(image["std"]) > 0, "input std (13)")
    require(L <= 2048, "layers (13)")
    for layer in m["layers"]:
        require(type(layer) is list and len(layer) == 5 and type(layer[0]) is str, "layers (13)")
        require(all(is_count(size) and size >= 1 for size in layer[1:]), "layers (13)")
    require(len({layer[0] for layer in m["layers"]}) == L, "names of layers (13)")
    own = m["own_statistics"]
    require(all(is_count(i) and i < L for i in own) and len(set(own)) == len(own), "own_statistics (13)")
    require(not own or m["statistics"] == "batch", "own_statistics (13)")
    require(m["features"] >= 1, "features (13)")
    for name, least in (("scale", 1), ("norm", 2), ("head", 2)):
        require(is_count(m["bits"].get(name)) and least <= m["bits"][name] <= 8, f"bits {name} (13)")
    for name in ("norm", "head"):
        require(m["codecs"].get(name) == "deflate", f"codec {m['codecs'].get(name)} (3)")
    scales = m["codecs"].get("scales")
    require(scales in ("deflate", "mirrored-deflate"), f"codec {scales} (3)")
    require(scales == "deflate" or m["bits"]["scale"] <= 7, "bits scale (27)")
    require(m["codecs"].get("bits") in ("groups-golomb", "bits-deflate"), f"codec {m['codecs'].get('bits')} (3)")
    scores = sum(math.prod(score_shape(m, layer)) for layer in m["layers"])
    room = scores + sum(O for _, O, *_ in m["layers"]) + len(m["classes"]) * m["features"]
    require(room <= 2**25, "values in all (14)")


def score_shape(m: dict[str, Any], layer: list[Any]) -> tuple[int, ...]:
    """(16)"""
    _, O, I, kh, kw = layer
    shapes = {"kernel": (O, I), "channel": (O, 1), "element": (O, I, kh, kw)}
    return shapes.get(m["granularity"]) or (O, -(-I // int(m["granularity"][6:])))


# Keep bits


def read_masks(m: dict[str, Any], streams: dict[str, Any]) -> list[dict[str, np.ndarray]]:
    """`keep`, `scale` and `range` of each layer in which anything is cut, nothing of others (17, 27)."""
    shapes = [score_shape(m, layer) for layer in m["layers"]]
    tables = [(shape[0], math.prod(shape[1:])) for shape in shapes]
    read = {"groups-golomb": read_groups, "bits-deflate": read_packed}[m["codecs"]["bits"]]
    keeps = [keep.reshape(shape) for keep, shape in zip(read(streams["bits"], tables), shapes, strict=True)]
    cuts = [int((~keep).sum()) for keep in keeps]
    ranges = shaped(streams, "ranges", (sum(cut > 0 for cut in cuts), 2))
    require(bool((ranges[:, 0] <= ranges[:, 1]).all()), "ranges (10)")
    b, amplifies = m["bits"]["scale"], m["codecs"]["scales"] == "mirrored-deflate"
    codes = read_codes(streams["scales"], b + amplifies, sum(cuts) if m["soft"] else 0).astype(int)
    scales = (codes % 2**b).astype(F32) * F32.type(0.5 / (2**b - 1))
    scales[codes >= 2**b] = F32.type(2) - scales[codes >= 2**b]
    masks: list[dict[str, np.ndarray]] = []
    row = first = 0
    for keep, cut in zip(keeps, cuts, strict=True):
        if not cut:
            masks.append({})
            continue
        scale = np.zeros(keep.shape, F32)
        if m["soft"]:
            scale[~keep] = scales[first : first + cut]
            first += cut
        masks.append({"keep": keep, "scale": scale, "range": ranges[row]})
        row += 1
    return masks


# Numbers


def read_norm(m: dict[str, Any], streams: dict[str, Any]) -> list[dict[str, np.ndarray]]:
    """Differences of gamma and beta (28)."""
    L, C = len(m["layers"]), len(m["classes"])
    steps = shaped(streams, "steps", (2 * L + C,))
    require(bool(((steps >= 0) & (steps <= 2.0**120)).all()), "steps (10)")
    pairs = steps[: 2 * L].reshape(L, 2)
    sizes = [O if step else 0 for (_, O, *_), pair in zip(m["layers"], pairs, strict=True) for step in pair]
    codes = read_differences(streams["norm"], m["bits"]["norm"], sum(sizes))
    parts = [part * step for part, step in zip(split(codes, sizes), pairs.ravel(), strict=True)]
    filled = [part if part.size else np.zeros(m["layers"][i // 2][1], F32) for i, part in enumerate(parts)]
    return [{"gamma": filled[2 * i], "beta": filled[2 * i + 1]} for i in range(L)]


def read_head(m: dict[str, Any], streams: dict[str, Any]) -> np.ndarray:
    """(C, F) (28)"""
    C, F = len(m["classes"]), m["features"]
    codes = read_differences(streams["head"], m["bits"]["head"], C * F)
    return codes.reshape(C, F) * streams["steps"][2 * len(m["layers"]) :, None]


def read_own(m: dict[str, Any], streams: dict[str, Any]) -> dict[int, dict[str, np.ndarray]]:
    filters = [m["layers"][i][1] for i in m["own_statistics"]]
    parts = split(shaped(streams, "own", (2 * sum(filters),)), [O for O in filters for _ in range(2)])
    require(all((var >= 0).all() for var in parts[1::2]), "var below 0 (10)")
    return {i: {"mean": parts[2 * k], "var": parts[2 * k + 1]} for k, i in enumerate(m["own_statistics"])}


def read_differences(data: bytes, b: int, count: int) -> np.ndarray:
    """Codes in [-q, q], float32 (28)."""
    q = 2 ** (b - 1) - 1
    codes = read_codes(data, b, count).astype(int)
    require(bool((codes <= 2 * q).all()), "a code that stands for nothing (28)")
    return (codes - q).astype(F32)


# Small things


def parse(raw: bytes) -> Any:
    """JSON (12)"""
    try:
        values = json.loads(raw.decode(), object_pairs_hook=unique)
        json.dumps(values, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"{error} (12)") from error
    return values


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    require(len({name for name, _ in pairs}) == len(pairs), "a name twice in one object (12)")
    return dict(pairs)


def checksum(raw: bytes) -> str:
    """(11)"""
    return hashlib.blake2b(raw, digest_size=8).hexdigest()


def shaped(streams: dict[str, Any], name: str, shape: tuple[int, ...]) -> np.ndarray:
    require(streams[name].shape == shape, f"{name}: shape {streams[name].shape} rather than {shape} (9)")
    return streams[name]


def is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def is_finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:
        return False
