"""Which PEM files are taken as keys, and what is said of the others."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from signing import PASSPHRASE, KeyFiles, private_pem, public_pem

from ksm_edge.errors import KeyFileError, UnsupportedError
from ksm_edge.pack.keys import MAKE_PRIVATE, MAKE_PUBLIC, fits, load_private_key, load_public_key


def no_passphrase() -> bytes:
    raise AssertionError("no passphrase is needed")


def test_a_pair_belongs_together_and_the_other_does_not(key_files: KeyFiles) -> None:
    signature = load_private_key(key_files.private, no_passphrase).sign(b"message")
    public, other = load_public_key(key_files.public), load_public_key(key_files.other_public)
    assert fits(public, signature, b"message")
    assert not fits(public, signature, b"massage")
    assert not fits(other, signature, b"message")


def test_an_encrypted_key_is_the_same_key(key_files: KeyFiles) -> None:
    plain = load_private_key(key_files.private, no_passphrase)
    opened = load_private_key(key_files.encrypted, lambda: PASSPHRASE)
    assert opened.sign(b"message") == plain.sign(b"message")


@pytest.mark.parametrize("passphrase", [b"wrong", b""])
def test_a_wrong_passphrase_is_told(key_files: KeyFiles, passphrase: bytes) -> None:
    with pytest.raises(KeyFileError, match=r"encrypted\.pem: .*the passphrase is wrong or the file is damaged"):
        load_private_key(key_files.encrypted, lambda: passphrase)


def test_a_private_key_given_as_public_is_told_with_what_to_do(key_files: KeyFiles) -> None:
    with pytest.raises(KeyFileError) as caught:
        load_public_key(key_files.private)
    message = str(caught.value)
    assert f"{key_files.private}: holds a PEM block 'PRIVATE KEY'; needed an Ed25519 public key" in message
    assert MAKE_PUBLIC in message
    assert caught.value.exit_code == 2


def test_a_public_key_given_as_private_is_told_with_what_to_do(key_files: KeyFiles) -> None:
    with pytest.raises(KeyFileError, match=f"holds a PEM block 'PUBLIC KEY'; needed .*{MAKE_PRIVATE}"):
        load_private_key(key_files.public, no_passphrase)


@pytest.mark.parametrize("kind", ["Ed448", "E"])  # the class is EllipticCurve... or EC..., by release
def test_a_key_of_another_kind_is_named(key_files: KeyFiles, kind: str, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric import ec, ed448
    from cryptography.hazmat.primitives.serialization import NoEncryption

    key = ed448.Ed448PrivateKey.generate() if kind == "Ed448" else ec.generate_private_key(ec.SECP256R1())
    (tmp_path / "private.pem").write_bytes(private_pem(key, NoEncryption()))
    (tmp_path / "public.pem").write_bytes(public_pem(key))
    with pytest.raises(KeyFileError, match=rf"a key of another kind, _?{kind}\w*PrivateKey; needed an Ed25519 private"):
        load_private_key(tmp_path / "private.pem", no_passphrase)
    with pytest.raises(KeyFileError, match=rf"a key of another kind, _?{kind}\w*PublicKey; needed an Ed25519 public"):
        load_public_key(tmp_path / "public.pem")


def test_what_is_no_key_at_all_is_told(key_files: KeyFiles, tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    for content, found in (
        (b"", "no PEM block"),
        (b"ssh-ed25519 AAAAC3Nz someone", "no PEM block"),
        (b"-----BEGIN CERTIFICATE-----\n", "a PEM block 'CERTIFICATE'"),
    ):
        path.write_bytes(content)
        with pytest.raises(KeyFileError, match=f"holds {found}; needed an Ed25519 public key"):
            load_public_key(path)
        with pytest.raises(KeyFileError, match=f"holds {found}; needed an Ed25519 private key"):
            load_private_key(path, no_passphrase)


def test_a_damaged_key_file_is_told(key_files: KeyFiles, tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    path.write_bytes(key_files.public.read_bytes()[:60])
    with pytest.raises(KeyFileError, match="'PUBLIC KEY' is there but cannot be read: the file is damaged"):
        load_public_key(path)
    path.write_bytes(key_files.private.read_bytes()[:60])
    with pytest.raises(KeyFileError, match="'PRIVATE KEY' is there but cannot be read: the file is damaged"):
        load_private_key(path, no_passphrase)


def test_a_key_file_that_is_not_there_is_named(key_files: KeyFiles, tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match=r"absent\.pem: cannot be read as a key: No such file"):
        load_public_key(tmp_path / "absent.pem")
    with pytest.raises(KeyFileError, match="cannot be read as a key: Is a directory"):
        load_private_key(tmp_path, no_passphrase)


def test_the_commands_that_errors_name_make_such_keys(key_files: KeyFiles, tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("needs the command openssl")
    for command in (MAKE_PRIVATE, MAKE_PUBLIC):
        subprocess.run(command.split(), cwd=tmp_path, check=True)
    signature = load_private_key(tmp_path / "key.pem", no_passphrase).sign(b"message")
    assert fits(load_public_key(tmp_path / "public.pem"), signature, b"message")


def test_without_cryptography_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in sys.modules if name.startswith("cryptography")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    for load in (load_public_key, lambda path: load_private_key(path, no_passphrase)):
        with pytest.raises(UnsupportedError, match=r"not installed: pip install 'ksm_edge\[sign\]'"):
            load(tmp_path / "key.pem")
