"""Every recipe's weightless graph computes what its network does in torch, and is what the script would write."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from ksm_edge.bundle.make import freeze_recipe  # noqa: E402 - torch first, or skip
from ksm_edge.bundle.recipe import at_size, load_recipe, recipe_names  # noqa: E402
from ksm_edge.exporter.module import compare_with_torch  # noqa: E402
from ksm_edge.exporter.pth import to_numpy  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "write_recipe_graphs.py"
SUBMODULE = {"squeezenet1_1": "features"}  # where a net without a Linear layer ends


def build(name: str) -> torch.nn.Module:
    """The network, with batch-norm that does something: random gamma and beta, statistics of its own activations."""
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        from write_recipe_graphs import build as random_network
    finally:
        sys.path.remove(str(SCRIPT.parent))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = random_network(name)
    for part in net.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(part.weight, 0.5, 1.5)
            torch.nn.init.uniform_(part.bias, -0.2, 0.2)
            part.momentum = 1.0
    with torch.no_grad():
        net.train()(torch.randn(2, 3, 64, 64))
    return net.eval()


@pytest.mark.parametrize("name", recipe_names())
def test_frozen_features_equal_torch(name: str) -> None:
    net, recipe = build(name), load_recipe(name)
    frozen = freeze_recipe(recipe, to_numpy(net.state_dict()))
    assert compare_with_torch(frozen, net, at_size(recipe.input, 64), SUBMODULE.get(name)) <= 1e-4


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet20_cifar10"])
def test_real_weights_give_torchs_features(name: str, shared_data: Path) -> None:
    from safetensors.numpy import load_file

    files = {"mobilenet_v2": "mobilenet_v2_imagenet", "resnet20_cifar10": "resnet20_cifar10"}
    state = load_file(shared_data / f"{files[name]}.safetensors")
    net, recipe = build(name), load_recipe(name)
    net.load_state_dict({key: torch.from_numpy(np.array(tensor)) for key, tensor in state.items()})
    assert compare_with_torch(freeze_recipe(recipe, state), net, recipe.input) <= 1e-4


def test_a_committed_graph_is_what_the_script_would_write() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--check", "mobilenet_v3_small", "resnet20_cifar10"],
        capture_output=True, text=True, check=False, cwd=ROOT, env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("unchanged") == 2
