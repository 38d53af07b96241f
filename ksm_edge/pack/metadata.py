"""The metadata of a pack file: one JSON text that begins with its own checksum.

    {"checksum":"0123456789abcdef","backbone":...}

The checksum is the 8-byte blake2b, in hex, of all the text behind it. So every byte of the text is covered, and a
reader in any language checks it without writing JSON the way Python does.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from typing import Any, TypeVar

from ksm_edge.bundle.layers import MAX_PIXELS, InputContract
from ksm_edge.errors import DamagedFileError, KsmEdgeError, UnsupportedVersionError, UsageError
from ksm_edge.mask import score_shape
from ksm_edge.pack.container import parse_json
from ksm_edge.pack.record import BATCH, STATISTICS

FORMAT = 1
MAX_VALUES = 1 << 25  # of all layers and the head: ResNet-50 with a score for every weight has 23.5 M
MAX_LAYERS = 2048  # ResNet-152 has 155; each costs a reader time, however little it holds
MAX_STEP = 2.0**120  # that codes count in: 127 of them are finite in float32
OPENING = '{"checksum":"'
CHECKSUM_DIGITS = 16
COVERED_FROM = len(OPENING) + CHECKSUM_DIGITS

T = TypeVar("T")


@dataclass(frozen=True)
class Metadata:
    """Everything in a pack file that is no stream, by the names it has there."""

    task: str
    classes: tuple[str, ...]
    backbone: str
    recipe: str
    granularity: str
    soft: bool
    statistics: str
    input: InputContract
    layers: tuple[tuple[str, int, int, int, int], ...]  # name, O, I, kh, kw
    own_statistics: tuple[int, ...]  # which of `layers` have a mean and var in the pack
    features: int  # F
    bits: Mapping[str, int]  # of each quantized value: scale, norm, head
    codecs: Mapping[str, str]  # of each coded stream
    checksums: Mapping[str, str]  # of each stream
    fused_digest: str
    record: Mapping[str, Any]

    @cached_property
    def score_shapes(self) -> list[tuple[int, ...]]:
        return [score_shape((O, I, kh, kw), self.granularity) for _, O, I, kh, kw in self.layers]

    @property
    def values(self) -> int:
        """What a reader makes room for: scores, filters (batch-norm has them whatever the granularity) and the head."""
        scores = sum(math.prod(shape) for shape in self.score_shapes)
        return scores + sum(O for _, O, *_ in self.layers) + len(self.classes) * self.features


def checksum(data: bytes | memoryview) -> str:
    """16 hex digits that change with any bit of `data`."""
    return hashlib.blake2b(data, digest_size=CHECKSUM_DIGITS // 2).hexdigest()


def write_metadata(metadata: Metadata) -> str:
    """The JSON text; UsageError for what could not be read back, such as a training record that JSON cannot say."""
    values = {"format": FORMAT, **asdict(metadata)}
    try:
        _check(metadata)
        text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        covered = '",' + text[1:]
        return OPENING + checksum(covered.encode()) + covered
    except (TypeError, ValueError) as error:
        raise UsageError(f"the pack cannot be written: {error}") from error


def read_metadata(text: str) -> Metadata:
    """Check and parse; DamagedFileError for what does not hold, UnsupportedVersionError for another format version."""
    found = text[len(OPENING) : COVERED_FROM]
    # Half a surrogate pair cannot be encoded; whoever has a checksum for "?" in its place is found out below.
    if not text.startswith(OPENING) or checksum(text[COVERED_FROM:].encode(errors="replace")) != found:
        raise DamagedFileError("the pack's metadata is not what was written: its checksum does not hold. Copy it again")
    try:
        values = parse_json(text)
        version = values["format"]
        # Whatever could not be written again: NaN, 1e999, half a surrogate pair.
        json.dumps(values, ensure_ascii=False, allow_nan=False).encode()
    except (KeyError, ValueError, RecursionError) as error:
        raise DamagedFileError(f"the pack's metadata cannot be read: {error}") from error
    if type(version) is not int or version != FORMAT:
        raise UnsupportedVersionError(
            f"the pack has format version {version}; this release reads {FORMAT}. Install a newer ksm-edge to read it"
        )
    try:
        metadata = _parse(values)
        _check(metadata)
    except (KeyError, TypeError, ValueError, OverflowError, KsmEdgeError) as error:
        raise DamagedFileError(f"the pack's metadata does not make sense: {error!r}") from error
    return metadata


def _parse(values: Mapping[str, Any]) -> Metadata:
    given = _is(dict, values["input"])
    return Metadata(
        **{name: _is(str, values[name]) for name in ("task", "backbone", "recipe", "granularity", "statistics")},
        fused_digest=_is(str, values["fused_digest"]),
        classes=_all(str, values["classes"]),
        soft=_is(bool, values["soft"]),
        input=InputContract(
            _is(int, given["size"]), _is(int, given["resize"]), _three(given["mean"]), _three(given["std"])
        ),
        layers=_layers(_is(list, values["layers"])),
        own_statistics=_all(int, values["own_statistics"]),
        features=_is(int, values["features"]),
        bits={name: _is(int, values["bits"][name]) for name in ("scale", "norm", "head")},
        codecs={name: _is(str, values["codecs"][name]) for name in ("bits", "scales", "norm", "head")},
        checksums={name: _is(str, digits) for name, digits in _is(dict, values["checksums"]).items()},
        record=_is(dict, values["record"]),
    )


def _check(metadata: Metadata) -> None:
    """ValueError for what no writer of this format would write."""
    names = [name for name, *_ in metadata.layers]
    _hold(len(names) <= MAX_LAYERS, f"{len(names)} layers; at most {MAX_LAYERS} are possible")
    _hold(len(set(names)) == len(names), "two layers have one name")
    _hold(all(min(O, I, kh, kw) > 0 for _, O, I, kh, kw in metadata.layers), "a layer has an empty dimension")
    _hold(metadata.features > 0 and len(metadata.classes) > 0, "there are no features or no classes")
    _hold(metadata.statistics in STATISTICS, f"statistics are {metadata.statistics!r}")
    fewest = {"scale": 1, "norm": 2, "head": 2}
    _hold(all(fewest[name] <= bits <= 8 for name, bits in metadata.bits.items()), f"bits {metadata.bits}")
    image = metadata.input
    _hold(0 < image.size <= image.resize <= MAX_PIXELS, f"images of {image.size} pixels cropped from {image.resize}")
    _hold(all(map(math.isfinite, image.mean + image.std)) and min(image.std) > 0, f"mean {image.mean}, std {image.std}")
    own = metadata.own_statistics
    _hold(all(0 <= index < len(names) for index in own) and len(set(own)) == len(own), "own_statistics is off")
    _hold(not own or metadata.statistics == BATCH, "frozen statistics, and yet some of its own")
    _hold(metadata.values <= MAX_VALUES, f"{metadata.values} values in all; at most {MAX_VALUES} are possible")


def _hold(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)


def _is(kind: type[T], value: Any) -> T:
    """`value`, of that very type: true is no 1, 3.0 and "3" are no 3."""
    if type(value) is not kind:
        raise TypeError(f"a {type(value).__name__} where {kind.__name__} is needed")
    return value


def _all(kind: type[T], values: Any) -> tuple[T, ...]:
    if not set(map(type, _is(list, values))) <= {kind}:
        raise TypeError(f"something else where {kind.__name__} is needed, in {values!r:.200}")
    return tuple(values)


def _layers(values: list[Any]) -> tuple[tuple[str, int, int, int, int], ...]:
    layers = tuple((name, O, I, kh, kw) for name, O, I, kh, kw in values)
    names, *sizes = zip(*layers, strict=True) if layers else ((),)
    _all(str, list(names))
    _all(int, list(chain(*sizes)))
    return layers


def _three(values: Any) -> tuple[float, float, float]:
    first, second, third = (float(value if type(value) is int else _is(float, value)) for value in _is(list, values))
    return first, second, third
