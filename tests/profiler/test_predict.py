"""Predictions: what a board that is not here would take, and how that is told."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tiny import saved_tiny_bundle

from ksm_edge.bundle.layers import Bundle
from ksm_edge.bundle.load import load_bundle
from ksm_edge.device import Device
from ksm_edge.errors import UsageError
from ksm_edge.profiler.predict import gradient_work, predict, update_work
from ksm_edge.profiler.work import graph_work
from ksm_edge.training.planner import make_plan
from ksm_edge.training.settings import Settings
from ksm_edge.training.trainer import gradient_spec

SETTINGS = Settings(batch=4, epochs=3)
BOARD = Device.load("raspberry-pi-4")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return saved_tiny_bundle(tmp_path_factory.mktemp("tiny") / "bundle")


def test_a_prediction_adds_up(bundle: Bundle) -> None:
    found = predict(bundle, BOARD, images=10, settings=SETTINGS)
    assert found.steps == 3 * 3
    assert found.inference_ms == pytest.approx(sum(ms for _, ms in found.operators))
    assert found.plan is not None
    assert found.step_ms is not None
    micro_batches = -(-4 // found.plan.micro_batch)
    updates = sum(ms for work, ms in found.adaptation_operators if work.operator == "Update")
    others = sum(ms for work, ms in found.adaptation_operators if work.operator != "Update")
    assert found.step_ms == pytest.approx(micro_batches * others + updates)
    assert found.adaptation_minutes == pytest.approx(9 * found.step_ms / 60_000)
    assert found.energy_watt_hours is not None
    assert found.energy_watt_hours[1] == pytest.approx(found.adaptation_minutes / 60 * BOARD.power_modes[0].watts)
    low, high = found.range_of(10)
    assert low < 10 < high


def test_memory_is_the_planners(bundle: Bundle) -> None:
    found = predict(bundle, BOARD, images=10, settings=SETTINGS, classes=3)
    plan = make_plan(bundle, 3, SETTINGS, threads=4, budget_bytes=BOARD.memory_budget_bytes)
    assert found.as_json()["adaptation_peak_bytes"] == plan.expected_peak_bytes


def test_what_does_not_fit_is_refused_in_the_planners_words(bundle: Bundle) -> None:
    found = predict(bundle, replace(BOARD, memory_budget_bytes=50 << 20), images=10, settings=SETTINGS)
    assert (found.plan, found.step_ms, found.adaptation_minutes, found.energy_watt_hours) == (None, None, None, None)
    assert found.refusal
    assert "the budget is 50 MiB" in found.refusal
    assert found.as_json()["fits"] is False


def test_kernels_that_only_infer_predict_no_adaptation(bundle: Bundle) -> None:
    found = predict(bundle, BOARD, images=10, settings=SETTINGS, kernels="ncnn")
    assert found.inference_ms > 0
    assert (found.plan, found.step_ms) == (None, None)
    assert (found.refusal, found.fits) == (None, None)


def test_a_board_without_watts_has_no_energy(bundle: Bundle) -> None:
    assert predict(bundle, replace(BOARD, power_modes=()), images=10, settings=SETTINGS).energy_watt_hours is None


def test_a_faster_board_takes_less_time(bundle: Bundle) -> None:
    pi4, pi5 = (predict(bundle, Device.load(f"raspberry-pi-{n}"), images=10, settings=SETTINGS) for n in (4, 5))
    assert pi5.inference_ms < pi4.inference_ms
    assert pi5.step_ms is not None
    assert pi4.step_ms is not None
    assert pi5.step_ms < pi4.step_ms


def test_this_machine_is_measured_rather_than_declared(bundle: Bundle) -> None:
    assert predict(bundle, Device.load("host"), images=10, settings=SETTINGS, threads=1).inference_ms > 0


def test_a_profile_without_what_is_needed_says_so(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="does not say flop_per_cycle"):
        predict(bundle, replace(BOARD, flop_per_cycle=0), images=10, settings=SETTINGS)


def test_backward_is_about_twice_forward() -> None:
    embedded = load_bundle("embedded")
    settings = Settings(batch=1)
    plan = make_plan(embedded, 10, settings, threads=1, budget_bytes=None)
    both = sum(work.flops for work in gradient_work(embedded, plan.graph.spec))
    forward = sum(work.flops for work in graph_work(embedded.graph_path, embedded.input.size))
    assert 2.5 < both / forward < 3.5


def test_smaller_images_are_less_work_in_proportion_to_their_pixels() -> None:
    embedded = load_bundle("embedded")
    whole, half = (
        sum(work.flops for work in gradient_work(embedded, gradient_spec(embedded, 10, Settings(train_scale=scale), 1)))
        for scale in (1.0, 0.5)
    )
    assert 3 < whole / half < 4


def test_a_step_takes_what_it_does_on_the_mean_over_the_epochs(bundle: Bundle) -> None:
    """A quarter of them is in whole images here."""
    step_ms = [
        predict(bundle, BOARD, images=32, settings=replace(SETTINGS, epochs=8, train_scale=0.5, whole_at=at)).step_ms
        for at in (0.0, 0.75, 1.0)
    ]
    whole, mean, small = map(float, step_ms)
    assert small < whole
    assert mean == pytest.approx(0.75 * small + 0.25 * whole)


def test_an_update_is_of_the_layers_that_learn(bundle: Bundle) -> None:
    every = update_work(bundle, SETTINGS)
    assert len(every) == len(bundle.layers)
    last = update_work(bundle, replace(SETTINGS, layers="plain"))
    assert [work.name for work in last] == ["plain.update"]
    assert update_work(bundle, replace(SETTINGS, method="head")) == []


def test_torch_is_predicted_as_it_runs_eagerly_with_a_backward_pass_of_its_own(bundle: Bundle) -> None:
    torch = predict(bundle, BOARD, images=10, settings=SETTINGS, kernels="pytorch")
    assert any(work.operator == "BatchNormalization" for work, _ in torch.operators)
    assert torch.step_ms == pytest.approx(4 * torch.inference_ms * (1 + torch.kernels.backward))
    assert torch.fits is None


def test_no_more_threads_are_counted_than_there_are_cores(bundle: Bundle) -> None:
    four, many = (predict(bundle, BOARD, images=10, settings=SETTINGS, threads=n).inference_ms for n in (4, 64))
    assert many == four


@pytest.mark.parametrize("batch", [1, 4, 16])
def test_the_embedded_backbone_is_predicted_at_every_micro_batch(batch: int) -> None:
    found = predict(load_bundle("embedded"), BOARD, images=20, settings=Settings(batch=batch))
    assert found.step_ms
