"""Pack files: load, save, and whether one belongs to a backbone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ksm_edge.atomic import atomic_write
from ksm_edge.bundle.layers import Bundle, InputContract
from ksm_edge.errors import DamagedFileError, FileError, WrongBackboneError
from ksm_edge.pack.container import MAX_FILE_BYTES
from ksm_edge.pack.format import encode
from ksm_edge.pack.reader import decode
from ksm_edge.pack.record import Pack
from ksm_edge.pack.signature import require_signature

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

SUFFIX = ".ksm"


def load_pack(path: str | os.PathLike[str], keys: Sequence[Ed25519PublicKey] | None = None) -> Pack:
    """Read a task pack; needs neither its backbone nor a runtime.

    `keys`, from `ksm_edge.pack.keys.load_public_key`: one of them must have signed it, which is checked before anything
    of it is decoded. Raises FileError where there is no such file, and with the path in front UnsignedError or
    SignatureError, and what `ksm_edge.pack.reader.decode` raises.
    """
    return load_pack_and_bytes(path, keys)[0]


def load_pack_and_bytes(
    path: str | os.PathLike[str], keys: Sequence[Ed25519PublicKey] | None = None
) -> tuple[Pack, bytes]:
    """The same, and the file's bytes, for who wants to know where they go."""
    data = _read(path)
    try:
        if keys is not None:
            require_signature(data, keys)
        return decode(data), data
    except FileError as error:
        raise type(error)(f"{os.fspath(path)}: {error}") from error


def _read(path: str | os.PathLike[str]) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise FileError(f"{os.fspath(path)}: cannot be read as a pack: {error.strerror}") from error
    if len(data) > MAX_FILE_BYTES:
        raise DamagedFileError(f"{os.fspath(path)}: over {MAX_FILE_BYTES} bytes, more than a pack can have")
    return data


def save_pack(pack: Pack, path: str | os.PathLike[str], **bits: int) -> int:
    """Write a pack, whole or not at all, and return its size in bytes; `bits` as for `ksm_edge.pack.format.encode`."""
    data = encode(pack, **bits)
    with atomic_write(Path(path)) as file:
        file.write(data)
    return len(data)


def require_backbone(pack: Pack, bundle: Bundle) -> None:
    """WrongBackboneError unless the pack was made for this very backbone and input; DamagedFileError for odd shapes."""
    if pack.backbone != bundle.digest:
        raise WrongBackboneError(
            f"pack {pack.task!r} was made for backbone {pack.recipe} ({pack.backbone}), "
            f"this bundle holds {bundle.recipe} ({bundle.digest}). Give the bundle it was adapted with as --bundle"
        )
    if pack.input != bundle.input:
        raise WrongBackboneError(
            f"pack {pack.task!r} was learned on images of {_said(pack.input)}, this bundle takes "
            f"{_said(bundle.input)}. Give the bundle it was adapted with as --bundle, or export one with that --size, "
            "--resize, --mean and --std"
        )
    shapes = {layer.name: layer.weight_shape for layer in bundle.layers}
    for name, shape in pack.weight_shapes.items():
        if shapes.get(name) != shape:
            raise DamagedFileError(
                f"pack {pack.task!r}, layer {name}: shape {shape}, the backbone has {shapes.get(name)}"
            )
    features = pack.head_weight.shape[1]
    if features != bundle.features:
        raise DamagedFileError(
            f"pack {pack.task!r}: its head takes {features} features, the backbone gives {bundle.features}"
        )


def _said(contract: InputContract) -> str:
    return f"{contract.size} px cropped from {contract.resize}, mean {contract.mean}, std {contract.std}"
