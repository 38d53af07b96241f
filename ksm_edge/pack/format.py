"""A pack as bytes, the writing side: quantize, code, and put into few streams.

stream   dtype         holds
bits     U8, coded     keep bits of all layers, in the order of the layer table (see `ksm_edge.coding.keep`)
ranges   F32 (n, 2)    least and greatest cut score of the n layers that have any kernel cut
scales   U8, coded     a code for every cut kernel of those layers; none where scales are all 0 (binary masks)
norm     U8, coded     codes of the differences of gamma, then of beta, layer by layer; none where a step is 0
steps    F32 (2 L + C) what those codes count in: gamma and beta of each of L layers, then each row of the head
head     U8, coded     codes of the head's weight (C, F)
bias     F32 (C,)      the head's bias
own      F32           mean and var of the layers that have their own
golden   F32 (n, C)    logits for the bundle's n golden inputs

A signed pack has one more, put in by `ksm_edge.pack.signature`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from ksm_edge.coding.deflate import DEFLATE, MIRRORED, encode_codes
from ksm_edge.coding.keep import encode_keep, table_shape
from ksm_edge.errors import UsageError
from ksm_edge.mask import SCALE_LIMIT, SoftMask, score_shape
from ksm_edge.pack.container import write_container
from ksm_edge.pack.metadata import MAX_STEP, Metadata, checksum, write_metadata
from ksm_edge.pack.quantize import quantize_difference, quantize_scale, unsigned
from ksm_edge.pack.record import LayerState, Pack

# `adapt` judges and reports a task as these bits hold it.
SCALE_BITS, NORM_BITS, HEAD_BITS = 2, 4, 5


def encode(
    pack: Pack, *, scale_bits: int | None = None, norm_bits: int | None = None, head_bits: int | None = None
) -> bytes:
    """The file's bytes; the same for the same pack, and for what `decode` makes of them.

    Bits that are not given are those of the file that the pack was read from, or else SCALE_BITS, NORM_BITS, HEAD_BITS.
    Raises UsageError for bits out of range (scales 1 to 8, or 7 where some amplify, others 2 to 8), values that are not
    finite, or shapes that do not fit each other.
    """
    given = {"scale": scale_bits, "norm": norm_bits, "head": head_bits}
    usual = {"scale": SCALE_BITS, "norm": NORM_BITS, "head": HEAD_BITS} | dict(pack.bits)
    bits = {name: usual[name] if number is None else number for name, number in given.items()}
    if not all((1 if name == "scale" else 2) <= number <= 8 for name, number in bits.items()):
        raise UsageError(f"bits {bits}: expected 1 to 8 for scale, 2 to 8 for norm and head")
    if pack.amplifies and bits["scale"] == 8:
        raise UsageError("bits of a scale: where some amplify, which takes one more, 7 at most")
    _check_shapes(pack)
    states = list(pack.layers.values())
    codec, keep_bits = encode_keep(*_cuts(pack))
    cut = [state.mask for state in states if state.mask is not None and state.mask.cut.size]
    norm = [quantize_difference(part, bits["norm"]) for s in states for part in (s.gamma_delta, s.beta_delta)]
    head = [quantize_difference(row, bits["head"]) for row in pack.head_weight]
    scales = [quantize_scale(mask.cut_scale, bits["scale"]) for mask in cut] if pack.soft else []
    own = [part for state in states for part in (state.mean, state.var) if part is not None]
    coded = {
        "bits": keep_bits,
        "scales": encode_codes(_joined(scales, np.uint8), bits["scale"] + pack.amplifies),
        "norm": _encode_signed((codes for codes, step in norm if step), bits["norm"]),
        "head": _encode_signed((codes for codes, _ in head), bits["head"]),
    }
    steps = np.array([step for _, step in norm + head], "<f4")
    if steps.max(initial=0) > MAX_STEP:
        raise UsageError(f"a batch-norm difference or a weight of the head is too large for a step of {MAX_STEP:.2e}")
    streams = {name: np.frombuffer(data, np.uint8) for name, data in coded.items()} | {
        "ranges": np.array([(mask.low, mask.high) for mask in cut], "<f4").reshape(-1, 2),
        "steps": steps,
        "bias": pack.head_bias.astype("<f4"),
        "own": _joined(own, np.float32).astype("<f4"),
        "golden": pack.golden_logits.astype("<f4"),
    }
    metadata = Metadata(
        task=pack.task,
        classes=pack.classes,
        backbone=pack.backbone,
        recipe=pack.recipe,
        granularity=pack.granularity,
        soft=pack.soft,
        statistics=pack.statistics,
        input=pack.input,
        layers=tuple((name, *pack.weight_shapes[name]) for name in pack.layers),
        own_statistics=tuple(i for i, state in enumerate(states) if state.mean is not None),
        features=pack.head_weight.shape[1],
        bits=bits,
        codecs=dict.fromkeys(coded, DEFLATE) | {"bits": codec} | ({"scales": MIRRORED} if pack.amplifies else {}),
        checksums={name: checksum(stream.tobytes()) for name, stream in streams.items()},
        fused_digest=pack.fused_digest,
        record=dict(pack.record),
    )
    return write_container(write_metadata(metadata), streams)


def _encode_signed(parts: Iterable[np.ndarray], bits: int) -> bytes:
    return encode_codes(unsigned(_joined(parts, np.int8), bits), bits)


def _joined(parts: Iterable[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *(part.ravel() for part in parts)])


def _cuts(pack: Pack) -> tuple[list[np.ndarray], list[tuple[int, int]]]:
    """Flat places of each layer's cut scores, and the shape (O, X) that they count in."""
    masks = [state.mask for state in pack.layers.values()]
    cuts = [np.zeros(0, np.int32) if mask is None else mask.cut for mask in masks]
    shapes = [score_shape(pack.weight_shapes[name], pack.granularity) for name in pack.layers]
    return cuts, [table_shape(shape) for shape in shapes]


def _check_shapes(pack: Pack) -> None:
    """UsageError naming the array that is off: what is written must be readable."""
    C, F = len(pack.classes), pack.head_weight.shape[-1]
    _check("head_weight", pack.head_weight, (C, F))
    _check("head_bias", pack.head_bias, (C,))
    _check("golden_logits", pack.golden_logits, (len(pack.golden_logits), C))
    if pack.layers.keys() != pack.weight_shapes.keys():
        raise UsageError("a pack's layers and weight_shapes must name the same layers")
    for name, state in pack.layers.items():
        _check_layer(name, state, pack.weight_shapes[name], pack.granularity)


def _check_layer(name: str, state: LayerState, shape: tuple[int, int, int, int], granularity: str) -> None:
    O = shape[0]
    for part in ("gamma_delta", "beta_delta", "mean", "var"):
        if (values := getattr(state, part)) is not None:
            _check(f"{name}: {part}", values, (O,))
    if (state.mean is None) != (state.var is None):
        raise UsageError(f"{name}: mean and var come together")
    if state.mask is not None:
        _check_mask(name, state.mask, score_shape(shape, granularity))
        _check(f"{name}: mask range", np.array([state.mask.low, state.mask.high], np.float32), (2,))


def _check_mask(name: str, mask: SoftMask, shape: tuple[int, ...]) -> None:
    cut = mask.cut
    if mask.shape != shape or (cut.size and (cut[0] < 0 or cut[-1] >= math.prod(shape) or (np.diff(cut) <= 0).any())):
        raise UsageError(f"{name}: a mask of shape {mask.shape} with {cut.size} scores cut does not fit {shape}")
    scale = mask.cut_scale
    _check(f"{name}: mask scale", scale, cut.shape)
    folded = np.where(scale > 1, 2 - scale, scale)
    if cut.size and not 0 <= folded.min() <= folded.max() <= SCALE_LIMIT:
        raise UsageError(f"{name}: scales of a mask lie in [0, 0.5], or where it amplifies in [1.5, 2]")


def _check(name: str, values: np.ndarray, shape: tuple[int, ...]) -> None:
    if values.shape != shape or not np.isfinite(values).all():
        fault = f"shape {values.shape}" if values.shape != shape else "values that are not finite"
        raise UsageError(f"{name} has {fault}; a pack needs finite values of shape {shape}")
