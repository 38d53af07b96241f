"""Any module becomes a bundle that gives its features, or an error that says why not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from torch import nn  # noqa: E402 - torch first, or skip

from ksm_edge.bundle.golden import golden_images, relative_error  # noqa: E402
from ksm_edge.bundle.layers import Bundle, InputContract  # noqa: E402
from ksm_edge.bundle.plain import golden_features  # noqa: E402
from ksm_edge.errors import KsmEdgeError, UnsupportedError, UsageError  # noqa: E402
from ksm_edge.exporter.module import export_module, torch_features  # noqa: E402

CONTRACT = InputContract(16, 18, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def classifier(*behind: nn.Module, width: int = 6) -> nn.Sequential:
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.SiLU())
    body = nn.Sequential(nn.Conv2d(4, width, 3, padding=1), nn.BatchNorm2d(width), nn.Hardswish())
    end = behind or (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(width, 3))
    return nn.Sequential(stem, body, *end)


def error(bundle: Bundle, net: nn.Module, features: str | None = None) -> float:
    found = golden_features(bundle.graph_path, bundle.layers, bundle.weights, bundle.input)
    return relative_error(found, torch_features(net, golden_images(bundle.input), features))


def test_a_module_becomes_a_bundle_with_its_features(tmp_path: Path) -> None:
    net = classifier()
    bundle = export_module(net, tmp_path / "b", CONTRACT, licence="MIT")
    assert (bundle.recipe, bundle.licence, bundle.features) == ("module:Sequential", "MIT", 6)
    assert [layer.name for layer in bundle.layers] == ["0.0", "1.0"]
    assert error(bundle, net) <= 1e-6


def test_a_new_network_keeps_apart_what_starts_equal(tmp_path: Path) -> None:
    held = export_module(classifier(), tmp_path / "b", CONTRACT).weights["0.0"]
    assert held.beta.tolist() == held.mean.tolist() == [0] * 4
    assert held.gamma.tolist() == held.var.tolist() == [1] * 4


def test_the_module_is_left_as_it_was(tmp_path: Path) -> None:
    net = classifier().train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    random = torch.random.get_rng_state()
    export_module(net, tmp_path / "b", CONTRACT, features="1")
    assert net.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), random)
    assert not any(part._forward_hooks for part in net.modules())


def test_a_submodule_may_be_named_as_the_end(tmp_path: Path) -> None:
    net = classifier()
    bundle = export_module(net, tmp_path / "b", CONTRACT, features="0")
    assert (bundle.features, [layer.name for layer in bundle.layers]) == (4, ["0.0"])
    assert error(bundle, net, "0") <= 1e-6


def test_an_extractor_without_a_linear_layer_names_its_end(tmp_path: Path) -> None:
    net = classifier(nn.AdaptiveAvgPool2d(1))
    with pytest.raises(UnsupportedError, match="no Linear layer"):
        export_module(net, tmp_path / "b", CONTRACT)
    assert export_module(net, tmp_path / "b", CONTRACT, features="2").features == 6


def test_half_precision_weights_are_read(tmp_path: Path) -> None:
    net = classifier().to(torch.bfloat16)
    bundle = export_module(net, tmp_path / "b", CONTRACT)
    assert error(bundle, net) <= 1e-6
    assert next(net.parameters()).dtype == torch.bfloat16


def test_an_unknown_submodule_is_answered_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'body': Sequential has no such submodule; its children are 0, 1, 2, 3, 4, 5"):
        export_module(classifier(), tmp_path / "b", CONTRACT, features="body")


def test_an_unsupported_module_is_named_as_the_module_names_it(tmp_path: Path) -> None:
    net = classifier()
    net[1][2] = nn.ELU()
    with pytest.raises(UnsupportedError, match=r"node '/1/1.2/Elu' \(Elu\)"):
        export_module(net, tmp_path / "b", CONTRACT)
    assert list(tmp_path.iterdir()) == []


def test_a_module_that_computes_something_else_than_its_trace_is_caught(tmp_path: Path) -> None:
    class Fickle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = classifier()

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.net(image.relu() if torch.jit.is_tracing() else image)

    with pytest.raises(KsmEdgeError, match=r"differ from torch's by .* does the module compute something else"):
        export_module(Fickle(), tmp_path / "b", CONTRACT)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dynamo", [False, True])
def test_an_onnx_file_torch_exports_by_itself_gives_the_same_features(tmp_path: Path, dynamo: bool) -> None:
    if dynamo:
        pytest.importorskip("onnxscript")
    import warnings

    from ksm_edge.bundle.make import freeze_onnx, save_bundle

    net = classifier().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about its own exporters
        torch.onnx.export(net, (torch.zeros(1, 3, 16, 16),), tmp_path / "n.onnx", dynamo=dynamo, verbose=False)
    bundle = save_bundle(freeze_onnx(tmp_path / "n.onnx"), tmp_path / "b", recipe="onnx:n", input_contract=CONTRACT)
    assert not any(layer.has_norm for layer in bundle.layers)
    assert np.isfinite(bundle.weights[bundle.layers[0].name].beta).all()
    assert error(bundle, net) <= 1e-5
