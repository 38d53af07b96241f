"""A pack from bytes: every check of a pack file is here or below, none behind it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ksm_edge.coding.deflate import DEFLATE, MIRRORED, decode_codes
from ksm_edge.coding.keep import decode_keep, table_shape
from ksm_edge.errors import DamagedFileError, UnsupportedVersionError
from ksm_edge.mask import SoftMask
from ksm_edge.pack.container import read_container
from ksm_edge.pack.format import encode
from ksm_edge.pack.metadata import MAX_STEP, Metadata, checksum, read_metadata
from ksm_edge.pack.quantize import dequantize_difference, dequantize_scale, signed
from ksm_edge.pack.record import LayerState, Pack
from ksm_edge.pack.signature import take_signature

STREAMS = {"bits": "u1", "scales": "u1", "norm": "u1", "head": "u1"} | dict.fromkeys(
    ("ranges", "steps", "bias", "own", "golden"), "f4"
)


def decode(data: bytes) -> Pack:
    """The pack in a file's bytes.

    Raises DamagedFileError where the bytes are not what was written, UnsupportedVersionError for a format version or
    codec that this release does not know.
    """
    text, streams = read_container(data)
    take_signature(streams)  # whether it fits is for who has the key: see `require_signature`
    metadata = read_metadata(text)
    _check_streams(metadata, streams)
    head, bias = _read_head(metadata, streams)
    masks = _read_masks(metadata, streams)
    norm = _read_norm(metadata, streams)
    own = _read_own(metadata, streams)
    names = [name for name, *_ in metadata.layers]
    states = [LayerState(masks[i], *norm[i], *own.get(i, (None, None))) for i in range(len(names))]
    golden = streams["golden"]
    if golden.ndim != 2 or golden.shape[1] != len(bias):
        raise DamagedFileError(f"stream 'golden' has shape {golden.shape}; needed (n, {len(bias)})")
    return Pack(
        task=metadata.task,
        classes=metadata.classes,
        backbone=metadata.backbone,
        recipe=metadata.recipe,
        granularity=metadata.granularity,
        soft=metadata.soft,
        statistics=metadata.statistics,
        input=metadata.input,
        layers=dict(zip(names, states, strict=True)),
        weight_shapes={name: (O, I, kh, kw) for name, O, I, kh, kw in metadata.layers},
        head_weight=head,
        head_bias=bias,
        record=metadata.record,
        fused_digest=metadata.fused_digest,
        golden_logits=golden,
        bits=metadata.bits,
    )


def quantized(pack: Pack, **bits: int) -> Pack:
    """The pack as it will be read back: `bits` as for `ksm_edge.pack.format.encode`."""
    return decode(encode(pack, **bits))


def _check_streams(metadata: Metadata, streams: Mapping[str, np.ndarray]) -> None:
    """All streams there, none other, each with its checksum, and no codec that is not known."""
    if streams.keys() != STREAMS.keys() or metadata.checksums.keys() != STREAMS.keys():
        odd = sorted(streams.keys() ^ STREAMS.keys() | metadata.checksums.keys() ^ STREAMS.keys())
        raise DamagedFileError(f"the pack's streams are not those of its format: {', '.join(odd)}")
    for name, stream in streams.items():
        if stream.dtype != STREAMS[name]:
            raise DamagedFileError(f"stream {name!r} holds {stream.dtype}; needed {STREAMS[name]}")
        if checksum(stream.tobytes()) != metadata.checksums[name]:
            raise DamagedFileError(f"stream {name!r} is not what was written: its checksum does not hold")
        if stream.dtype == np.float32 and not np.isfinite(stream).all():
            raise DamagedFileError(f"stream {name!r} holds values that are not finite")
    for name in ("scales", "norm", "head"):
        known = (DEFLATE, MIRRORED) if name == "scales" else (DEFLATE,)
        if (codec := metadata.codecs.get(name)) not in known:
            raise UnsupportedVersionError(
                f"stream {name!r} is coded as {codec!r}; this release knows {' and '.join(known)}"
            )
    if _amplifying(metadata) and metadata.bits["scale"] == 8:
        raise DamagedFileError(f"scales of 8 bits leave none for {MIRRORED}")


def _amplifying(metadata: Metadata) -> bool:
    return metadata.codecs["scales"] == MIRRORED


def _read_masks(metadata: Metadata, streams: Mapping[str, np.ndarray]) -> list[SoftMask | None]:
    shapes = metadata.score_shapes
    codec = metadata.codecs.get("bits", "nothing")
    cuts = decode_keep(codec, streams["bits"].tobytes(), [table_shape(shape) for shape in shapes])
    counts = [cut.size for cut in cuts]
    ranges = _shaped(streams, "ranges", (sum(count > 0 for count in counts), 2))
    if (ranges[:, 0] > ranges[:, 1]).any():
        raise DamagedFileError("stream 'ranges' holds one whose least score is above its greatest")
    bits = metadata.bits["scale"]
    each = bits + _amplifying(metadata)
    codes = decode_codes(streams["scales"].tobytes(), each, sum(counts) if metadata.soft else 0)
    scales = dequantize_scale(codes, bits)
    masks: list[SoftMask | None] = []
    of_layers, first = iter(ranges.tolist()), 0
    for cut, shape in zip(cuts, shapes, strict=True):
        if not cut.size:
            masks.append(None)
            continue
        scale = scales[first : first + cut.size] if metadata.soft else np.zeros(cut.size, np.float32)
        masks.append(SoftMask(cut, scale, shape, *next(of_layers)))
        first += cut.size
    return masks


def _read_norm(metadata: Metadata, streams: Mapping[str, np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Differences of gamma and beta of each layer."""
    steps = streams["steps"][: 2 * len(metadata.layers)]
    sizes = np.repeat(np.array([O for _, O, *_ in metadata.layers], np.int64), 2)
    coded = np.where(steps > 0, sizes, 0)  # a step of 0 says that all are 0, without codes
    ends = np.cumsum(coded).tolist()
    codes = _signed_codes(metadata, streams, "norm", sum(coded.tolist()))
    values = dequantize_difference(codes, np.repeat(steps, coded))
    parts = [
        values[end - count : end] if count else np.zeros(size, np.float32)
        for size, count, end in zip(sizes.tolist(), coded.tolist(), ends, strict=True)
    ]
    return list(zip(parts[0::2], parts[1::2], strict=True))


def _read_head(metadata: Metadata, streams: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The head's weight (C, F) and bias (C,); here the steps are checked for the norm as well."""
    C, F, L = len(metadata.classes), metadata.features, len(metadata.layers)
    steps = _shaped(streams, "steps", (2 * L + C,))
    if (steps < 0).any() or (steps > MAX_STEP).any():
        raise DamagedFileError(f"stream 'steps' holds a step below 0 or above {MAX_STEP:.2e}")
    codes = _signed_codes(metadata, streams, "head", C * F).reshape(C, F)
    return dequantize_difference(codes, steps[2 * L :, None]), _shaped(streams, "bias", (C,))


def _signed_codes(metadata: Metadata, streams: Mapping[str, np.ndarray], name: str, count: int) -> np.ndarray:
    bits = metadata.bits[name]
    codes = signed(decode_codes(streams[name].tobytes(), bits, count), bits)
    if codes.size and codes.max() >= 2 ** (bits - 1):
        raise DamagedFileError(f"stream {name!r} holds a code that no value has")
    return codes


def _read_own(metadata: Metadata, streams: Mapping[str, np.ndarray]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Mean and var by the index of the layers that have their own."""
    filters = [metadata.layers[index][1] for index in metadata.own_statistics]
    values = _shaped(streams, "own", (2 * sum(filters),))
    own, position = {}, 0
    for index, O in zip(metadata.own_statistics, filters, strict=True):
        mean, var = values[position : position + O], values[position + O : position + 2 * O]
        if (var < 0).any():
            raise DamagedFileError(f"layer {metadata.layers[index][0]}: a variance is below 0")
        own[index] = (mean, var)
        position += 2 * O
    return own


def _shaped(streams: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...]) -> np.ndarray:
    if streams[name].shape != shape:
        raise DamagedFileError(f"stream {name!r} has shape {streams[name].shape}; needed {shape}")
    return streams[name]
