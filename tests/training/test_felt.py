from __future__ import annotations

import numpy as np
import pytest

from ksm_edge.mask import SoftMask, soft_mask
from ksm_edge.training.felt import feel

pytestmark = pytest.mark.usefixtures("each_form")

# Rows shorter than what is summed at once, of just so many, of some more, and of a large layer's.
WIDTHS = (1, 15, 16, 33, 960)


def product_and_mask(width: int) -> tuple[np.ndarray, np.ndarray, SoftMask]:
    rng = np.random.default_rng(width)
    score = rng.normal(8e-3, 5e-3, (7, width)).astype(np.float32)
    W, product = rng.standard_normal((2, 7, width)).astype(np.float32)
    return W, product, soft_mask(score, amplify=True)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("has_weight", [True, False])
@pytest.mark.parametrize("has_mask", [True, False])
def test_masks_feel_what_the_chain_rule_says(width: int, has_weight: bool, has_mask: bool) -> None:
    W, felt, mask = product_and_mask(width)
    factor = np.linspace(-1, 2, 7, dtype=np.float32)
    S = W * felt if has_weight else felt.copy()
    M = mask.values if has_mask else np.ones_like(felt)
    sums = feel(felt, W if has_weight else None, factor, mask if has_mask else None)
    assert np.array_equal(felt, S * factor[:, None])
    terms = np.float64(S) * M
    assert (abs(sums - terms.sum(axis=1)) <= 1e-6 * abs(np.float64(S)).sum(axis=1)).all()


def test_a_factor_of_zero_leaves_the_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ksm_edge.training.blocks.BLOCK", 4)  # of several blocks is what is cut too
    W, felt, mask = product_and_mask(33)
    expected = (np.float64(W * felt) * mask.values).sum(axis=1)
    sums = feel(felt, W, np.zeros(7, np.float32), mask)
    assert not felt.any()
    np.testing.assert_allclose(sums, expected, rtol=1e-5, atol=1e-5)


def test_a_weight_that_lies_askew_is_read_all_the_same() -> None:
    """As in a file of tensors whose header has any length."""
    W, felt, mask = product_and_mask(16)
    askew = np.frombuffer(b"\0" + W.tobytes(), np.uint8)[1:].view(np.float32).reshape(W.shape)
    assert not askew.flags.aligned
    beside = felt.copy()
    factor = np.ones(7, np.float32)
    np.testing.assert_allclose(feel(felt, askew, factor, mask), feel(beside, W, factor, mask), rtol=1e-5, atol=1e-5)
    assert np.array_equal(felt, beside)
