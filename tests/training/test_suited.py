"""Learning rates that suit a backbone of another depth, other gammas and other features."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_bundle

from ksm_edge.bundle.layers import Bundle
from ksm_edge.bundle.load import load_bundle
from ksm_edge.bundle.make import freeze_recipe, save_bundle
from ksm_edge.bundle.recipe import load_recipe
from ksm_edge.bundle.statedict import read_state_dict
from ksm_edge.runtimes.compile import compile_graph
from ksm_edge.training.settings import Settings
from ksm_edge.training.suited import (
    FEATURE_SUM,
    GAMMA,
    LAYERS,
    MOST,
    RateScale,
    amplifies,
    mask_bits,
    most_cut,
    rate_scale,
)
from ksm_edge.training.trainer import Trainer, gradient_spec


def with_gammas(bundle: Bundle, gamma: float, layers: int) -> Bundle:
    """The same, as if it had so many layers, all of them with gammas like these."""
    names = [layer.name for layer in bundle.layers if layer.has_norm]
    weights = {n: replace(w, gamma=np.full_like(w.gamma, gamma)) for n, w in bundle.weights.items() if n in names}
    table = (bundle.layers * layers)[:layers]
    return replace(bundle, layers=table, weights={**bundle.weights, **weights})


@pytest.mark.parametrize(
    ("layers", "gamma", "expected"),
    [
        (LAYERS, GAMMA, (1.0, 1.0)),
        (LAYERS, -GAMMA, (1.0, 1.0)),
        (LAYERS // 2, GAMMA, (2.0, 2.0)),
        (LAYERS, 3 * GAMMA, (1.0, 3.0)),
        (4 * LAYERS, GAMMA, (0.2, 0.2)),  # 0.25 to a tenth, ties to even
        (5, 10.0, (MOST, MOST)),
    ],
)
def test_rates_grow_where_layers_are_fewer_and_gammas_larger(
    tmp_path: Path, layers: int, gamma: float, expected: tuple[float, float]
) -> None:
    found = rate_scale(with_gammas(tiny_bundle(tmp_path), gamma, layers))
    assert (found.score, found.norm) == expected


def test_a_backbone_without_batch_norm_is_scaled_by_its_depth_alone(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path)
    plain = [replace(layer, has_norm=False) for layer in bundle.layers] * 4
    assert rate_scale(replace(bundle, layers=tuple(plain))) == RateScale(2.6, 2.6)


@pytest.mark.parametrize(
    ("features", "expected"), [(FEATURE_SUM, 1.0), (FEATURE_SUM / 3, 3.0), (4 * FEATURE_SUM, 0.2), (0.0, MOST)]
)
def test_the_head_learns_faster_where_features_are_few_or_small(
    tmp_path: Path, features: float, expected: float
) -> None:
    assert rate_scale(replace(tiny_bundle(tmp_path), feature_sum=features)).head == expected


def test_mobilenet_v2_is_what_rates_are_given_for(shared_data: Path, tmp_path: Path) -> None:
    recipe = load_recipe("mobilenet_v2")
    state = read_state_dict(shared_data / "mobilenet_v2_imagenet.safetensors")
    frozen = freeze_recipe(recipe, state)
    bundle = save_bundle(frozen, tmp_path / "bundle", recipe=recipe.name, input_contract=recipe.input)
    assert rate_scale(bundle) == RateScale()
    assert most_cut(bundle, kernels_of(bundle), 10, Settings()) / kernels_of(bundle) == pytest.approx(0.0303, abs=1e-4)


def test_the_embedded_backbone_is_nearly_one_of_those() -> None:
    assert rate_scale(load_bundle("embedded")) == RateScale(1.0, 1.3, 2.2)


def kernels_of(bundle: Bundle) -> int:
    return sum(layer.weight_shape[0] * layer.weight_shape[1] for layer in bundle.layers)


@pytest.mark.parametrize("classes", [2, 10, 15, 30])
@pytest.mark.parametrize(
    ("soft_bits", "amplify"), [(0, False), (1, False), (2, False), (8, False), (1, True), (2, True), (7, True)]
)
@pytest.mark.parametrize("given", [0.3, 1.5])
def test_as_many_may_be_cut_as_there_are_bits_for(classes: int, soft_bits: int, given: float, amplify: bool) -> None:
    bundle = load_bundle("embedded")
    scores, weights = kernels_of(bundle), sum(math.prod(layer.weight_shape) for layer in bundle.layers)
    chosen = Settings(mask_bits=given, scale_bits=max(1, soft_bits), soft=soft_bits > 0, amplify=amplify)
    most, room = most_cut(bundle, scores, classes, chosen), given * weights * max(1, classes / 10)
    soft_bits += amplify
    shares = np.linspace(0, 1, 200)
    if most == scores:  # no share of them is too much
        assert max(mask_bits(int(share * scores), scores, soft_bits) for share in shares) <= room
    else:
        assert most > 0
        assert mask_bits(most, scores, soft_bits) <= room < mask_bits(most + 1, scores, soft_bits)
        assert all(mask_bits(int(share * most), scores, soft_bits) <= room for share in shares)


def test_where_every_pack_is_small_all_may_be_cut(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path)

    def most(side: int, amplify: bool | None = None) -> int:
        layers = [replace(layer, weight_shape=(*layer.weight_shape[:2], side, side)) for layer in bundle.layers]
        return most_cut(replace(bundle, layers=tuple(layers)), kernels_of(bundle), 2, Settings(amplify=amplify))

    assert most(4) == kernels_of(bundle)
    assert most(3, amplify=False) > kernels_of(bundle) / 2  # and no task cuts as much
    assert most(3) > kernels_of(bundle) * 0.4
    assert most(1) < kernels_of(bundle) / 10
    assert most_cut(load_bundle("embedded"), 1000, 1000, Settings()) == 1000
    assert most_cut(load_bundle("embedded"), 0, 2, Settings()) == 0
    for scores in (1, 2, 1000):
        assert most_cut(load_bundle("embedded"), scores, 2, Settings(mask_bits=0)) == 0


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, False),
        ({"classes": 39}, False),
        ({"classes": 40}, True),
        ({"mask_bits": 1.0}, True),
        ({"mask_bits": 1.0, "soft": False}, False),
        ({"mask_bits": 1.0, "scale_bits": 8}, False),
        ({"mask_bits": 1.0, "thin": 0.0}, False),
        ({"mask_bits": 1.0, "amplify": False}, False),
        ({"amplify": True}, True),
    ],
)
def test_masks_amplify_where_a_pack_has_a_bit_for_each_score_unless_that_is_said(
    tmp_path: Path, changed: dict[str, Any], expected: bool
) -> None:
    bundle = tiny_bundle(tmp_path)
    layers = tuple(replace(layer, weight_shape=(*layer.weight_shape[:2], 1, 1)) for layer in bundle.layers)
    bundle, classes = replace(bundle, layers=layers), changed.pop("classes", 2)
    assert amplifies(bundle, kernels_of(bundle), classes, Settings(**changed)) is expected
    assert amplifies(bundle, 0, classes, Settings(**changed)) is bool(changed.get("amplify"))


def test_bits_of_masks_are_their_entropy_and_a_scale_each() -> None:
    assert mask_bits(0, 64, 2) == 0
    assert mask_bits(32, 64, 2) == 64 + 2 * 32
    assert mask_bits(16, 64, 0) == pytest.approx(16 * 2 + 48 * math.log2(4 / 3))
    assert mask_bits(64, 64, 3) == 3 * 64


@pytest.mark.parametrize("scaled", [True, False])
def test_a_first_step_is_as_long_as_its_rate(tmp_path: Path, scaled: bool) -> None:
    bundle = replace(tiny_bundle(tmp_path), feature_sum=FEATURE_SUM / 2)
    settings = Settings(batch=2, warmup=0.0, head_start="random", scaled_rates=scaled)
    graph = compile_graph(bundle, gradient_spec(bundle, 3, settings, 1), tmp_path)
    trainer, scale = Trainer(bundle, graph, settings, steps=10), rate_scale(bundle) if scaled else RateScale()
    rng = np.random.default_rng(0)
    images, targets = rng.standard_normal((2, 3, 16, 16), np.float32), np.eye(3, dtype=np.float32)[:2] / 2
    before = {name: (x.beta.copy(), x.score.copy()) for name, x in trainer.layers.items()}
    head = trainer.head_weight.copy()
    trainer.step(images, targets)
    assert abs(trainer.head_weight - head).max() == pytest.approx(5e-4 * scale.head, rel=1e-2)
    for name, layer in trainer.layers.items():  # Adam's first step has the length of its rate
        moved = abs(layer.beta - before[name][0]).max(), abs(layer.score - before[name][1]).max()
        assert moved == pytest.approx((5e-4 * scale.norm, 2e-4 * scale.score), rel=1e-2)
