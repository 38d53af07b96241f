"""The embedded backbone's starting point: the teacher, as far as the channels go."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
STAGES = ((1, 8, 1, 1), (6, 16, 2, 2))
NARROW = ((1, 8, 1, 1), (6, 8, 2, 2))


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any]]:
    """The modules `embedded_net` and `embedded_start`, which are no part of the package."""
    monkeypatch.syspath_prepend(SCRIPTS)
    names = ("embedded_net", "embedded_start")
    yield importlib.import_module(names[0]), importlib.import_module(names[1])
    for name in names:
        sys.modules.pop(name, None)


def random_network(net: Any) -> Any:
    """The network with batch-norm that does something."""
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                torch.nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                torch.nn.init.uniform_(tensor, -0.5, 0.5)
    return net.eval()


def likeness(a: Any, b: Any) -> float:
    """1 - the mean square difference over the variance of b."""
    return float(1 - (a - b).square().mean() / (b - b.mean(dim=0)).square().mean())


def test_with_all_channels_the_start_is_the_teacher_and_with_fewer_it_is_near(scripts: tuple[Any, Any]) -> None:
    torch.manual_seed(0)
    embedded_net, embedded_start = scripts
    wide = random_network(embedded_net.MobileNetV2(16, STAGES, 24))
    images, fresh = torch.randn(16, 3, 32, 32), torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        expected = wide.features(fresh)

        same = embedded_net.MobileNetV2(16, STAGES, 24)
        embedded_start.start_from(wide, same, images)
        close = likeness(same.features(fresh), expected)
        assert close > 0.99  # not 1: the fits have a ridge, and the moments are those of few pixels

        fewer = embedded_net.MobileNetV2(16, NARROW, 24)
        untouched = likeness(fewer.eval().features(fresh), expected)
        embedded_start.start_from(wide, fewer, images)
        near = likeness(fewer.features(fresh), expected)
        assert 0.5 < near < close
        assert near > untouched + 0.3
