"""Write the packs of tests/pack/golden/ that are not there yet, and what they hold into golden.json beside them.

    python scripts/write_golden_packs.py

What is there is never written again: these files stand for the packs that people have, and every later version reads
them. A new one gets a new name.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "tests/pack/golden"
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/pack")]

from contents import digests, of_pack  # noqa: E402
from golden_backbone import golden_backbone  # noqa: E402
from tiny import LAYERS, tiny_pack  # noqa: E402

from ksm_edge.fuse import digest_of  # noqa: E402
from ksm_edge.mask import SoftMask  # noqa: E402
from ksm_edge.pack.container import read_container, write_container  # noqa: E402
from ksm_edge.pack.format import encode  # noqa: E402
from ksm_edge.pack.metadata import OPENING, checksum  # noqa: E402
from ksm_edge.pack.reader import decode, quantized  # noqa: E402
from ksm_edge.pack.record import LayerState, Pack  # noqa: E402
from ksm_edge.pack.signature import signed  # noqa: E402

# Whoever reads this can sign with it: it shows how a signature is made, not who vouches for anything.
KEY = Ed25519PrivateKey.from_private_bytes(hashlib.sha256(b"ksm_edge golden packs").digest())


def fused(pack: Pack, scale: int, norm: int, head: int) -> bytes:
    """The pack's bytes, under these numbers of bits, with its digest of what is fused from the golden backbone."""
    bits = {"scale_bits": scale, "norm_bits": norm, "head_bits": head}
    return encode(replace(pack, fused_digest=digest_of(golden_backbone(), quantized(pack, **bits))), **bits)


def all_kept() -> bytes:
    """No layer has a mask; one changes only gamma, one only beta, one nothing, and one is not named."""
    pack = tiny_pack()
    zero = {layer.name: np.zeros(layer.weight_shape[0], np.float32) for layer in LAYERS}
    layers = {name: LayerState(None, state.gamma_delta, state.beta_delta) for name, state in pack.layers.items()}
    layers["dw"] = replace(layers["dw"], beta_delta=zero["dw"])
    layers["project"] = replace(layers["project"], gamma_delta=zero["project"], beta_delta=zero["project"])
    del layers["grouped"]
    shapes = {name: pack.weight_shapes[name] for name in layers}
    return fused(replace(pack, layers=layers, weight_shapes=shapes), 8, 2, 7)


def busy() -> bytes:
    """A layer of each kind that `groups-golomb` has; they are none of the golden backbone's."""
    rng = np.random.default_rng(2)
    layers, shapes = {}, {}
    for name, rows, columns in (("whole", 1, 1), ("rows", 20, 1), ("columns", 1, 20), ("both", 12, 12), ("kept", 0, 0)):
        O, I = shapes[name] = (48, 40)
        share = 0.02 * np.where(np.arange(O) % 6 == 1, rows, 1)[:, None] * np.where(np.arange(I) % 5 == 2, columns, 1)
        keep = rng.random((O, I)) >= share * (rows > 0)
        scale = np.where(keep, np.float32(0), np.float32(0.5) * rng.integers(0, 2, keep.shape, np.uint8))
        cut = np.flatnonzero(~keep).astype(np.int32)
        mask = SoftMask(cut, scale.astype(np.float32).reshape(-1)[cut], keep.shape, -0.25, 0.0)
        layers[name] = LayerState(mask, *[np.zeros(O, np.float32)] * 2)
    changes = {"layers": layers, "weight_shapes": {name: (*shape, 1, 1) for name, shape in shapes.items()}}
    return encode(tiny_pack(changes=changes), scale_bits=1, norm_bits=3, head_bits=4)


def deflated() -> bytes:
    data = fused(tiny_pack(cut=0.6), 5, 6, 4)
    assert b"bits-deflate" in data
    return data


def later_fields() -> bytes:
    """What a later writer of this version may do: fields that are not known today, at every level."""
    text, streams = read_container(fused(tiny_pack(cut=0.2), 2, 4, 5))
    metadata = json.loads(text)
    del metadata["checksum"]
    for values in (metadata, metadata["input"], metadata["bits"], metadata["codecs"]):
        values["a later field"] = {"of": ["any", "kind", 1.5, None]}
    covered = '",' + json.dumps(metadata)[1:]
    return write_container(OPENING + checksum(covered.encode()) + covered, streams)


def with_signature() -> bytes:
    names = {"task": "plantes — 植物", "classes": ("été", '"quoted"', "🌱")}
    return signed(fused(tiny_pack(statistics="batch", cut=0.2, changes=names), 2, 4, 5), KEY)


PACKS: dict[str, Callable[[], bytes]] = {
    "kernel-soft-frozen": lambda: fused(tiny_pack(), 4, 8, 8),
    "group3-binary-batch": lambda: fused(tiny_pack("group:3", soft=False, statistics="batch", cut=0.3), 1, 4, 6),
    "channel-soft-batch": lambda: fused(tiny_pack("channel", statistics="batch", classes=1, cut=0.4), 7, 3, 5),
    "element-soft-frozen": lambda: fused(tiny_pack("element", cut=0.04), 3, 5, 2),
    "amplified": lambda: fused(tiny_pack(cut=0.3, amplify=True), 2, 4, 5),
    "all-kept": all_kept,
    "busy-rows-and-columns": busy,
    "bits-deflate": deflated,
    "later-fields": later_fields,
    "signed": with_signature,
}


def as_text(held: dict[str, Any]) -> str:
    """JSON with a line for each array."""
    flat = {"arrays": {"indent": 3}, "values": {}, "sha256": {}}
    packs = (
        f'"{name}": {{'
        + ",".join(f'\n "{key}": {json.dumps(value, ensure_ascii=False, **flat[key])}' for key, value in pack.items())
        + "\n}"
        for name, pack in held.items()
    )
    return "{\n" + ",\n".join(packs) + "\n}\n"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    table = FOLDER / "golden.json"
    held = json.loads(table.read_text(encoding="utf-8")) if table.exists() else {}
    for name, make in PACKS.items():
        path = FOLDER / f"{name}.ksm"
        if path.exists() or name in held:
            print(f"{name}: is there, left as it is")
            continue
        data = make()
        values, arrays = of_pack(decode(data))
        path.write_bytes(data)
        held[name] = {"sha256": hashlib.sha256(data).hexdigest(), "values": values, "arrays": digests(arrays)}
        print(f"{name}: {len(data)} bytes")
    if not table.exists() or as_text(held) != table.read_text(encoding="utf-8"):
        table.write_text(as_text(held), encoding="utf-8")
    public = FOLDER / "public.pem"
    if not public.exists():
        public.write_bytes(KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))


if __name__ == "__main__":
    main()
