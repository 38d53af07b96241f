"""A task as one plain ONNX file: what an app computes, in a stock onnxruntime."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from tiny import saved_tiny_bundle, tiny_bundle, tiny_pack

from ksm_edge.app.app import App
from ksm_edge.app.standalone import executorch_files, onnx_model
from ksm_edge.cli.main import main
from ksm_edge.errors import UnsupportedError
from ksm_edge.pack.files import save_pack


def images(count: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 3, 16, 16)).astype(np.float32)


@pytest.mark.parametrize("granularity", ["kernel", "element"])
def test_the_file_gives_the_apps_logits(tmp_path: Path, granularity: str) -> None:
    bundle, pack = tiny_bundle(tmp_path), tiny_pack(granularity, cut=0.3)
    session = onnxruntime.InferenceSession(onnx_model(bundle, pack).SerializeToString())
    with App(bundle) as app:
        app.load(pack)
        for count in (1, 3):
            (found,) = session.run(None, {"image": images(count)})
            expected, classes = app.logits(images(count))
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["classes"]) == list(classes)
    assert json.loads(facts["input"])["size"] == bundle.input.size
    assert facts["task"] == pack.task


def test_a_bundle_without_a_program_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"no ExecuTorch program: make the bundle with .*--executorch"):
        executorch_files(tiny_bundle(tmp_path), tiny_pack())


@pytest.fixture
def saved(tmp_path: Path) -> list[str]:
    """A pack and its bundle, as the command line takes them."""
    bundle = saved_tiny_bundle(tmp_path / "bundle")
    save_pack(tiny_pack(changes={"backbone": bundle.digest}), tmp_path / "task.ksm")
    return [str(tmp_path / "task.ksm"), "--bundle", str(bundle.path)]


def test_fuse_writes_a_file_that_onnx_takes(saved: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "task.onnx"
    assert main(["fuse", *saved, "--out", str(out), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["files"] == {str(out): out.stat().st_size}
    assert said["to"] == "onnx"
    onnx.checker.check_model(onnx.load(out))
    assert main(["fuse", *saved, "--to", "onnx", "--out", str(out)]) == 0
    assert "task.onnx" in capsys.readouterr().out


def test_fuse_wants_to_know_what_to_write(saved: list[str], capsys: pytest.CaptureFixture) -> None:
    assert main(["fuse", *saved]) == 2
    assert "--to onnx or --to ptd" in capsys.readouterr().err
    assert main(["fuse", *saved, "--to", "ptd", "--out", "task.json"]) == 2
    assert "--to ptd writes a .ptd file" in capsys.readouterr().err
    assert main(["fuse", *saved, "--out", f"{saved[2]}/backbone.onnx"]) == 2
    assert "the bundle's own folder" in capsys.readouterr().err
    assert main(["fuse", *saved, "--to", "ptd"]) == 4
    assert "no ExecuTorch program" in capsys.readouterr().err
