from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import LAYERS, saved_tiny_bundle

from ksm_edge import native
from ksm_edge.autodiff.spec import FLOATS, STANDARD
from ksm_edge.bundle.layers import Bundle
from ksm_edge.bundle.load import load_bundle
from ksm_edge.errors import BudgetError, UnsupportedError, UsageError
from ksm_edge.runtimes.engine import Engine
from ksm_edge.training import footprint, planner, refusal
from ksm_edge.training.footprint import (
    APART_SHARE,
    MOST_APART,
    PROCESS_BYTES,
    activation_bytes,
    apart_share,
    compiling_bytes,
    expected_peak_bytes,
    parameter_bytes,
    score_count,
)
from ksm_edge.training.planner import FORMS, Plan, _unmeasured_plan, make_plan
from ksm_edge.training.settings import MOMENT_BITS, Settings

MIB = 2**20
SETTINGS = Settings(batch=16)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny backbone at a size where activations are many MiB."""
    bundle = saved_tiny_bundle(tmp_path_factory.mktemp("plan") / "bundle")
    return replace(bundle, input=replace(bundle.input, size=512, resize=512))


def plan(bundle: Bundle, budget: int | None, settings: Settings = SETTINGS, threads: int = 1) -> Plan:
    return make_plan(bundle, 4, settings, threads=threads, budget_bytes=budget)


def ever_tighter(bundle: Bundle, settings: Settings, threads: int = 1) -> list[Plan]:
    """All plans there are, each for a byte less than the one before takes."""
    plans = [plan(bundle, None, settings, threads)]
    with suppress(BudgetError):
        while True:
            plans.append(plan(bundle, plans[-1].expected_peak_bytes - 1, settings, threads))
    return plans


def test_a_plan_says_what_was_asked_for(bundle: Bundle) -> None:
    found = plan(bundle, None, threads=2)
    assert (found.batch, found.engine.threads) == (16, 2)
    assert found.micro_batch == found.graph.spec.micro_batch
    least = found.activation_bytes + PROCESS_BYTES + parameter_bytes(bundle, 4, SETTINGS, found.graph.forms)
    assert found.expected_peak_bytes > least


def test_the_budget_error_names_the_smallest_budget_that_would_do(bundle: Bundle) -> None:
    with pytest.raises(BudgetError) as caught:
        plan(bundle, 8 * MIB)
    message = str(caught.value)
    assert "tiny at 512x512" in message
    assert "the budget is 8 MiB" in message
    assert "--method head" in message
    smallest = int(re.search(r"--memory-budget (\d+)MiB", message)[1])  # type: ignore[index]
    assert plan(bundle, smallest * MIB).expected_peak_bytes <= smallest * MIB
    assert caught.value.needed_bytes is not None
    assert plan(bundle, caught.value.needed_bytes).expected_peak_bytes == caught.value.needed_bytes
    with pytest.raises(BudgetError):
        plan(bundle, (smallest - 1) * MIB)


def test_compiling_weights_that_do_not_learn_is_in_the_plan(bundle: Bundle) -> None:
    settings = replace(SETTINGS, method="head")
    small = replace(bundle, input=replace(bundle.input, size=8, resize=8))
    found = plan(small, None, settings)
    assert found.expected_peak_bytes == compiling_bytes(small, settings) > compiling_bytes(small, SETTINGS)
    with pytest.raises(BudgetError, match=r"compiling the graphs of tiny.*needs about \d+ MiB") as caught:
        plan(small, found.expected_peak_bytes - 1, settings)
    assert caught.value.needed_bytes == found.expected_peak_bytes


def test_graphs_that_there_is_no_room_to_compile_are_not_begun(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    least = compiling_bytes(bundle, SETTINGS)
    monkeypatch.setattr(refusal, "room_bytes", lambda: least - 1)
    with pytest.raises(BudgetError, match="tiny at 512x512"):  # they are there from other tests, or are made now
        plan(bundle, least)
    with pytest.raises(BudgetError, match="tiny at 512x512"):
        plan(bundle, least - 1)
    monkeypatch.setattr(planner, "compiled", lambda *_: pytest.fail("compiled"))
    monkeypatch.setattr(refusal, "is_compiled", lambda *_: False)
    with pytest.raises(BudgetError, match=rf"compiling the graphs of tiny.*about {-(-least >> 20)} MiB, and there are"):
        plan(bundle, least - 1)


def test_a_budget_is_never_rounded_up_to_what_is_needed(bundle: Bundle) -> None:
    *_, smallest = ever_tighter(bundle, replace(SETTINGS, batch=1))
    with pytest.raises(BudgetError) as caught:
        plan(bundle, smallest.expected_peak_bytes - 1, replace(SETTINGS, batch=1))
    needed, _, budget, *_ = map(int, re.findall(r"(\d+) ?MiB", re.sub(r"\((\d+) of", r"(\1 MiB of", str(caught.value))))
    assert budget < needed


def test_more_memory_never_gives_less(bundle: Bundle) -> None:
    # A step takes more than compiling does, and several images are comfortable.
    bundle = replace(bundle, input=replace(bundle.input, size=304, resize=304))
    smallest = plan(bundle, None, replace(SETTINGS, batch=1)).expected_peak_bytes
    plans = []
    for extra in (-1, *range(0, 64, 4), 200):
        try:
            plans.append(plan(bundle, smallest + extra * MIB))
        except BudgetError:
            assert not plans  # too little comes before enough
        else:
            assert plans[-1].expected_peak_bytes <= smallest + extra * MIB
    sizes = [p.micro_batch for p in plans]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) > 1
    assert plan(bundle, None).micro_batch == sizes[-1]


def test_micro_batches_grow_only_while_memory_stays_small(tmp_path: Path) -> None:
    assert plan(saved_tiny_bundle(tmp_path / "b"), None).micro_batch == 16  # 16x16 pixels: nothing


@pytest.mark.parametrize("batch", [1, 3, 6])
def test_a_micro_batch_is_never_larger_than_the_batch(tmp_path: Path, batch: int) -> None:
    found = plan(saved_tiny_bundle(tmp_path / "b"), None, replace(SETTINGS, batch=batch))
    assert batch / 2 < found.micro_batch <= batch


def test_batch_statistics_take_the_whole_batch_at_once_and_are_budgeted_so(bundle: Bundle) -> None:
    settings = replace(SETTINGS, statistics="batch", batch=6)
    found = plan(bundle, None, settings)
    assert found.micro_batch == 6
    budget = found.expected_peak_bytes - 1
    assert plan(bundle, budget, replace(settings, statistics="frozen")).micro_batch < 6
    *tight, smallest = ever_tighter(bundle, settings)
    assert {p.micro_batch for p in (*tight, smallest)} == {6}
    assert smallest.graph.spec.recompute
    with pytest.raises(BudgetError):
        plan(bundle, smallest.expected_peak_bytes - 1, settings)
    with pytest.raises(BudgetError, match="--memory-budget"):
        plan(bundle, 1, settings)


def test_a_single_worker_runs_more_small_images_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "COMFORTABLE_ALONE_BYTES", 2 * planner.COMFORTABLE_BYTES)
    small, settings = load_bundle("embedded"), replace(SETTINGS, batch=64)
    assert plan(small, None, settings).micro_batch == 2 * plan(small, None, settings, 2).micro_batch


@pytest.fixture
def embedded() -> Bundle:
    """The embedded backbone, in images large enough that learning takes more memory than compiling."""
    found = load_bundle("embedded")
    return replace(found, input=replace(found.input, size=384, resize=384))


def test_memory_that_is_short_is_made_up_for_with_time(embedded: Bundle) -> None:
    plans = ever_tighter(embedded, replace(SETTINGS, batch=1))
    forms = [(p.graph.spec.fast, p.graph.spec.recompute, p.settings.moment_bits) for p in plans]
    order = [(f["fast"], f["recompute"], bits) for bits in MOMENT_BITS for f in FORMS if not f["inside"]]
    assert forms == [form for form in order if form in forms]  # what costs least time first
    assert forms[0] == (True, False, 32)
    assert forms[-1] == (True, True, 8)  # its stem is one product in any form
    assert {bits for _, _, bits in forms} == set(MOMENT_BITS)
    assert {p.forward.path for p in plans} == {plans[0].forward.path}  # judging keeps nothing anyway


@pytest.mark.parametrize(
    ("threads", "batch", "expected"), [(1, 16, 1), (2, 16, 2), (4, 16, 4), (6, 16, 6), (4, 3, 3), (4, 1, 1), (5, 4, 4)]
)
def test_each_thread_has_a_micro_batch_where_there_are_enough(
    bundle: Bundle, threads: int, batch: int, expected: int
) -> None:
    found = plan(bundle, None, replace(SETTINGS, batch=batch), threads)
    assert found.engine.workers == expected
    assert found.engine.workers * found.micro_batch <= batch


@pytest.mark.parametrize(("threads", "batch", "expected"), [(4, 16, FLOATS), (4, 3, STANDARD), (1, 1, FLOATS)])
def test_products_of_one_thread_are_not_for_a_run_that_has_several(
    bundle: Bundle, threads: int, batch: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if native.operators is None:
        pytest.skip("installed without a C compiler")
    monkeypatch.setattr(native, "multiplies_faster", lambda: True)
    found = plan(bundle, None, replace(SETTINGS, batch=batch), threads)
    assert found.choices["products"] == found.forward.spec.products == expected
    again = make_plan(bundle, 4, found.settings, threads=threads, budget_bytes=None, before=found.choices)
    assert again.choices == found.choices


def test_batch_statistics_know_one_run_alone(bundle: Bundle) -> None:
    assert plan(bundle, None, replace(SETTINGS, statistics="batch"), threads=4).engine.workers == 1


def test_a_budget_that_is_short_of_memory_for_workers_has_fewer(embedded: Bundle) -> None:
    plans = ever_tighter(embedded, replace(SETTINGS, batch=4), threads=4)
    counts = [p.engine.workers for p in plans if p.settings.moment_bits == 32]
    assert counts == sorted(counts, reverse=True)
    assert set(counts) == {4, 3, 2, 1}
    one, several = plans[-1], plans[0]
    assert several.activation_bytes > 3 * one.activation_bytes


def test_a_training_whose_workers_no_longer_fit_says_what_can_be_done(bundle: Bundle) -> None:
    begun = plan(bundle, None, threads=4)
    with pytest.raises(BudgetError, match="or start anew, without --resume") as caught:
        make_plan(bundle, 4, SETTINGS, threads=4, budget_bytes=64 * MIB, before=begun.choices)
    assert "--layers" not in str(caught.value)
    assert f"for the activations of {4 * begun.micro_batch})" in str(caught.value)


def test_a_head_alone_has_no_moments_to_keep_in_few_bits(bundle: Bundle) -> None:
    plans = ever_tighter(bundle, replace(SETTINGS, batch=1, method="head"))
    assert {p.settings.moment_bits for p in plans} == {32}


def test_moments_of_fewer_bits_than_a_training_began_with_are_refused(bundle: Bundle) -> None:
    before = plan(bundle, None).choices
    with pytest.raises(UsageError, match="leave out --moment-bits"):
        make_plan(bundle, 4, replace(SETTINGS, moment_bits=8), threads=1, budget_bytes=None, before=before)


def test_activations_in_half_precision_make_room_for_workers_and_are_never_a_plans_own_idea(embedded: Bundle) -> None:
    settings = replace(SETTINGS, batch=4)
    half = replace(settings, activation_bits=16)
    assert not any(p.graph.spec.half for p in ever_tighter(embedded, settings, threads=4))
    four = plan(embedded, None, half, threads=4)
    assert four.engine.workers == plan(embedded, four.expected_peak_bytes, half, threads=4).engine.workers == 4
    assert plan(embedded, four.expected_peak_bytes, settings, threads=4).engine.workers < 4


def test_a_training_that_is_gone_on_with_keeps_to_how_it_computes(bundle: Bundle) -> None:
    settings = replace(SETTINGS, batch=1)
    for before in ever_tighter(bundle, settings):
        found = make_plan(bundle, 4, settings, threads=1, budget_bytes=None, before=before.choices)
        assert found.choices == before.choices


def test_what_learns_less_needs_less(bundle: Bundle) -> None:
    peaks = [
        plan(bundle, None, replace(SETTINGS, batch=1, method=m)).expected_peak_bytes for m in ("head", "norm", "ksm")
    ]
    assert peaks == sorted(peaks)
    assert peaks[0] < peaks[1]


def test_smaller_images_need_less_where_those_that_are_judged_are_no_larger(bundle: Bundle) -> None:
    always = replace(SETTINGS, batch=1, whole_at=1.0)
    whole, small = (plan(bundle, None, replace(always, train_scale=scale)) for scale in (1.0, 0.5))
    assert (small.graph.spec.size, small.forward.spec.size) == (256, 512)
    assert small.expected_peak_bytes < whole.expected_peak_bytes
    # What judges is the larger one at some scale, and then decides.
    tiny = plan(bundle, None, replace(always, train_scale=0.05))
    judging = activation_bytes(tiny.forward)
    assert judging > activation_bytes(tiny.graph)
    assert tiny.expected_peak_bytes > PROCESS_BYTES + judging


def test_whole_images_at_the_end_need_what_they_do_all_along(bundle: Bundle) -> None:
    whole, small = (plan(bundle, None, replace(SETTINGS, batch=1, train_scale=scale)) for scale in (1.0, 0.5))
    assert [each.graph.spec.size for each in small.stages] == [256, 512]
    assert small.expected_peak_bytes == whole.expected_peak_bytes
    assert small.activation_bytes == whole.activation_bytes


@pytest.mark.parametrize("changes", [{}, {"views": 2, "layers": "dw.."}], ids=str)
def test_all_sizes_run_as_many_images_at_once_as_whole_ones(bundle: Bundle, changes: dict[str, Any]) -> None:
    whole, small = (plan(bundle, None, replace(SETTINGS, train_scale=scale, **changes)) for scale in (1.0, 0.5))
    assert small.micro_batch == whole.micro_batch
    assert small.expected_peak_bytes == whole.expected_peak_bytes


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "--train-scale 0.7 --whole-at 1, a smaller --size"),
        ({"train_scale": 0.5}, "first ones out, --whole-at 1, a smaller --size"),
        ({"train_scale": 0.5, "whole_at": 1.0}, "first ones out, a smaller --size"),
    ],
)
def test_what_would_do_with_less_is_said_of_what_takes_most(bundle: Bundle, changes: dict[str, Any], said: str) -> None:
    settings = replace(SETTINGS, **changes)
    size = 256 if settings.whole_at == 1 else 512
    with pytest.raises(BudgetError, match=f"at {size}x{size} px.*{said}"):
        plan(bundle, 8 * MIB, settings)


def test_an_engine_of_its_own_judges_in_whole_images_too(bundle: Bundle) -> None:
    found = _unmeasured_plan(bundle, 4, replace(SETTINGS, train_scale=0.5), Engine("pytorch", 1))
    assert (found.graph.spec.size, found.forward.spec.size) == (256, 512)


def test_images_are_opened_in_a_training_without_views(bundle: Bundle) -> None:
    """Whatever else runs beside it."""
    trained = replace(SETTINGS, batch=1, train_scale=0.9)
    beside = plan(bundle, None, trained)
    alone = expected_peak_bytes(bundle, 4, trained, 1, beside.graph)
    assert beside.expected_peak_bytes >= alone


def test_parameters_are_counted_with_their_scores_and_moments(bundle: Bundle) -> None:
    forms = plan(bundle, None).graph.forms
    count = {
        g: parameter_bytes(bundle, 4, replace(SETTINGS, granularity=g), forms) for g in ("channel", "kernel", "element")
    }
    assert count["channel"] < count["kernel"] < count["element"]
    weights = sum(O * I * kh * kw for O, I, kh, kw in (layer.weight_shape for layer in LAYERS))
    kernels = sum(O * I for O, I, _, _ in (layer.weight_shape for layer in LAYERS))
    assert count["element"] - count["kernel"] == 4 * 3 * (weights - kernels)
    compact = parameter_bytes(bundle, 4, replace(SETTINGS, moment_bits=8), forms)
    assert count["kernel"] - compact == 2 * 3 * kernels


# The cache behind a plan.


def test_backbones_of_equal_weights_and_other_graphs_have_graphs_of_their_own(tmp_path: Path) -> None:
    """The backbone digest is over weights alone, and not over where the features end or what stands between layers."""
    import onnx

    bundle = saved_tiny_bundle(tmp_path / "b")
    other = replace(bundle, path=tmp_path / "other")
    other.path.mkdir()
    model = onnx.load(bundle.graph_path, load_external_data=False)
    relu = next(node for node in model.graph.node if node.op_type == "Relu")
    relu.op_type = "Sigmoid"
    other.graph_path.write_bytes(model.SerializeToString())
    from ksm_edge.runtimes.cache import key_of

    assert key_of(bundle) != key_of(other)


def test_an_operator_without_a_rule_comes_out_of_the_compiling_process_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tiny

    from ksm_edge.bundle.freeze import Frozen
    from ksm_edge.bundle.load import load_bundle
    from ksm_edge.bundle.write import write_bundle

    model = tiny.tiny_graph()
    relu = next(node for node in model.graph.node if node.op_type == "Relu")
    relu.op_type, relu.name = "Softplus", "soft"
    frozen = Frozen(model, LAYERS, tiny.tiny_weights(), tiny.FEATURES)
    write_bundle(frozen, tmp_path / "b", recipe="odd", licence="CC0-1.0", input_contract=tiny.INPUT)
    with pytest.raises(UnsupportedError, match=r"^operator Softplus \(node soft\) has no gradient rule"):
        plan(load_bundle(tmp_path / "b"), None)


@pytest.mark.parametrize(
    ("changes", "share"),
    [
        ({"amplify": False}, 1 / 8),
        ({"amplify": True}, 1 / 4),
        ({"amplify": False, "score_rate": 1e-5}, 1 / 8),
        ({"amplify": True, "score_rate": 4e-4}, 1 / 2),
        ({"amplify": True, "score_rate": 1e-2}, MOST_APART),
        ({"amplify": False, "scaled_rates": True}, MOST_APART),  # few layers: ten times the rate
    ],
    ids=str,
)
def test_the_faster_scores_move_the_more_of_them_are_expected_apart(
    bundle: Bundle, changes: dict[str, Any], share: float
) -> None:
    settings = replace(SETTINGS, **{"scaled_rates": False, **changes})
    assert apart_share(bundle, 1000, 4, settings) == pytest.approx(share)


def test_kernels_that_are_expected_apart_take_memory_when_packed(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(footprint, "PACKING_BYTES", MIB)  # or a step of so small a network would take more
    usual = replace(SETTINGS, granularity="element", scaled_rates=False, amplify=False)
    before, after = plan(bundle, None, usual), plan(bundle, None, replace(usual, amplify=True))
    more = after.expected_peak_bytes - before.expected_peak_bytes
    assert more == pytest.approx(MIB * APART_SHARE * score_count(bundle, usual), abs=1)
