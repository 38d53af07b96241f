from __future__ import annotations

import math
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksm_edge.coding.keep import GROUPS, PACKED, decode_keep, encode_keep, table_shape
from ksm_edge.errors import DamagedFileError, UnsupportedVersionError

pytestmark = pytest.mark.usefixtures("each_form")
SHARES = [0.0, 0.001, 0.03, 0.5, 0.97, 1.0]


def entropy_bytes(share: float, cells: int) -> float:
    return -(share * math.log2(share) + (1 - share) * math.log2(1 - share)) * cells / 8


def encoded(keeps: list[np.ndarray]) -> tuple[str, bytes]:
    return encode_keep([np.flatnonzero(~keep) for keep in keeps], [table_shape(keep.shape) for keep in keeps])


def assert_comes_back(keeps: list[np.ndarray], codec: str, data: bytes) -> None:
    for keep, found in zip(keeps, decode_keep(codec, data, [table_shape(keep.shape) for keep in keeps]), strict=True):
        assert found.dtype == np.int32
        np.testing.assert_array_equal(found, np.flatnonzero(~keep))


@st.composite
def layers(draw: st.DrawFn) -> list[np.ndarray]:
    """Layers whose rows and columns each cut at a rate of their own."""
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    shapes = draw(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), max_size=5))
    keeps = []
    for O, X in shapes:
        by_row, by_column = (rng.choice(draw(st.lists(st.sampled_from(SHARES), min_size=1)), n) for n in (O, X))
        keeps.append(rng.random((O, X)) >= np.maximum(by_row[:, None], by_column) * rng.choice([0.1, 1.0]))
    return keeps


@settings(max_examples=200, deadline=None)
@given(layers())
def test_keep_bits_come_back_as_they_were(keeps: list[np.ndarray]) -> None:
    assert_comes_back(keeps, *encoded(keeps))


def test_a_score_for_every_weight_is_coded_filter_by_filter() -> None:
    keep = np.random.default_rng(0).random((8, 4, 3, 3)) >= 0.02
    codec, data = encoded([keep])
    assert codec == GROUPS
    assert_comes_back([keep], codec, data)


def test_layers_that_keep_everything_cost_a_byte() -> None:
    codec, data = encoded([np.ones((1000, 100), bool)] * 50)
    assert codec == GROUPS
    assert len(data) == 51  # and one for the number of busy rows and columns


@pytest.mark.parametrize("share", [0.003, 0.027, 0.1, 0.2])
def test_cuts_at_random_cost_within_a_hundredth_of_their_entropy(share: float) -> None:
    keep = np.random.default_rng(0).random((1000, 500)) >= share
    _, data = encoded([keep])
    assert len(data) <= 1.01 * entropy_bytes(1 - keep.mean(), keep.size)


def test_busy_filters_and_channels_pay_for_themselves() -> None:
    rng = np.random.default_rng(0)
    share = 0.02 * np.where(rng.random(400) < 0.2, 4, 1)[:, None] * np.where(rng.random(300) < 0.2, 4, 1)
    keep = rng.random(share.shape) >= share
    _, data = encoded([keep])
    known = sum(entropy_bytes(p, int((share == p).sum())) for p in np.unique(share))
    assert known < 0.93 * entropy_bytes(1 - keep.mean(), keep.size)
    assert len(data) <= 1.03 * known + (400 + 300) / 8


@pytest.mark.parametrize("share", [0.5, 0.8, 0.97])
def test_where_most_is_cut_no_more_than_raw_bits_are_written(share: float) -> None:
    keep = np.random.default_rng(0).random((800, 100)) >= share
    codec, data = encoded([keep])
    assert len(data) <= keep.size // 8 + 10
    assert codec == PACKED
    assert_comes_back([keep], codec, data)


def deflated(data: bytes) -> bytes:
    stream = zlib.compressobj(9, zlib.DEFLATED, -15)
    return stream.compress(data) + stream.flush()


@pytest.mark.parametrize(
    ("codec", "data", "shape", "message"),
    [
        (GROUPS, b"", (2, 2), "a count cannot be read"),
        (GROUPS, b"\x80\x80\x80\x80\x80\x01", (2, 2), "a count cannot be read"),
        (GROUPS, b"\x05", (2, 2), "split in way 5"),
        (GROUPS, b"\x01\x05\x00", (2, 2), "more kernels are cut than there are"),
        (GROUPS, b"\x02\x00\x00\x03", (2, 2), "3 rows and columns are busy out of 2"),
        (GROUPS, b"\x02\x00\x00\x00", (2, 2), "all its rows or columns are of one kind"),
        (GROUPS, b"\x02\x00\x00\x02\x00", (2, 2), "all its rows or columns are of one kind"),
        (GROUPS, b"\x01\x01\x00", (2, 2), "1 gaps declared, 0 bits are left"),
        (GROUPS, b"\x01\x01\x00\xff", (2, 2), "1 gaps declared, 0 found"),
        (GROUPS, b"\x01\x01\x00\xf8", (2, 2), "gaps reach beyond the 4 scores"),
        (GROUPS, b"\x01\x01\x00\x20", (2, 2), "bits are set behind the last gap"),
        (GROUPS, b"\x01\x01\x00\x00\x00", (2, 2), "1 bytes are left over"),
        (GROUPS, b"\x00\x00\x00", (2, 2), "1 bytes are left over"),
        (PACKED, deflated(b"\xff"), (3, 3), "1 bytes where 2 are needed"),
        (PACKED, deflated(b"\xff\xff\xff"), (3, 3), "more than 2 bytes where 2 are needed"),
        (PACKED, deflated(b"\xff\xff"), (3, 3), "bits are set behind the last layer"),
    ],
)
def test_bytes_that_do_not_fit_the_layers_are_refused(
    codec: str, data: bytes, shape: tuple[int, int], message: str
) -> None:
    with pytest.raises(DamagedFileError, match=message):
        decode_keep(codec, data, [shape])


def test_a_place_behind_its_own_layer_is_refused_though_all_layers_together_have_room() -> None:
    # Two layers of one group, 1 cut in each, none busy; gaps 5 and 0 under the divisor 2: unary 110 0, last bits 1 0.
    with pytest.raises(DamagedFileError, match="something at 5 among 4"):
        decode_keep(GROUPS, b"\x01\x01\x01\x01\x00" + bytes([0b11001000]), [(2, 2), (2, 2)])


@pytest.mark.parametrize(
    ("data", "shape"),
    [(b"\x01\x80\x80\x80\x0a\x00", (4096, 5120)), (b"\x03\x00\x00\x80\x80\x80\x0a", (1, 4096 * 5120))],
    ids=["kernels", "columns"],
)
def test_no_room_is_made_for_more_gaps_than_there_are_bits(data: bytes, shape: tuple[int, int]) -> None:
    events = 10 << 21  # as a number of 7 bits a byte: 80 80 80 0a
    tracemalloc.start()
    try:
        with pytest.raises(DamagedFileError, match=f"{events} gaps declared, 0 bits are left"):
            decode_keep(GROUPS, data, [shape])
        assert tracemalloc.get_traced_memory()[1] < 2 * events
    finally:
        tracemalloc.stop()


def test_kernels_that_cost_a_bit_each_take_little_memory() -> None:
    data = b"\x01\x80\x80\x80\x01\x00" + bytes(1 << 18)  # 2^21 cut of as many: divisor 1, and every gap the bit 0
    tracemalloc.start()
    try:
        (cut,) = decode_keep(GROUPS, data, [(1024, 2048)])
        assert tracemalloc.get_traced_memory()[1] < 6 * cut.size  # 4 of which are what comes back
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(cut, np.arange(1024 * 2048))


def test_a_cut_kernel_where_every_byte_says_so() -> None:
    # One group, 1 cut, none busy; 1 of 4: divisor 2, gap 3 = 2 + 1: unary 10, then the bit 1.
    (cut,) = decode_keep(GROUPS, b"\x01\x01\x00\xa0", [(2, 2)])
    assert cut.tolist() == [3]


def test_an_unknown_codec_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedVersionError, match="'range-coder'; this release knows groups-golomb and bits"):
        decode_keep("range-coder", b"", [(2, 2)])
