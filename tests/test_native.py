"""The compiled loops refuse what their numpy forms refuse, and take no array that they would misread."""

from __future__ import annotations

import ctypes
import math
import shutil
import sysconfig
from pathlib import Path
from random import Random
from types import ModuleType

import numpy as np
import pytest

from ksm_edge import native
from ksm_edge.coding import keep
from ksm_edge.errors import DamagedFileError
from ksm_edge.mask import SLOPE, THRESHOLD, keep_gradient
from ksm_edge.training.adam import MOMENTUM, SQUARE_DECAY, Adam

SHAPES = [(16, 40), (8, 1), (24, 30), (3, 3)]
BYTES = (0x00, 0x01, 0x7F, 0x80, 0xFF)


@pytest.fixture
def loops() -> ModuleType:
    if native.loops is None:
        pytest.skip("no compiled loops: the package was installed without a C compiler")
    return native.loops


def test_they_are_there_where_the_installation_found_a_compiler() -> None:
    if not (shutil.which("cc") and Path(sysconfig.get_path("include"), "Python.h").exists()):
        pytest.skip("no C compiler here, or no headers of Python")
    assert native.loops is not None, "pip install -e . again: the loops in C were not compiled"
    assert native.operators is not None, "pip install -e . again: the operators in C were not compiled"


def mutated(data: bytes, random: Random) -> bytes:
    """One to three bytes changed, put in or left out."""
    changed = bytearray(data)
    for _ in range(random.randint(1, 3)):
        at = random.randrange(len(changed) + 1)
        byte = random.choice((random.randrange(256), *BYTES))
        changed[at : at + random.randint(0, 2)] = bytes([byte] * random.randint(0, 2))
    return bytes(changed)


def by_numpy(data: bytes) -> list[np.ndarray] | None:
    try:
        return keep._decode_groups(data, SHAPES)
    except DamagedFileError:
        return None


def test_damaged_keep_bits_are_read_as_numpy_reads_them_or_refused_by_both(loops: ModuleType) -> None:
    random, rng, read, refused = Random(0), np.random.default_rng(0), 0, 0
    for share in np.repeat([0.0, 0.01, 0.1, 0.3], 500):
        busy = [(rng.random(O) < 0.3)[:, None] | (rng.random(X) < 0.2) for O, X in SHAPES]
        cuts = [np.flatnonzero(rng.random(b.shape) < share * np.where(b, 3, 0.3)) for b in busy]
        data = mutated(keep._encode_groups(cuts, SHAPES), random)
        expected, found = by_numpy(data), keep._decode_groups_natively(data, SHAPES)
        assert (expected is None) == (found is None), data.hex()
        # Bytes end with a zero that is theirs; behind this array nothing is, as scripts/sanitize would notice.
        alone = memoryview((ctypes.c_ubyte * len(data)).from_buffer_copy(data)).cast("B")
        assert (loops.decode_keep(alone, np.array(SHAPES, np.int64)) is None) == (found is None)
        for left, right in zip(expected or (), found or (), strict=True):
            np.testing.assert_array_equal(left, right)
        read, refused = read + (expected is not None), refused + (expected is None)
    assert min(read, refused) > 100  # either has been seen often


@pytest.mark.parametrize("shapes", [[(0, 3)], [(-1, 3)], [(1 << 13, 1 << 13)], [(1, 1 << 62)]])
def test_shapes_that_no_layer_has_are_refused(loops: ModuleType, shapes: list[tuple[int, int]]) -> None:
    assert loops.decode_keep(b"\0\0", np.array(shapes, np.int64)) is None


def test_a_stream_without_layers_has_no_cuts(loops: ModuleType) -> None:
    assert loops.decode_keep(b"\0", np.zeros((0, 2), np.int64)) == (b"", [])


def fuse_arguments() -> dict[str, np.ndarray]:
    return {
        "weight": np.ones((2, 3, 1, 1), np.float32),
        "factor": np.ones(2, np.float32),
        "cut": np.array([1, 4], np.int32),
        "scale": np.array([0.5, 0.25], np.float32),
        "out": np.zeros((2, 3, 1, 1), np.float32),
    }


def test_only_aligned_arrays_of_the_right_type_in_one_piece_are_taken(loops: ModuleType) -> None:
    given = fuse_arguments()
    loops.fuse(*given.values())
    assert given["out"].ravel().tolist() == [1, 0.5, 1, 1, 0.25, 1]
    for name, right in given.items():
        shifted = np.frombuffer(b"\0" + right.tobytes(), np.uint8)[1:].view(right.dtype).reshape(right.shape)
        for wrong in (right.astype(np.float64), shifted):
            with pytest.raises((TypeError, BufferError, ValueError)):
                loops.fuse(*(given | {name: wrong}).values())
    with pytest.raises((TypeError, BufferError, ValueError)):
        loops.fuse(*(given | {"weight": np.ones((3, 2, 1, 1), np.float32).transpose(1, 0, 2, 3)}).values())
    beside = np.zeros(4 * 6 + 1, np.uint8)[1:].view(np.float32).reshape(2, 3, 1, 1)
    with pytest.raises((TypeError, BufferError, ValueError)):
        loops.fuse(*(given | {"out": beside}).values())
    given["out"].flags.writeable = False
    with pytest.raises((BufferError, ValueError), match=r"(?i)read-only|writable"):
        loops.fuse(*given.values())


@pytest.mark.parametrize(
    "wrong",
    [
        {"cut": np.array([4, 1], np.int32)},
        {"cut": np.array([1, 6], np.int32)},
        {"cut": np.array([-1, 4], np.int32)},
        {"scale": np.ones(1, np.float32)},
        {"factor": np.ones(3, np.float32)},
        {"out": np.zeros((2, 2, 1, 1), np.float32)},
        {"weight": np.ones(6, np.float32)},
    ],
)
def test_arrays_that_do_not_fit_each_other_are_refused(loops: ModuleType, wrong: dict[str, np.ndarray]) -> None:
    with pytest.raises(ValueError, match="do not fit, or cut kernels are not ascending"):
        loops.fuse(*(fuse_arguments() | wrong).values())


def test_places_apart_are_looked_for_in_arrays_of_the_right_type_alone(loops: ModuleType) -> None:
    score = np.array([1, 0, np.nan, 3, -0.0, 2], np.float32)
    assert np.frombuffer(loops.apart(score, 0.5, 2.0), np.int32).tolist() == [1, 2, 3, 4]
    assert np.frombuffer(loops.apart(score, -np.inf, np.inf), np.int32).tolist() == [2]
    assert loops.apart(score[:0], 0.5, 2.0) == b""
    for wrong in (score.astype(float), score[::2]):
        with pytest.raises((TypeError, BufferError, ValueError)):
            loops.apart(wrong, 0.5, 2.0)
    with pytest.raises(TypeError):
        loops.apart(score, "0", 2.0)
    with pytest.raises(TypeError):
        loops.apart(score, 0.5)


def test_places_apart_of_any_share_find_room(loops: ModuleType) -> None:
    """For as many as they are, of a large layer: nothing knows in advance."""
    for share in (0.0, 1e-3, 0.5, 1.0):
        score = -np.float32(np.random.default_rng(0).random(200_003) < share)
        assert np.array_equal(np.frombuffer(loops.apart(score, -0.5, 1.0), np.int32), np.flatnonzero(score))


def feel_arguments() -> dict[str, np.ndarray]:
    return {
        "felt": np.full((2, 3), 2, np.float32),
        "weight": np.ones((2, 3), np.float32),
        "factor": np.full(2, 4, np.float32),
        "cut": np.array([1, 4], np.int32),
        "scale": np.array([0.5, 0.25], np.float32),
        "sums": np.zeros(2, np.float32),
    }


def test_what_masks_feel_takes_only_arrays_that_fit(loops: ModuleType) -> None:
    given = feel_arguments()
    loops.feel(*given.values())
    assert given["sums"].tolist() == [5, 4.5]
    assert (given["felt"] == 8).all()
    for name, right in feel_arguments().items():
        wider = np.int64 if name == "cut" else np.float64
        with pytest.raises(TypeError, match="is no aligned array"):
            loops.feel(*(feel_arguments() | {name: right.astype(wider)}).values())
        with pytest.raises(ValueError, match="do not fit, or cut kernels are not ascending"):
            loops.feel(*(feel_arguments() | {name: right[1:]}).values())
    with pytest.raises(ValueError, match="do not fit"):
        loops.feel(*(feel_arguments() | {"felt": np.ones(6, np.float32)}).values())
    for cut in ([4, 1], [1, 6], [-1, 4]):
        with pytest.raises(ValueError, match="cut kernels are not ascending"):
            loops.feel(*(feel_arguments() | {"cut": np.array(cut, np.int32)}).values())
    for name in ("felt", "sums"):
        fixed = feel_arguments()[name]
        fixed.flags.writeable = False
        with pytest.raises((BufferError, ValueError), match=r"(?i)read-only|writable"):
            loops.feel(*(feel_arguments() | {name: fixed}).values())
    with pytest.raises(TypeError):
        loops.feel(*list(feel_arguments().values())[1:])


def adam_arguments(count: int = 1003) -> dict[str, np.ndarray]:
    """Of all magnitudes, as a training in its middle has them."""
    rng = np.random.default_rng(0)
    sizes = 10.0 ** rng.uniform(-6, 1, count)
    arrays = {
        "parameter": rng.standard_normal(count),
        "gradient": rng.standard_normal(count) * sizes,
        "mean": rng.standard_normal(count) * sizes,
        "square": rng.random(count) * sizes**2,
    }
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def after_adam(monkeypatch: pytest.MonkeyPatch, loops: ModuleType | None, *, scores: bool) -> list[np.ndarray]:
    monkeypatch.setattr(native, "loops", loops)
    given = adam_arguments()
    if scores:
        given["parameter"] *= 0.5  # from where nothing passes any more to the threshold
    adam = Adam(given["parameter"], scores=scores)
    adam.mean[:], adam.square[:] = given["mean"], given["square"]
    adam.step(given["gradient"], 1e-3, count=7)
    return [adam.parameter, adam.mean, adam.square]


def test_adam_gives_the_bits_of_numpy(loops: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = zip(*(after_adam(monkeypatch, form, scores=False) for form in (loops, None)), strict=True)
    assert all(np.array_equal(found, expected) for found, expected in pairs)


def test_adam_of_scores_agrees_to_a_millionth(loops: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = zip(*(after_adam(monkeypatch, form, scores=True) for form in (loops, None)), strict=True)
    for found, expected in pairs:
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_the_gradient_of_keeping_is_as_exact_as_float32_is(loops: ModuleType) -> None:
    """Read from the first step of plain descent: momentum 0, and a floor of 1 beside which no square is seen."""
    score = np.concatenate([np.linspace(-3, 3, 4001), [-1e30, 1e30, -0.0, THRESHOLD]]).astype(np.float32)
    mean, square = np.zeros_like(score), np.zeros_like(score)
    rates = 0.0, SQUARE_DECAY, 0.0, 1.0, math.nan, SLOPE, SLOPE * THRESHOLD
    loops.adam(score.copy(), np.ones_like(score), mean, square, *rates)
    exact = keep_gradient(score.astype(np.float64))
    np.testing.assert_allclose(mean, exact, rtol=2e-6, atol=1e-9)


def test_adam_takes_only_arrays_that_fit(loops: ModuleType) -> None:
    numbers = (MOMENTUM, SQUARE_DECAY, 1e-3, 1e-8, math.nan, 0.0, 0.0)
    given = adam_arguments()
    loops.adam(*given.values(), *numbers)
    for name, right in given.items():
        with pytest.raises(TypeError):
            loops.adam(*(given | {name: right.astype(np.float64)}).values(), *numbers)
        with pytest.raises(ValueError, match="do not fit"):
            loops.adam(*(given | {name: right[1:]}).values(), *numbers)
        if name != "gradient":
            fixed = right.copy()
            fixed.flags.writeable = False
            with pytest.raises((BufferError, ValueError), match=r"(?i)read-only|writable"):
                loops.adam(*(given | {name: fixed}).values(), *numbers)
    with pytest.raises(TypeError):
        loops.adam(*given.values(), *numbers[1:])
    with pytest.raises(TypeError):
        loops.adam(*given.values(), *numbers[1:], "0")
