"""`sign` and `verify`, and the verbs that can demand a signature, from arguments to exit code."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from signing import PASSPHRASE, KeyFiles, finished_pack
from tiny import saved_tiny_bundle, tiny_pack

from ksm_edge.cli.main import build_parser, main
from ksm_edge.pack.files import load_pack, save_pack
from ksm_edge.pack.keys import MAKE_PRIVATE, MAKE_PUBLIC

Capture = pytest.CaptureFixture[str]


def call(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    saved_tiny_bundle(tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def pack(bundle: Path, tmp_path: Path) -> Path:
    from ksm_edge.bundle.load import load_bundle

    save_pack(finished_pack(load_bundle(bundle)), tmp_path / "a.ksm")
    return tmp_path / "a.ksm"


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    folder = tmp_path / "photos" / "class 0"
    folder.mkdir(parents=True)
    Image.fromarray(np.full((20, 20, 3), 90, np.uint8)).save(folder / "a.png")
    return folder / "a.png"


def test_a_pack_signed_in_place_is_verified(pack: Path, key_files: KeyFiles, capsys: Capture) -> None:
    plain = pack.stat().st_size
    assert call("sign", pack, "--key", key_files.private) == 0
    assert capsys.readouterr().out == f"{pack}: signed, {pack.stat().st_size:,} bytes\n"
    assert plain + 64 < pack.stat().st_size
    assert call("verify", pack, "--public", key_files.public) == 0
    assert capsys.readouterr().out == (
        f"{pack}: checked format and checksums, signature (only the file itself, without --bundle): ok\n"
    )
    assert [path.name for path in pack.parent.glob("*a.ksm*")] == ["a.ksm"]


def test_out_leaves_the_pack_as_it_is(pack: Path, key_files: KeyFiles, tmp_path: Path, capsys: Capture) -> None:
    before = pack.read_bytes()
    assert call("sign", pack, "--key", key_files.private, "--out", tmp_path / "b.ksm", "--json") == 0
    assert pack.read_bytes() == before
    size = (tmp_path / "b.ksm").stat().st_size
    assert json.loads(capsys.readouterr().out) == {
        "packs": [{"path": str(pack), "out": str(tmp_path / "b.ksm"), "pack_bytes": size}]
    }
    assert call("verify", tmp_path / "b.ksm", "--public", key_files.public) == 0


def test_out_is_for_one_pack(pack: Path, key_files: KeyFiles, tmp_path: Path, capsys: Capture) -> None:
    assert call("sign", pack, pack, "--key", key_files.private, "--out", tmp_path / "b.ksm") == 2
    assert "--out names one file, and 2 packs are given" in capsys.readouterr().err


def test_a_call_with_one_damaged_pack_signs_none(
    pack: Path, key_files: KeyFiles, tmp_path: Path, capsys: Capture
) -> None:
    before = pack.read_bytes()
    (tmp_path / "b.ksm").write_bytes(before[:-1])
    assert call("sign", pack, tmp_path / "b.ksm", "--key", key_files.private) == 3
    assert "b.ksm: " in capsys.readouterr().err
    assert pack.read_bytes() == before


def test_a_link_to_a_pack_stays_one(pack: Path, key_files: KeyFiles, tmp_path: Path) -> None:
    (tmp_path / "link.ksm").symlink_to(pack)
    assert call("sign", tmp_path / "link.ksm", "--key", key_files.private) == 0
    assert (tmp_path / "link.ksm").is_symlink()
    assert call("verify", pack, "--public", key_files.public) == 0


def test_a_public_key_cannot_sign(pack: Path, key_files: KeyFiles, capsys: Capture) -> None:
    assert call("sign", pack, "--key", key_files.public) == 2
    assert "holds a PEM block 'PUBLIC KEY'; needed an Ed25519 private key" in capsys.readouterr().err


def test_an_encrypted_key_takes_its_passphrase_from_the_environment(
    pack: Path, key_files: KeyFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KSM_EDGE_KEY_PASSPHRASE", PASSPHRASE.decode())
    assert call("sign", pack, "--key", key_files.encrypted) == 0
    assert call("verify", pack, "--public", key_files.public) == 0


def test_or_asks_for_it_at_a_terminal(pack: Path, key_files: KeyFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.delenv("KSM_EDGE_KEY_PASSPHRASE", raising=False)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("getpass.getpass", lambda prompt: asked.append(prompt) or PASSPHRASE.decode())
    assert call("sign", pack, "--key", key_files.encrypted) == 0
    assert asked == [f"Passphrase of {key_files.encrypted}: "]


def test_and_without_either_says_so(
    pack: Path, key_files: KeyFiles, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.delenv("KSM_EDGE_KEY_PASSPHRASE", raising=False)
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    assert call("sign", pack, "--key", key_files.encrypted) == 2
    assert "set KSM_EDGE_KEY_PASSPHRASE, or call from a terminal" in capsys.readouterr().err


def test_signs_help_shows_how_to_make_a_key(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["sign", "--help"])
    out = capsys.readouterr().out
    for command in (MAKE_PRIVATE, MAKE_PUBLIC):
        assert f"  {command}\n" in out


def test_verify_without_options_says_what_it_left_out(pack: Path, key_files: KeyFiles, capsys: Capture) -> None:
    assert call("verify", pack) == 0
    assert capsys.readouterr().out == (
        f"{pack}: checked format and checksums (only the file itself, without --bundle): ok\n"
    )
    call("sign", pack, "--key", key_files.private)
    capsys.readouterr()
    assert call("verify", pack) == 0
    assert "its signature was not, without --public; only the file itself" in capsys.readouterr().out


def test_verify_with_a_bundle_checks_what_a_pack_computes(pack: Path, bundle: Path, capsys: Capture) -> None:
    assert call("verify", pack, "--bundle", bundle) == 0
    assert capsys.readouterr().out == (
        f"{pack}: checked format and checksums, backbone, fused weights, golden outputs: ok\n"
    )


def test_verify_goes_on_after_a_failure_and_tells_each_packs(
    pack: Path, bundle: Path, tmp_path: Path, capsys: Capture
) -> None:
    good = load_pack(pack)
    save_pack(replace(good, golden_logits=good.golden_logits + 1), tmp_path / "b golden.ksm")
    save_pack(replace(good, fused_digest="0" * 64), tmp_path / "c digest.ksm")
    save_pack(replace(good, backbone="f" * 64), tmp_path / "d other.ksm")
    (tmp_path / "e short.ksm").write_bytes(pack.read_bytes()[:-1])
    (tmp_path / "f whole.ksm").write_bytes(pack.read_bytes())
    assert call("verify", tmp_path, "--bundle", bundle) == 3
    lines = capsys.readouterr().out.splitlines()
    assert [line[len(f"{tmp_path}/")] for line in lines] == list("abcdef")
    expected = (": ok", "golden outputs are off by", f"the pack says {'0' * 64}", "f" * 64, "cut short", ": ok")
    for line, part in zip(lines, expected, strict=True):
        assert part in line
        assert ("OFF" in line) == (part != ": ok")
    assert good.backbone in lines[3]


def test_verify_says_all_of_it_as_one_object(pack: Path, tmp_path: Path, capsys: Capture) -> None:
    save_pack(tiny_pack(), tmp_path / "b.ksm")
    (tmp_path / "c.ksm").write_bytes(b"")
    assert call("verify", tmp_path, "--json") == 3
    report = json.loads(capsys.readouterr().out)
    assert not report["ok"]
    assert [entry["ok"] for entry in report["packs"]] == [True, True, False]
    assert report["packs"][1] == {
        "path": str(tmp_path / "b.ksm"),
        "task": "tiny kernel",
        "signed": False,
        "checked": ["format and checksums"],
        "ok": True,
        "faults": [],
    }
    assert call("verify", pack, "--json") == 0
    assert json.loads(capsys.readouterr().out)["ok"]


def test_verify_of_a_folder_without_packs_is_an_error(tmp_path: Path, capsys: Capture) -> None:
    assert call("verify", tmp_path) == 2
    assert f"{tmp_path}: no task pack (*.ksm) in this folder" in capsys.readouterr().err


def test_verify_of_a_pack_that_is_not_there_fails(tmp_path: Path, capsys: Capture) -> None:
    assert call("verify", tmp_path / "absent.ksm") == 3
    assert "OFF: cannot be read as a pack: No such file" in capsys.readouterr().out


def test_verify_refuses_unsigned_and_wrongly_signed_packs(
    pack: Path, key_files: KeyFiles, tmp_path: Path, capsys: Capture
) -> None:
    shutil.copy(pack, tmp_path / "b.ksm")
    call("sign", pack, "--key", key_files.other)
    capsys.readouterr()
    assert call("verify", tmp_path, "--public", key_files.public) == 3
    wrong, unsigned = capsys.readouterr().out.splitlines()
    assert "OFF: the pack's signature fits none of the 1 public key(s)" in wrong
    assert "OFF: the pack is not signed" in unsigned
    assert call("verify", pack, "--public", key_files.public, "--public", key_files.other_public) == 0


def test_a_private_key_cannot_verify(pack: Path, key_files: KeyFiles, capsys: Capture) -> None:
    assert call("verify", pack, "--public", key_files.private) == 2
    assert "holds a PEM block 'PRIVATE KEY'; needed an Ed25519 public key" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["eval", "predict"])
def test_a_pack_runs_only_with_the_signature_required(
    verb: str, pack: Path, bundle: Path, photo: Path, key_files: KeyFiles, capsys: Capture
) -> None:
    images = photo.parents[1] if verb == "eval" else photo
    arguments = (verb, pack, images, "--bundle", bundle, "--require-signature", key_files.public)
    assert call(*arguments) == 3
    assert f"{pack}: the pack is not signed, and a signature is required" in capsys.readouterr().err
    call("sign", pack, "--key", key_files.other)
    assert call(*arguments) == 3
    assert f"{pack}: the pack's signature fits none" in capsys.readouterr().err
    call("sign", pack, "--key", key_files.private)
    assert call(*arguments) == 0


def test_inspect_says_whether_a_pack_is_signed(pack: Path, key_files: KeyFiles, capsys: Capture) -> None:
    assert call("inspect", pack) == 0
    assert "  signed       no\n" in capsys.readouterr().out
    call("sign", pack, "--key", key_files.private)
    assert call("inspect", pack) == 0
    out = capsys.readouterr().out
    assert "  signed       yes; whose signature it is, tells: ksm-edge verify PACK --public PUBLIC.pem\n" in out
    assert "    signature          64\n" in out
    assert call("inspect", pack, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["signed"] is True
    assert report["part_bytes"]["signature"] == 64
