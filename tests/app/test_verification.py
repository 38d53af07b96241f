"""What verification finds in packs that are whole and yet not what they say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from signing import KeyFiles, finished_pack
from tiny import saved_tiny_bundle, tiny_pack

from ksm_edge.app.verification import Verdict, verify_pack
from ksm_edge.bundle.golden import TOLERANCE
from ksm_edge.bundle.layers import Bundle
from ksm_edge.pack.files import save_pack
from ksm_edge.pack.keys import load_private_key, load_public_key
from ksm_edge.pack.record import Pack
from ksm_edge.pack.signature import signed

FILE = ("format and checksums",)
WHOLE = (*FILE, "backbone", "fused weights", "golden outputs")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return saved_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture(scope="module")
def good(bundle: Bundle) -> Pack:
    return finished_pack(bundle)


@pytest.fixture
def verify(bundle: Bundle, tmp_path: Path) -> Callable[[Pack], Verdict]:
    """Save a pack and verify it against the bundle."""

    def verified(pack: Pack) -> Verdict:
        save_pack(pack, tmp_path / "a.ksm")
        return verify_pack(tmp_path / "a.ksm", bundle=bundle)

    return verified


def test_a_pack_that_computes_what_it_did_is_ok(good: Pack, verify: Callable[[Pack], Verdict]) -> None:
    verdict = verify(good)
    assert verdict.ok
    assert verdict.checked == WHOLE
    assert (verdict.task, verdict.signed) == ("tiny", False)


@pytest.mark.parametrize(("factor", "ok"), [(0.5, True), (-0.5, True), (2, False), (-2, False), (1e6, False)])
def test_golden_outputs_may_be_off_by_the_tolerance(
    good: Pack, verify: Callable[[Pack], Verdict], factor: float, ok: bool
) -> None:
    golden = good.golden_logits.copy()
    golden[-1, 0] += np.float32(factor * TOLERANCE * np.abs(golden).max())
    verdict = verify(replace(good, golden_logits=golden))
    assert verdict.ok == ok
    assert all("its golden outputs are off by " in fault for fault in verdict.faults)


def test_a_head_that_was_changed_is_found_by_the_golden_outputs(good: Pack, verify: Callable[[Pack], Verdict]) -> None:
    verdict = verify(replace(good, head_bias=good.head_bias + np.float32([0, 0, 1])))
    (fault,) = verdict.faults
    assert "golden outputs are off" in fault


@pytest.mark.parametrize("digest", ["f" * 64, ""])
def test_another_fused_digest_is_found_and_both_are_named(
    good: Pack, verify: Callable[[Pack], Verdict], digest: str
) -> None:
    (fault,) = verify(replace(good, fused_digest=digest)).faults
    assert f"its fused weights have the digest {good.fused_digest}, the pack says {digest or 'nothing'}" in fault


def test_masks_of_another_task_are_found_by_digest_and_outputs(good: Pack, verify: Callable[[Pack], Verdict]) -> None:
    faults = verify(replace(good, layers=tiny_pack(cut=0.3, seed=9).layers)).faults
    assert [fault.split(" ")[1] for fault in faults] == ["fused", "golden"]


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_golden_outputs_for_other_inputs_are_off(good: Pack, verify: Callable[[Pack], Verdict], rows: int) -> None:
    (fault,) = verify(replace(good, golden_logits=np.zeros((rows, 3), np.float32))).faults
    assert fault == f"it has golden outputs for {rows} inputs, a bundle has 2"


def test_a_pack_of_another_backbone_is_looked_into_no_further(good: Pack, verify: Callable[[Pack], Verdict]) -> None:
    verdict = verify(replace(good, backbone="f" * 64))
    (fault,) = verdict.faults
    assert "f" * 64 in fault
    assert good.backbone in fault
    assert verdict.checked == (*FILE, "backbone")


def test_a_file_that_cannot_be_read_has_no_task(tmp_path: Path, bundle: Bundle, good: Pack) -> None:
    absent = verify_pack(tmp_path / "absent.ksm", bundle=bundle)
    save_pack(good, tmp_path / "a.ksm")
    (tmp_path / "a.ksm").write_bytes((tmp_path / "a.ksm").read_bytes()[:-1])
    short = verify_pack(tmp_path / "a.ksm", bundle=bundle)
    for verdict in (absent, short):
        assert verdict.checked == FILE
        assert verdict.task is None
        assert not verdict.faults[0].startswith(str(tmp_path))


def test_a_signature_that_does_not_fit_is_looked_into_no_further(
    good: Pack, bundle: Bundle, key_files: KeyFiles, tmp_path: Path
) -> None:
    path = tmp_path / "a.ksm"
    save_pack(good, path)
    path.write_bytes(signed(path.read_bytes(), load_private_key(key_files.private, bytes)))
    fits = verify_pack(path, [load_public_key(key_files.public)], bundle)
    assert fits.ok
    assert fits.signed
    assert fits.checked == (*FILE, "signature", *WHOLE[1:])
    wrong = verify_pack(path, [load_public_key(key_files.other_public)], bundle)
    assert "fits none of the 1 public key(s)" in wrong.faults[0]
    assert wrong.checked == (*FILE, "signature")
