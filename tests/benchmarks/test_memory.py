"""Expected memory beside measured: what is kept, and in what order."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ksm_edge.bundle.load import load_bundle


def test_memory_is_told_by_its_extremes(load: Any) -> None:
    runs = [{"expected_bytes": e, "peak_rss_bytes": 100, "exceeded": e < 100} for e in (110, 95, 104)]
    assert load("memory").summary(runs) == {"least": 0.95, "most": 1.1, "exceeded": 1}


@pytest.fixture
def measured(load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs the script with pretended adaptations, which take so many bytes; gives what the file then has."""
    memory, out = load("memory"), tmp_path / "memory.json"
    monkeypatch.setattr("ksm_edge.profiler.child.write_photos", lambda *_: None)
    monkeypatch.setattr(memory, "backbone", lambda _, size, recipe: nullcontext(recipe))

    def run(peak: int, *words: str) -> list[tuple[str, int]]:
        found = {"size": 96, "options": [], "expected_bytes": 200, "peak_rss_bytes": peak, "exceeded": False}
        monkeypatch.setattr(memory, "_run", lambda recipe, *_: {"recipe": recipe, **found})
        monkeypatch.setattr(sys, "argv", ["memory.py", "--out", str(out), *words])
        assert memory.main() == 0
        runs = json.loads(out.read_text())["runs"]
        assert all("commit" in run for run in runs)
        return list(dict.fromkeys((run["recipe"], run["peak_rss_bytes"]) for run in runs))

    return run


def test_other_recipes_are_kept_where_that_is_asked_for(measured: Any) -> None:
    assert measured(100, "--recipes", "resnet18", "vgg16_bn") == [("resnet18", 100), ("vgg16_bn", 100)]
    assert measured(110, "--recipes", "resnet50", "vgg16_bn", "--add") == [
        ("resnet18", 100), ("resnet50", 110), ("vgg16_bn", 110)
    ]  # fmt: skip
    assert measured(120, "--recipes", "resnet50") == [("resnet50", 120)]


def test_a_quick_run_keeps_what_it_does_not_measure(measured: Any) -> None:
    measured(100, "--recipes", "resnet18", "resnet20_cifar10")
    assert ("resnet18", 100) in measured(110, "--quick", "--add")


@pytest.mark.parametrize("amplify", [False, True])
def test_a_random_pack_has_as_many_kernels_apart_as_asked(load: Any, amplify: bool) -> None:
    bundle = load_bundle("embedded")
    masked = [layer.name for layer in bundle.layers[:20]]
    pack = load("measure").random_pack(bundle, 0.25, ("a", "b", "c"), masked=masked, amplify=amplify)
    assert list(pack.layers) == masked
    assert len(pack.head_weight) == 3
    masks = [state.mask for state in pack.layers.values() if state.mask is not None]
    scales = np.concatenate([mask.cut_scale for mask in masks])
    assert scales.size / sum(mask.keep.size for mask in masks) == pytest.approx(0.25, abs=0.01)
    assert np.mean(scales > 1) == pytest.approx(0.5 if amplify else 0, abs=0.05 if amplify else 0)
