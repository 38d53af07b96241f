"""No task is forgotten: what a pack computes is proved before and after another task is learned on its backbone."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import saved_tiny_bundle

from ksm_edge.app.app import App
from ksm_edge.cli.main import main


def photos(folder: Path, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for index in range(6):
            Image.fromarray(rng.integers(0, 255, (20, 20, 3), np.uint8)).save(folder / name / f"{index}.png")
    return folder


def test_learning_a_task_leaves_every_earlier_one_as_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle, packs = saved_tiny_bundle(tmp_path / "bundle"), tmp_path / "packs"
    packs.mkdir()

    def learn(name: str, seed: int) -> None:
        words = ["adapt", photos(tmp_path / name, seed), "--bundle", bundle.path, "--out", packs / f"{name}.ksm"]
        assert main([*map(str, words), "--epochs", "2", "--batch", "4", "--score-rate", "0.01"]) == 0

    def state() -> dict[str, str]:
        files = sorted([*bundle.path.iterdir(), *packs.iterdir()])
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    def answers() -> list[np.ndarray]:
        images = np.random.default_rng(9).standard_normal((4, 3, 16, 16)).astype(np.float32)
        with App(bundle.path, threads=1) as app:
            return [app.logits(images, app.load(path))[0] for path in sorted(packs.glob("first*.ksm"))]

    def verified() -> list[dict]:
        capsys.readouterr()
        assert main(["verify", str(packs), "--bundle", str(bundle.path), "--json"]) == 0
        return json.loads(capsys.readouterr().out)["packs"]

    learn("first", 1)
    before, logits = state(), answers()
    assert [row["ok"] for row in verified()] == [True]
    learn("second", 2)
    after = state()
    assert {name: after[name] for name in before} == before
    assert [row["ok"] for row in verified()] == [True, True]
    np.testing.assert_array_equal(answers()[0], logits[0])

    damaged = bytearray((packs / "first.ksm").read_bytes())
    damaged[-1] ^= 1
    (packs / "first.ksm").write_bytes(damaged)
    assert main(["verify", str(packs), "--bundle", str(bundle.path)]) == 3
