"""The fuzzer finds what it should, and in two seconds of it nothing is found. Longer: scripts/fuzz --seconds 600."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pack_fuzz
import pytest
from pack_mutations import behind_checksums, mutated

from ksm_edge.errors import DamagedFileError
from ksm_edge.pack.container import read_container
from ksm_edge.pack.reader import decode

SCRIPT = Path(pack_fuzz.__file__)


def test_no_mutated_pack_is_a_finding() -> None:
    tally = pack_fuzz.fuzz(seed=0, seconds=0, mutations=600)
    assert not tally.findings
    assert tally.packs > 50
    assert len(tally.refused) > 100  # so many messages that differ: it gets behind the checksums


def test_a_seed_gives_the_same_packs_again() -> None:
    seeds = pack_fuzz.golden()
    first, second = ([mutated(random, seeds[0], seeds) for _ in range(50)] for random in (Random(7), Random(7)))
    assert first == second
    assert len(set(first)) > 40


@pytest.mark.parametrize("rounds", [1, 30])
def test_what_has_been_mutated_before_can_be_mutated_again(rounds: int) -> None:
    seeds = pack_fuzz.golden()
    for number in range(20):
        random, data = Random(number), seeds[0]
        for _ in range(rounds):
            data = mutated(random, data, seeds)[:5000]


def test_checksums_are_made_right_behind_a_change() -> None:
    data = pack_fuzz.golden()[0]
    text, streams = read_container(data)
    streams["bias"] = streams["bias"] + 1
    np.testing.assert_array_equal(decode(behind_checksums(text, streams)).head_bias, decode(data).head_bias + 1)


def too_much(data: bytes) -> None:
    bytearray(pack_fuzz.BYTES + 5 * len(data))


def too_long(data: bytes) -> None:
    pack_fuzz.time.process_time()  # which tells another second each time, see below


def unnamed(data: bytes) -> None:
    raise DamagedFileError("")


def not_said(data: bytes) -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize(
    ("reader", "found"),
    [
        (too_much, "takes 64 MiB"),
        (too_long, "takes 2.0 s"),
        (unnamed, "an error without a message"),
        (not_said, "ZeroDivisionError in not_said"),
    ],
)
def test_what_is_wrong_is_found(
    monkeypatch: pytest.MonkeyPatch, reader: Callable[[bytes], None], found: str, tmp_path: Path
) -> None:
    clock = iter(range(10**6))
    if reader is too_long:
        monkeypatch.setattr("time.process_time", lambda: next(clock))
    monkeypatch.setattr(pack_fuzz, "decode", reader)
    monkeypatch.setattr(pack_fuzz, "TRACED", 1 if reader is too_much else 10**6)
    tally = pack_fuzz.Tally()
    tally.read(b"neither header nor values")
    assert list(tally.findings) == [found]
    monkeypatch.chdir(tmp_path)
    assert pack_fuzz.report(tally) == 1
    assert len(list((tmp_path / "fuzz-findings").iterdir())) == 1


def test_files_are_read_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "cut.bin").write_bytes(pack_fuzz.golden()[0][:100])
    files = [tmp_path / "cut.bin", *pack_fuzz.GOLDEN.glob("*.ksm")]
    output = subprocess.run([sys.executable, SCRIPT, *files], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert f"{len(files)} inputs: {len(files) - 1} packs, 1 refused" in output.stdout


@pytest.mark.skipif(importlib.util.find_spec("atheris") is not None, reason="atheris is installed")
def test_without_atheris_it_says_what_to_do(tmp_path: Path) -> None:
    output = subprocess.run([sys.executable, SCRIPT, "--atheris"], cwd=tmp_path, capture_output=True, text=True)
    assert output.returncode == 1
    assert "pip install atheris" in output.stderr
