"""Packs of format version 1 as they were written once: every later version reads them to the same arrays."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import second_coding
import second_reader
from contents import digests, of_pack, of_second
from golden_backbone import golden_backbone

from ksm_edge.fuse import digest_of
from ksm_edge.pack.files import load_pack
from ksm_edge.pack.keys import load_public_key
from ksm_edge.pack.signature import require_signature

pytestmark = pytest.mark.usefixtures("each_form")
FOLDER = Path(__file__).parent / "golden"
HELD = json.loads((FOLDER / "golden.json").read_text(encoding="utf-8"))
OTHER_BACKBONE = "busy-rows-and-columns"  # its layers are made for the coding of keep bits alone

golden = pytest.mark.parametrize("name", HELD)


def metadata_of(name: str) -> dict:
    return second_reader.read_pack((FOLDER / f"{name}.ksm").read_bytes())["metadata"]


@golden
def test_the_file_is_as_it_was_written(name: str) -> None:
    assert hashlib.sha256((FOLDER / f"{name}.ksm").read_bytes()).hexdigest() == HELD[name]["sha256"]


@golden
def test_a_golden_pack_is_read_to_the_same_arrays(name: str) -> None:
    values, arrays = of_pack(load_pack(FOLDER / f"{name}.ksm"))
    assert values == HELD[name]["values"]
    assert digests(arrays) == HELD[name]["arrays"]


@golden
def test_the_second_reader_reads_it_to_the_same_arrays(name: str) -> None:
    values, arrays = of_second(second_reader.read_pack((FOLDER / f"{name}.ksm").read_bytes()))
    assert values == HELD[name]["values"]
    assert digests(arrays) == HELD[name]["arrays"]


@pytest.mark.parametrize("name", sorted(HELD.keys() - {OTHER_BACKBONE}))
def test_what_is_fused_from_it_has_the_digest_it_says(name: str) -> None:
    pack = load_pack(FOLDER / f"{name}.ksm")
    assert digest_of(golden_backbone(), pack) == pack.fused_digest


def test_the_signed_one_is_signed_with_the_key_beside_it() -> None:
    pytest.importorskip("cryptography", reason="signatures need cryptography: pip install 'ksm_edge[sign]'")
    key = load_public_key(FOLDER / "public.pem")
    require_signature((FOLDER / "signed.ksm").read_bytes(), [key])


def test_no_golden_pack_is_without_its_entry_and_all_are_small() -> None:
    files = sorted(FOLDER.glob("*.ksm"))
    assert [path.stem for path in files] == sorted(HELD)
    assert sum(path.stat().st_size for path in files) < 30_000


def test_between_them_they_have_each_form_of_the_format() -> None:
    found = [metadata_of(name) for name in HELD]
    assert {metadata["granularity"] for metadata in found} == {"kernel", "group:3", "channel", "element"}
    assert {metadata["statistics"] for metadata in found} == {"frozen", "batch"}
    assert {metadata["soft"] for metadata in found} == {True, False}
    assert {metadata["codecs"]["bits"] for metadata in found} == {"groups-golomb", "bits-deflate"}
    assert {metadata["codecs"]["scales"] for metadata in found} == {"deflate", "mirrored-deflate"}
    header, body = second_reader.read_header((FOLDER / f"{OTHER_BACKBONE}.ksm").read_bytes())
    contents = body[slice(*header["bits"]["data_offsets"])]
    kinds, position = [], 0
    for _ in metadata_of(OTHER_BACKBONE)["layers"]:
        kind, position = second_coding.read_number(contents, position)
        kinds.append(kind)
        for _ in range((0, 1, 2, 2, 4)[kind]):
            _, position = second_coding.read_number(contents, position)
    assert kinds == [1, 2, 3, 4, 0]


def test_the_script_that_made_them_leaves_them_as_they_are() -> None:
    pytest.importorskip("cryptography", reason="it signs one of them")
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in FOLDER.glob("*.ksm")}
    script = Path(__file__).parents[2] / "scripts/write_golden_packs.py"
    output = subprocess.run([sys.executable, str(script)], check=True, capture_output=True, text=True).stdout
    assert output.count("is there, left as it is") == len(before)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in FOLDER.glob("*.ksm")} == before
