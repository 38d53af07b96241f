"""Bundles on disk: whole or absent, the same again, and refused when a byte is not what was written."""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from incoming_nets import CLASSIFIER, FLAT, LINEAR, graph, node, weights
from safetensors.numpy import load_file

from ksm_edge.app.app import App
from ksm_edge.atomic import exchange
from ksm_edge.bundle import manifest, write
from ksm_edge.bundle.digest import backbone_digest
from ksm_edge.bundle.freeze import freeze
from ksm_edge.bundle.layers import Bundle, InputContract
from ksm_edge.bundle.load import load_bundle
from ksm_edge.bundle.make import save_bundle
from ksm_edge.bundle.plain import check_golden, plain_weights
from ksm_edge.bundle.tensorfile import let_go, map_tensors, write_tensors
from ksm_edge.errors import DamagedFileError, KsmEdgeError, UnsupportedError, UnsupportedVersionError, UsageError
from ksm_edge.fuse import fuse
from ksm_edge.resident import rss_bytes

CONTRACT = InputContract(16, 18, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


def save(path: Path, *, seed: int = 0, **more: Any) -> Bundle:
    return save_bundle(freeze(graph(tensors=weights(seed)), {}), path, recipe="small", input_contract=CONTRACT, **more)


def test_what_is_loaded_is_what_was_frozen(tmp_path: Path) -> None:
    frozen = freeze(graph(), {})
    bundle = save(tmp_path / "b", licence="MIT")
    assert (bundle.recipe, bundle.licence, bundle.features, bundle.input) == ("small", "MIT", 6, CONTRACT)
    assert bundle.layers == frozen.layers
    for name, held in frozen.weights.items():
        for kind in ("weight", "bias", "gamma", "beta", "mean", "var"):
            assert np.array_equal(getattr(bundle.weights[name], kind), getattr(held, kind)), (name, kind)


def test_weights_that_were_let_go_are_read_again(tmp_path: Path) -> None:
    bundle = save(tmp_path / "b")
    for held in bundle.weights.values():
        for tensor in (held.weight, held.gamma):
            before = tensor.copy()
            let_go(tensor)
            assert np.array_equal(tensor, before)


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="this system has no madvise")
def test_weights_that_were_let_go_leave_memory(tmp_path: Path) -> None:
    large, small = np.ones((1024, 1024), np.float32), np.ones(8, np.float32)
    path = tmp_path / "x.safetensors"
    with open(path, "wb") as file:
        write_tensors(file, {"before": small, "large": large, "behind": small})
    mapped = map_tensors(path)
    for tensor in mapped.values():
        tensor.sum()
    held = rss_bytes()
    let_go(mapped["large"])
    assert held - rss_bytes() >= 0.9 * large.nbytes


def test_what_was_written_is_not_let_go(tmp_path: Path) -> None:
    (tmp_path / "zeros").write_bytes(bytes(1 << 20))
    copied = np.memmap(tmp_path / "zeros", np.float32, "c")
    copied[:] = 7
    for ours in (copied, np.full(1 << 18, 7, np.float32)):
        let_go(ours)
        let_go(ours[3:5])
        assert (ours == 7).all()


def test_vectors_are_read_and_do_not_hold_pages_of_the_file(tmp_path: Path) -> None:
    held = save(tmp_path / "b").weights["conv1"]
    for vector in (held.gamma, held.beta, held.mean, held.var):
        assert vector.base is None
        assert not vector.flags.writeable
    assert held.weight.base is not None


def test_loaded_weights_are_aligned_and_cannot_be_written(tmp_path: Path) -> None:
    held = save(tmp_path / "b").weights["conv1"]
    assert held.weight.ctypes.data % 64 == 0
    for tensor in (held.weight, held.bias, held.gamma):
        with pytest.raises(ValueError, match="read-only"):
            tensor[0] = 1


def test_the_weights_are_a_plain_safetensors_file_without_what_does_nothing(tmp_path: Path) -> None:
    save(tmp_path / "b")
    names = set(load_file(tmp_path / "b" / "weights.safetensors"))
    norm = {f"conv1.{kind}" for kind in ("weight", "gamma", "beta", "mean", "var")}
    assert names == norm | {"conv2.weight", "conv2.beta"}


def test_exporting_again_gives_the_same_bytes_and_digest(tmp_path: Path) -> None:
    a, b = save(tmp_path / "a"), save(tmp_path / "b")
    assert a.digest == b.digest
    for name in ("backbone.onnx", "weights.safetensors", "manifest.json"):
        assert (a.path / name).read_bytes() == (b.path / name).read_bytes()


def test_other_weights_have_another_digest(tmp_path: Path) -> None:
    assert save(tmp_path / "a").digest != save(tmp_path / "b", seed=1).digest


def test_the_digest_sees_names_shapes_and_values_and_no_order() -> None:
    a, b = np.arange(6, dtype=np.float32), np.ones(2, np.float32)
    digests = [
        backbone_digest(tensors)
        for tensors in ({"a": a, "b": b}, {"a": a.reshape(2, 3), "b": b}, {"a": a, "c": b}, {"a": a + 1, "b": b})
    ]
    assert len(set(digests)) == 4
    assert backbone_digest({"b": b, "a": a}) == digests[0]


def test_the_plain_weights_are_those_fused_from_no_pack_bit_for_bit(tmp_path: Path) -> None:
    bundle = save(tmp_path / "b")
    plain, fused = plain_weights(bundle.layers, bundle.weights), fuse(bundle, None)
    assert plain.keys() == fused.keys()
    assert all(plain[name].tobytes() == fused[name].tobytes() for name in fused)


@pytest.mark.parametrize("step", ["write_tensors", "golden_features", "_sync", "_replace"])
def test_a_failure_at_any_step_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"ksm_edge.bundle.write.{step}", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_replacement_leaves_the_old_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "exchange", lambda *_: False)  # vfat, say
    old = save(tmp_path / "b").digest
    rename = os.rename

    def fail(source: Path, target: Path) -> None:
        if Path(target) == tmp_path / "b" and Path(source).name != "old":
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="Input/output"):
        save(tmp_path / "b", seed=1, overwrite=True)
    assert load_bundle(tmp_path / "b").digest == old
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_bundle_that_is_replaced_is_never_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "b")
    (tmp_path / "c").mkdir()
    if not exchange(tmp_path / "b", tmp_path / "c"):
        pytest.skip("this file system has no folders change places")
    (tmp_path / "b").rmdir()
    (tmp_path / "c").rename(tmp_path / "b")
    monkeypatch.setattr(os, "rename", None)  # of one folder at a time
    new = save(tmp_path / "b", seed=1, overwrite=True).digest
    assert load_bundle(tmp_path / "b").digest == new
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


# As an export that is killed, or whose power is cut, while its folder is not yet in its place.
KILLED = """
import os, signal, sys
from pathlib import Path
from ksm_edge.bundle import write
write._write_files = lambda frozen, folder, *_: ((folder / "weights").write_bytes(bytes(1000)), end())
def end(): {end}
write.write_bundle(None, Path(sys.argv[1]), recipe="", licence="", input_contract=None)
"""


def test_what_a_kill_left_goes_with_the_next_export(tmp_path: Path) -> None:
    killed = KILLED.format(end="os.kill(os.getpid(), signal.SIGKILL)")
    assert subprocess.run([sys.executable, "-c", killed, tmp_path / "b"], check=False).returncode == -signal.SIGKILL
    others = [tmp_path / name for name in (".b.backup", ".b.unfinished", ".bb.unfinished-1", ".c.unfinished-1")]
    for other in others:
        other.mkdir()
    assert len(list(tmp_path.iterdir())) == len(others) + 1
    save(tmp_path / "b")
    assert sorted(tmp_path.iterdir()) == sorted([*others, tmp_path / "b"])


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_has_come_there_meanwhile_is_not_lost(
    overwrite: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = tmp_path / "b" / "holiday.jpg"

    def meanwhile(*_: object) -> None:
        theirs.parent.mkdir()
        theirs.write_text("precious")

    monkeypatch.setattr("ksm_edge.bundle.write._sync", meanwhile)
    with pytest.raises(UsageError, match=r"b exists and is not a bundle"):
        save(tmp_path / "b", overwrite=overwrite)
    assert theirs.read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_folder_that_another_export_removed_too_early_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which takes it for one that was left, while nothing says yet that it is in use."""
    lock, taken = fcntl.flock, []

    def too_late(descriptor: int, how: int) -> None:
        if not taken:
            taken.extend(tmp_path.iterdir())
            taken[0].rmdir()
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", too_late)
    digest = save(tmp_path / "b").digest
    assert taken
    assert load_bundle(tmp_path / "b").digest == digest
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_an_export_leaves_another_of_the_same_name_alone(tmp_path: Path) -> None:
    waiting = KILLED.format(end="print(flush=True), sys.stdin.read(), sys.exit()")
    command = [sys.executable, "-c", waiting, str(tmp_path / "b")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        (unfinished,) = tmp_path.iterdir()
        save(tmp_path / "b")
        assert (unfinished / "weights").exists()
        other.communicate(b"")
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_bundle_is_replaced_only_when_asked(tmp_path: Path) -> None:
    save(tmp_path / "b")
    with pytest.raises(UsageError, match=r"b exists; choose another --out, or give --overwrite"):
        save(tmp_path / "b", seed=1)
    new = save(tmp_path / "b", seed=1, overwrite=True).digest
    assert load_bundle(tmp_path / "b").digest == new
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_link_to_a_bundle_stays_one(tmp_path: Path) -> None:
    save(tmp_path / "b")
    (tmp_path / "link").symlink_to(tmp_path / "b")
    other = save(tmp_path / "link", seed=1, overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert load_bundle(tmp_path / "b").digest == other.digest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "link"]


def test_a_folder_named_as_the_built_in_bundle_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = save(Path("embedded"))
    for given in (Path("embedded"), "./embedded"):
        assert load_bundle(given).digest == made.digest
    assert load_bundle("embedded").digest != made.digest
    with App(Path("embedded"), threads=1) as app:
        assert app.bundle.digest == made.digest


def test_a_bundle_is_found_again_when_the_program_has_gone_to_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    bundle = load_bundle("b")
    monkeypatch.chdir("/")
    assert check_golden(bundle) < 1e-4


def test_a_network_that_does_not_run_in_so_few_pixels_is_said(tmp_path: Path) -> None:
    tiny = replace(CONTRACT, size=1, resize=1)
    window = node("MaxPool", "c2", "q", kernel_shape=[9, 9]), node("GlobalAveragePool", "q", "p")
    frozen = freeze(graph([*CLASSIFIER[:4], *window, FLAT, LINEAR]), {})
    with pytest.raises(UnsupportedError, match="does not run this network in images of 1 pixels"):
        save_bundle(frozen, tmp_path / "b", recipe="small", input_contract=tiny)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_bundle_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(UsageError, match="is not a bundle"):
        save(tmp_path / "photos", overwrite=True)
    assert (tmp_path / "photos" / "cat.jpg").exists()


def test_a_backbone_whose_features_are_not_finite_is_not_written(tmp_path: Path) -> None:
    tensors = weights() | {"bn1.running_var": np.full(4, -1, np.float32)}
    with (
        pytest.raises(KsmEdgeError, match="features are not finite"),
        np.errstate(invalid="ignore"),
    ):
        save_bundle(freeze(graph(tensors=tensors), {}), tmp_path / "b", recipe="", input_contract=CONTRACT)
    assert list(tmp_path.iterdir()) == []


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Edit a manifest and put its checksum right again, so that the check behind it is met."""
    content = json.loads((folder / manifest.NAME).read_text())
    del content["manifest_sha256"]
    change(content)
    (folder / manifest.NAME).write_text(manifest.manifest_text(content))


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], type[KsmEdgeError], str]] = {
    "a bit of the weights": (lambda b: flip(b / "weights.safetensors", -5), DamagedFileError, "sha256.* manifest says"),
    "a bit of the graph": (lambda b: flip(b / "backbone.onnx", 100), DamagedFileError, r"backbone\.onnx: sha256"),
    "weights cut off": (lambda b: os.truncate(b / "weights.safetensors", 300), DamagedFileError, "sha256"),
    "no weights": (lambda b: (b / "weights.safetensors").unlink(), DamagedFileError, "is missing; copy"),
    "no manifest": (lambda b: (b / "manifest.json").unlink(), UsageError, "no bundle there .* ksm-edge export"),
    "no folder": (shutil.rmtree, UsageError, "no bundle there"),
    "half a manifest": (lambda b: os.truncate(b / "manifest.json", 400), DamagedFileError, "not a bundle's manifest"),
    "another eps": (
        lambda b: (b / "manifest.json").write_text((b / "manifest.json").read_text().replace("0.001", "0.002")),
        DamagedFileError, "does not match its own checksum",
    ),
    "a newer format": (
        lambda b: rewrite(b, lambda c: c.update(format_version=2)), UnsupportedVersionError,
        r"format version 2, this release reads 1; install a newer",
    ),
    "golden features of another shape": (
        lambda b: rewrite(b, lambda c: c["golden"].update(shape=[2, 7])), DamagedFileError, "missing or malformed"
    ),
    "no layers": (lambda b: rewrite(b, lambda c: c.pop("layers")), DamagedFileError, "missing or malformed"),
    "a layer the weights lack": (
        lambda b: rewrite(b, lambda c: c["layers"][0].update(name="x")), DamagedFileError, r"x\.weight is missing",
    ),
    "a layer of another shape": (
        lambda b: rewrite(b, lambda c: c["layers"][0].update(weight_shape=[4, 3, 1, 1])), DamagedFileError,
        r"conv1\.weight has the shape \(4, 3, 3, 3\), it should be \(4, 3, 1, 1\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_bundle_is_refused_and_says_what_is_wrong(tmp_path: Path, damage: str) -> None:
    save(tmp_path / "b")
    inflict, error, match = DAMAGES[damage]
    inflict(tmp_path / "b")
    with pytest.raises(error, match=match):
        load_bundle(tmp_path / "b")


@pytest.mark.parametrize(
    ("header", "match"),
    [
        (b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,12]}}', "'a' is said to be F32"),
        (b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[8,24]}}', "'a' is said to be F32"),
        (b'{"a":{"dtype":"I64","shape":[2],"data_offsets":[0,16]}}', "'a' is said to be I64"),
        (b'{"a":{"dtype":"F32","shape":[4]}}', "entry for 'a' is malformed"),
        (b'{"a":{"dtype":"F32","shape":[-4],"data_offsets":[0,16]}}', "'a' is said to be"),
        (b"[]", "not the JSON object"),
        (b"{", "not the JSON object"),
    ],
)
def test_a_header_that_cannot_be_is_refused(tmp_path: Path, header: bytes, match: str) -> None:
    from ksm_edge.bundle.tensorfile import map_tensors

    (tmp_path / "t").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(DamagedFileError, match=match):
        map_tensors(tmp_path / "t")


@pytest.mark.parametrize("content", [b"", b"abc", (1 << 60).to_bytes(8, "little") + b"{}"])
def test_a_header_longer_than_the_file_is_refused(tmp_path: Path, content: bytes) -> None:
    from ksm_edge.bundle.tensorfile import map_tensors

    (tmp_path / "t").write_bytes(content)
    with pytest.raises(DamagedFileError, match="its header should take"):
        map_tensors(tmp_path / "t")


@pytest.mark.parametrize("shape", ["[-2, -3]", "[1.5]", '["a"]', "[true]", "[" * 100_000])
def test_a_header_with_impossible_shapes_is_damaged(tmp_path: Path, shape: str) -> None:
    header = f'{{"a": {{"dtype": "F32", "shape": {shape}, "data_offsets": [0, 24]}}}}'.encode()
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(24))
    with pytest.raises(DamagedFileError):
        map_tensors(tmp_path / "w.safetensors")
