from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from ksm_edge.mask import keep_gradient
from ksm_edge.training.adam import Adam, CompactAdam, rate_factor
from ksm_edge.training.blocks import BLOCK

pytestmark = pytest.mark.usefixtures("each_form")

SHAPE = (3, BLOCK // 2)  # one and a half blocks


def gradients_and_start(steps: int = 20) -> tuple[np.ndarray, list[np.ndarray]]:
    rng = np.random.default_rng(0)
    sizes = 10.0 ** rng.uniform(-6, 1, SHAPE)  # of all magnitudes
    return rng.standard_normal(SHAPE), [rng.standard_normal(SHAPE) * sizes for _ in range(steps)]


def plain_adam(parameter: np.ndarray, gradients: list[np.ndarray], rate: float) -> np.ndarray:
    """Algorithm 1 of Kingma and Ba, line by line, in float64."""
    m, v = np.zeros_like(parameter), np.zeros_like(parameter)
    for t, g in enumerate(gradients, start=1):
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g**2
        parameter = parameter - rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    return parameter


def by_ours(parameter: np.ndarray, gradients: list[np.ndarray], rate: float) -> np.ndarray:
    found = parameter.astype(np.float32)
    adam = Adam(found)
    for count, gradient in enumerate(gradients, start=1):
        adam.step(gradient.astype(np.float32), rate, count)
    return found


def test_steps_are_those_of_the_paper() -> None:
    start, gradients = gradients_and_start()
    np.testing.assert_allclose(by_ours(start, gradients, 1e-3), plain_adam(start, gradients, 1e-3), atol=1e-6)


@pytest.mark.torch
def test_steps_are_those_of_torch() -> None:
    torch = pytest.importorskip("torch")
    start, gradients = gradients_and_start()
    leaf = torch.tensor(start, requires_grad=True)
    optimizer = torch.optim.Adam([leaf], lr=1e-3)
    for gradient in gradients:
        leaf.grad = torch.tensor(gradient)
        optimizer.step()
    np.testing.assert_allclose(by_ours(start, gradients, 1e-3), leaf.detach().numpy(), atol=1e-6)


def test_the_parameter_changes_in_place_and_the_gradient_does_not() -> None:
    parameter, gradient = np.ones((2, 3), np.float32), np.full((2, 3), 5, np.float32)
    Adam(parameter).step(gradient, 0.25, 1)
    np.testing.assert_allclose(parameter, 0.75, rtol=1e-6)  # the first step is as long as the rate
    assert (gradient == 5).all()


def test_no_gradient_is_no_step() -> None:
    parameter = np.ones(4, np.float32)
    Adam(parameter).step(np.zeros(4, np.float32), 0.1, 1)
    assert (parameter == 1).all()


def test_scores_take_the_gradient_of_the_mask_to_their_own_in_front_of_the_step() -> None:
    rng = np.random.default_rng(0)
    score = rng.normal(8e-3, 5e-3, BLOCK + 10).astype(np.float32)
    product = rng.standard_normal(score.shape).astype(np.float32)
    one, other = score.copy(), score.copy()
    a, b = Adam(one, scores=True), Adam(other)
    for count in (1, 2, 3):
        a.step(product, 1e-3, count)
        b.step(product * keep_gradient(other), 1e-3, count)
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-8)
    assert not np.array_equal(one, score)


@pytest.mark.parametrize("kind", [Adam, CompactAdam])
def test_what_is_to_stay_stays(kind: type[Adam]) -> None:
    parameter = np.linspace(0, 1, BLOCK + 10, dtype=np.float32)
    before, stay = parameter.copy(), parameter[7]
    kind(parameter, scores=True).step(np.ones_like(parameter), 1e-2, 1, stay=float(stay))
    assert np.array_equal(before == stay, parameter == before)


def test_moments_in_a_byte_take_a_quarter_of_the_memory() -> None:
    parameter = np.zeros((64, BLOCK // 8), np.float32)
    sizes = [sum(a.nbytes for a in kind(parameter).state("x").values()) for kind in (Adam, CompactAdam)]
    assert sizes[0] == 3 * parameter.nbytes
    assert sizes[1] <= 1.51 * parameter.nbytes


def test_moments_in_a_byte_go_nearly_where_true_ones_go() -> None:
    """Over many steps of noisy gradients of sizes up to 3000 times apart, element by element."""
    rng, steps = np.random.default_rng(0), 300
    drift = rng.choice([-1, 1], SHAPE) * 10.0 ** rng.uniform(-3.5, 0, SHAPE)
    ends = []
    for kind in (Adam, CompactAdam):
        noise = np.random.default_rng(1)
        parameter = np.zeros(SHAPE, np.float32)
        adam = kind(parameter)
        for count in range(1, steps + 1):
            noisy = drift * (1 + noise.standard_normal(SHAPE))
            adam.step(noisy.astype(np.float32), 1e-3, count)
        ends.append(parameter)
    true, compact = ends
    length, apart = np.abs(true).mean(), np.abs(compact - true)
    assert np.median(apart) < 0.04 * length
    assert np.quantile(apart, 0.9) < 0.08 * length  # squares forget what they were rounded to slowly
    assert apart.max() < 0.25 * length
    assert abs(((compact - true) * np.sign(true)).mean()) < 0.01 * length  # neither farther nor less far


def test_moments_in_a_byte_survive_an_outlier() -> None:
    """What is far below a row's largest square is no longer told apart, but must not become 0: it is divided by."""
    parameter = np.zeros(3, np.float32)
    adam = CompactAdam(parameter)
    for count in range(1, 200):
        adam.step(np.array([0 if count % 3 == 0 else 1, 0, 1e6 if count == 20 else 1], np.float32), 1e-3, count)
    assert -0.2 <= parameter[0] < 0
    assert parameter[1] == 0


def test_rates_rise_to_their_full_value_then_fall_to_nothing() -> None:
    factors = [rate_factor(step, 100, 0.05) for step in range(100)]
    assert factors[:6] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])
    assert all(a > b for a, b in pairwise(factors[5:]))
    assert 0 < factors[-1] < 1e-3
    assert rate_factor(5 + 95 // 2, 100, 0.05) == pytest.approx(0.5, abs=0.02)


def test_without_warm_up_the_first_step_is_whole() -> None:
    assert rate_factor(0, 10, 0.0) == 1
    assert rate_factor(0, 1, 0.0) == 1


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.5, 0.99])
def test_every_step_of_the_shortest_run_learns(steps: int, warmup: float) -> None:
    assert all(0 < rate_factor(step, steps, warmup) <= 1 for step in range(steps))
