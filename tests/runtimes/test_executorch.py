"""ExecuTorch beside the other runtimes: one program, each task a data file, and the oracle's numbers."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny import saved_tiny_bundle, tiny_pack

from ksm_edge.app.app import App
from ksm_edge.app.standalone import executorch_files
from ksm_edge.bundle.layers import Bundle
from ksm_edge.bundle.load import load_bundle
from ksm_edge.bundle.mobile import UNUSED, mobile_program
from ksm_edge.errors import DamagedFileError, UnsupportedError, UsageError
from ksm_edge.fuse import fuse
from ksm_edge.pack.record import Pack
from ksm_edge.runtimes import executorch
from ksm_edge.runtimes.reference import Session as Reference

pytestmark = pytest.mark.torch
ROWS = 5


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    if (reason := executorch.available()) is not None:
        pytest.skip(reason)
    from ksm_edge.exporter.executorch import write_program

    made = saved_tiny_bundle(tmp_path_factory.mktemp("executorch") / "bundle")
    write_program(made, ROWS)
    return made


def task(bundle: Bundle, seed: int = 1) -> Pack:
    return tiny_pack(seed=seed, cut=0.3, changes={"backbone": bundle.digest, "task": f"task {seed}"})


def images(count: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 3, 16, 16)).astype(np.float32)


def test_features_are_the_float64_oracles(bundle: Bundle) -> None:
    for pack in (None, task(bundle)):
        weights = fuse(bundle, pack)
        oracle = Reference(bundle.graph_path, {name: array.astype(np.float64) for name, array in weights.items()})
        session = executorch.Session(bundle.graph_path, weights)
        for batch in (images(1), images(3)):
            features = session.run(batch)
            assert (features.shape, features.dtype) == ((len(batch), bundle.features), np.float32)
            np.testing.assert_allclose(features, oracle.run(batch.astype(np.float64)), rtol=1e-4, atol=1e-5)


def test_tasks_alive_at_once_do_not_disturb_each_other(bundle: Bundle) -> None:
    packs = [None, task(bundle, 1), task(bundle, 2)]
    sessions = [executorch.Session(bundle.graph_path, fuse(bundle, pack)) for pack in packs]
    first = [session.run(images(2)) for session in sessions]
    for session, before in zip(reversed(sessions), reversed(first), strict=True):
        np.testing.assert_array_equal(session.run(images(2)), before)
    assert not np.allclose(first[0], first[1])
    assert not np.allclose(first[1], first[2])


def test_a_session_has_its_own_copy_of_the_weights(bundle: Bundle) -> None:
    weights = fuse(bundle, None)
    session = executorch.Session(bundle.graph_path, weights)
    expected = session.run(images(1))
    for array in weights.values():
        array.fill(np.nan)
    np.testing.assert_array_equal(session.run(images(1)), expected)


def test_an_app_answers_as_with_onnx_runtime(bundle: Bundle) -> None:
    found = {}
    for runtime in ("executorch", "onnxruntime"):
        with App(bundle, runtime=runtime) as app:
            app.load(task(bundle, 1))
            app.load(task(bundle, 2))
            found[runtime] = [app.logits(images(2), name)[0] for name in app.tasks]
    np.testing.assert_allclose(found["executorch"], found["onnxruntime"], rtol=1e-4, atol=1e-4)


def test_a_stock_app_has_the_logits_of_a_task_from_its_data_file_alone(bundle: Bundle) -> None:
    """As an app in another language does it: the program, a data file, and nothing of this project."""
    torch = pytest.importorskip("torch")
    portable = pytest.importorskip("executorch.extension.pybindings.portable_lib")
    pack = task(bundle)
    data, _ = executorch_files(bundle, pack)
    program = (bundle.path / "backbone.pte").read_bytes()
    _, logits = portable._load_for_executorch_from_buffer(program, data).forward([torch.tensor(images(1))])
    with App(bundle) as app:
        app.load(pack)
        expected, classes = app.logits(images(1))
    assert logits.shape == (1, ROWS)
    np.testing.assert_allclose(logits[:, : len(classes)], expected, rtol=1e-4, atol=1e-4)
    assert (logits[:, len(classes) :] == UNUSED).all()


def test_more_classes_than_rows_are_refused_with_what_to_do(bundle: Bundle) -> None:
    program = mobile_program(bundle.path)
    head = np.zeros((ROWS + 1, bundle.features), np.float32), np.zeros(ROWS + 1, np.float32)
    with pytest.raises(UsageError, match="6 classes, the program 5 rows: export the bundle again with --executorch 6"):
        program.data_with(fuse(bundle, None), *head)


def test_a_graph_in_memory_and_weights_of_another_network_are_refused(bundle: Bundle) -> None:
    weights = fuse(bundle, None)
    with pytest.raises(UnsupportedError, match="not a graph in memory"):
        executorch.Session(bundle.graph_path.read_bytes(), weights)
    del weights["dw.bias"]
    with pytest.raises(UnsupportedError, match=r"not those of .*backbone\.pte: dw\.bias"):
        executorch.Session(bundle.graph_path, weights)


@pytest.mark.parametrize("name", ["backbone.pte", "backbone.ptd", "executorch.json"])
def test_a_damaged_program_never_reaches_executorch(bundle: Bundle, tmp_path: Path, name: str) -> None:
    shutil.copytree(bundle.path, tmp_path / "copy")
    damaged = load_bundle(tmp_path / "copy")
    path = tmp_path / "copy" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x80
    path.write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"backbone\.pt|executorch\.json|ExecuTorch program"):
        executorch.Session(damaged.graph_path, fuse(damaged, None))


def test_the_real_backbone_in_executorch_gives_its_features(shared_data: Path, tmp_path: Path, bundle: Bundle) -> None:
    from ksm_edge.bundle.golden import golden_images, relative_error
    from ksm_edge.cli.main import main
    from ksm_edge.runtimes.onnxruntime import Session

    weights = shared_data / "mobilenet_v2_imagenet.safetensors"
    out = tmp_path / "bundle"
    assert main(["export", "mobilenet_v2", "--weights", str(weights), "--size", "96", "--out", str(out),
                 "--executorch", "10"]) == 0  # fmt: skip
    made = load_bundle(out)
    found = executorch.Session(made.graph_path, fuse(made, None)).run(golden_images(made.input))
    expected = Session(made.graph_path, fuse(made, None)).run(golden_images(made.input))
    assert relative_error(found, expected) < 1e-4
    assert (out / "backbone.pte").stat().st_size < 100_000
