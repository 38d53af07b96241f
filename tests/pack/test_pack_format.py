from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, replace

import numpy as np
import pytest
import safetensors.numpy
import second_reader
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import LAYERS, tiny_bundle, tiny_pack

from ksm_edge.errors import UsageError
from ksm_edge.fuse import fuse, fused_digest
from ksm_edge.mask import SoftMask
from ksm_edge.pack.budget import budget
from ksm_edge.pack.format import HEAD_BITS, NORM_BITS, SCALE_BITS, encode
from ksm_edge.pack.reader import decode, quantized
from ksm_edge.pack.record import LayerState, Pack


def same(left: object, right: object) -> bool:
    """Equality through records, mappings and arrays, dtypes and every bit included."""
    if isinstance(left, np.ndarray):
        return isinstance(right, np.ndarray) and left.dtype == right.dtype and np.array_equal(left, right)
    if isinstance(left, (Pack, LayerState, SoftMask)):
        return type(left) is type(right) and all(
            same(getattr(left, field.name), getattr(right, field.name)) for field in fields(left)
        )
    if isinstance(left, Mapping):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)  # type: ignore[call-overload, index]
    return left == right


def half_step(greatest: float, levels: int) -> float:
    """What rounding to whole steps may change at most."""
    return 1.001 * greatest / levels / 2


packs = st.builds(
    tiny_pack,
    st.sampled_from(["kernel", "group:3", "channel", "element"]),
    soft=st.booleans(),
    amplify=st.booleans(),
    statistics=st.sampled_from(["frozen", "batch"]),
    classes=st.integers(1, 5),
    cut=st.sampled_from([0.0, 0.03, 0.5, 0.97, 1.2]),
    seed=st.integers(0, 2**31),
)
all_bits = st.fixed_dictionaries(
    {"scale_bits": st.integers(1, 8), "norm_bits": st.integers(2, 8), "head_bits": st.integers(2, 8)}
)


def possible(pack: Pack, bits: dict[str, int]) -> dict[str, int]:
    """Those bits, or one less of a scale where 8 are too many."""
    return bits | {"scale_bits": min(bits["scale_bits"], 7)} if pack.amplifies else bits


@settings(max_examples=100, deadline=None)
@given(packs, all_bits)
def test_decoding_and_encoding_again_gives_the_same_bytes(pack: Pack, bits: dict[str, int]) -> None:
    bits = possible(pack, bits)
    data = encode(pack, **bits)
    assert encode(decode(data)) == data
    assert encode(decode(data), **bits) == data


@settings(max_examples=60, deadline=None)
@given(packs)
def test_a_pack_comes_back_with_keep_bits_exact_and_values_near(pack: Pack) -> None:
    back = quantized(pack)
    assert same(quantized(back), back)
    for name, state in pack.layers.items():
        found = back.layers[name]
        kept = state.mask is None or state.mask.keep.all()
        assert (found.mask is None) == kept
        if found.mask is not None and state.mask is not None:
            np.testing.assert_array_equal(found.mask.keep, state.mask.keep)
            np.testing.assert_allclose(found.mask.scale, state.mask.scale, atol=half_step(0.5, 2**SCALE_BITS - 1))
            assert (found.mask.low, found.mask.high) == (state.mask.low, state.mask.high)
        for part in ("gamma_delta", "beta_delta"):
            values = getattr(state, part)
            step = half_step(np.abs(values).max(), 2 ** (NORM_BITS - 1) - 1)
            np.testing.assert_allclose(getattr(found, part), values, rtol=0, atol=step)
        assert same(found.mean, state.mean)
        assert same(found.var, state.var)
    step = half_step(np.abs(pack.head_weight).max(), 2 ** (HEAD_BITS - 1) - 1)
    np.testing.assert_allclose(back.head_weight, pack.head_weight, rtol=0, atol=step)
    for exact in ("task", "classes", "backbone", "input", "record", "head_bias", "golden_logits", "weight_shapes"):
        assert same(getattr(back, exact), getattr(pack, exact)), exact


def test_scores_at_the_ends_of_the_range_come_back_exactly() -> None:
    back = quantized(tiny_pack(cut=0.5))
    mask = back.layers["project"].mask
    assert mask is not None
    assert mask.scale[~mask.keep].max() == 0.5


@pytest.mark.parametrize("bits", [1, 2, 7])
def test_amplified_kernels_come_back(bits: int) -> None:
    pack = tiny_pack(cut=0.5, amplify=True)
    back = quantized(pack, scale_bits=bits)
    assert pack.amplifies
    assert back.amplifies
    for name, state in pack.layers.items():
        if state.mask is not None:
            scale, found = state.mask.cut_scale, back.layers[name].mask.cut_scale
            np.testing.assert_array_equal(found > 1, scale > 1)
            assert np.abs(found - scale).max() <= 0.25 / (2**bits - 1) + 1e-6


def test_a_pack_that_amplifies_nothing_is_coded_as_ever() -> None:
    names = [second_reader.read_pack(encode(tiny_pack(amplify=amplify)))["metadata"]["codecs"]["scales"]
             for amplify in (False, True)]  # fmt: skip
    assert names == ["deflate", "mirrored-deflate"]


@pytest.mark.parametrize("scale", [-0.1, 0.6, 1.2, 2.5])
def test_a_scale_that_no_mask_has_is_not_written(scale: float) -> None:
    pack = tiny_pack(cut=0.5)
    name, state = next((name, state) for name, state in pack.layers.items() if state.mask is not None)
    mask = replace(state.mask, cut_scale=np.full_like(state.mask.cut_scale, scale))
    with pytest.raises(UsageError, match="scales of a mask lie in"):
        encode(replace(pack, layers={**pack.layers, name: replace(state, mask=mask)}))


def test_eight_bits_leave_none_for_what_amplifies() -> None:
    with pytest.raises(UsageError, match="7 at most"):
        encode(tiny_pack(amplify=True), scale_bits=8)


def test_fusing_what_was_read_back_gives_the_digest_in_the_pack(tmp_path) -> None:
    bundle = tiny_bundle(tmp_path)
    first = quantized(tiny_pack())
    pack = quantized(tiny_pack(changes={"fused_digest": fused_digest(fuse(bundle, first))}))
    assert fused_digest(fuse(bundle, pack)) == pack.fused_digest


def test_the_stock_library_reads_a_pack() -> None:
    data = encode(tiny_pack())
    streams = safetensors.numpy.load(data)
    assert sorted(streams) == ["bias", "bits", "golden", "head", "norm", "own", "ranges", "scales", "steps"]
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["ksm_edge"])
    assert metadata["format"] == 1
    assert metadata["classes"] == ["class 0", "class 1", "class 2"]
    assert metadata["layers"][0] == ["stem", 8, 3, 3, 3]


def test_the_metadatas_checksum_covers_all_behind_itself() -> None:
    data = encode(tiny_pack())
    length = int.from_bytes(data[:8], "little")
    text = json.loads(data[8 : 8 + length])["__metadata__"]["ksm_edge"]
    assert text.startswith('{"checksum":"')
    assert text[13:29] == hashlib.blake2b(text[29:].encode(), digest_size=8).hexdigest()


def test_names_in_any_script_come_back() -> None:
    classes = ("naïve", "写真", '"quoted"', "🙂")
    pack = tiny_pack(classes=4, changes={"task": "tâche", "classes": classes})
    assert decode(encode(pack)).classes == classes


def test_the_budget_adds_up_to_the_file() -> None:
    data = encode(tiny_pack(statistics="batch"))
    parts = budget(data)
    assert sum(parts.values()) == len(data)
    assert parts["keep_bits"] > 0
    assert parts["golden"] == 2 * 3 * 4


def test_head_only_packs_spend_nothing_on_the_backbone() -> None:
    untouched = {layer.name: LayerState(None, *[np.zeros(layer.weight_shape[0], np.float32)] * 2) for layer in LAYERS}
    parts = budget(encode(tiny_pack(changes={"layers": untouched})))
    assert parts["norm"] <= 2
    assert parts["scales"] <= 2
    assert parts["keep_bits"] <= 2 + len(LAYERS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_weight": np.full((3, 10), np.nan, np.float32)}, "head_weight has values that are not finite"),
        ({"head_weight": np.zeros((2, 10), np.float32)}, r"head_weight has shape \(2, 10\); .* \(3, 10\)"),
        ({"head_weight": np.full((3, 10), 3e38, np.float32)}, r"too large for a step of 1\.33e\+36"),
        ({"head_bias": np.zeros(4, np.float32)}, "head_bias has shape"),
        ({"golden_logits": np.zeros((2, 4), np.float32)}, "golden_logits has shape"),
        ({"layers": {}}, "same layers"),
        ({"granularity": "group:2"}, r"a mask of shape \(8, 8\) with \d+ scores cut does not fit \(8, 4\)"),
        ({"record": {"loss": float("nan")}}, "cannot be written"),
        ({"record": {"path": object()}}, "cannot be written"),
        ({"statistics": "running"}, "cannot be written: statistics are 'running'"),
        (
            {
                "classes": (),
                "head_weight": np.zeros((0, 10), np.float32),
                "head_bias": np.zeros(0, np.float32),
                "golden_logits": np.zeros((2, 0), np.float32),
            },
            "no features or no classes",
        ),
    ],
)
def test_what_could_not_be_read_back_is_not_written(changes: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        encode(tiny_pack(changes=changes))


@pytest.mark.parametrize("bits", [{"scale_bits": 0}, {"scale_bits": 9}, {"norm_bits": 1}, {"head_bits": 16}])
def test_bits_out_of_range_are_refused(bits: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="expected 1 to 8 for scale, 2 to 8 for norm and head"):
        encode(tiny_pack(), **bits)
