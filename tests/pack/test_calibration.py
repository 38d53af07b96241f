from __future__ import annotations

import numpy as np
import pytest

from ksm_edge.pack.calibration import FEWEST, Calibration, calibrate, calibration_error, cross_entropy, softmax


def drawn(temperature: float, n: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """Logits (n, 5) that are right about their own odds once they are divided by the temperature."""
    rng = np.random.default_rng(0)
    honest = 2 * rng.standard_normal((n, 5))
    labels = (softmax(honest).cumsum(axis=1) > rng.random((n, 1))).argmax(axis=1)
    return (honest * temperature).astype(np.float32), labels


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_the_temperature_that_was_put_in_is_found(temperature: float) -> None:
    logits, labels = drawn(temperature)
    found = calibrate(logits, labels)
    assert found.temperature == pytest.approx(temperature, rel=0.1)
    assert found.error < 0.03
    assert found.error_before >= found.error - 0.005
    assert cross_entropy(logits / found.temperature, labels) <= cross_entropy(logits, labels) + 1e-9


def test_all_but_a_twentieth_of_the_held_out_images_are_known() -> None:
    logits, labels = drawn(1.0)
    found = calibrate(logits, labels)
    confidence = found.probabilities(logits).max(axis=1)
    assert (confidence >= found.threshold).mean() == pytest.approx(0.95, abs=0.005)


def test_few_images_change_nothing() -> None:
    logits, labels = drawn(3.0, FEWEST - 1)
    assert calibrate(logits, labels) == Calibration(images=FEWEST - 1)
    np.testing.assert_allclose(Calibration().probabilities(logits), softmax(logits))


def test_the_error_is_the_gap_between_confidence_and_accuracy() -> None:
    right = np.array([True] * 6 + [False] * 4)
    assert calibration_error(np.full(10, 0.6), right) == pytest.approx(0)
    assert calibration_error(np.full(10, 0.9), right) == pytest.approx(0.3)
    assert calibration_error(np.array([1.0, 0.0]), np.array([True, True])) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"calibration": None},
        {"calibration": [1, 2]},
        {"calibration": {"temperature": 0, "threshold": 0.5}},
        {"calibration": {"temperature": 1.5}},
        {"calibration": {"temperature": "2", "threshold": 0.5}},
        {"calibration": {"temperature": 2.0, "threshold": 1.5}},
        {"calibration": {"temperature": True, "threshold": 0.5}},
        {"calibration": {"temperature": 10**400, "threshold": 0.5}},
    ],
)
def test_a_record_that_says_something_else_counts_as_none(record: dict) -> None:
    assert Calibration.from_record(record) == Calibration()


def test_a_record_says_it_again() -> None:
    found = calibrate(*drawn(2.0))
    assert found.images > 0
    assert Calibration.from_record({"calibration": found.as_record()}) == found
    odd = found.as_record() | {"images": "many", "error": -1, "error_before": None}
    assert Calibration.from_record({"calibration": odd}) == Calibration(found.temperature, found.threshold)
