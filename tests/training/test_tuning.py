"""Forms are measured once, taken only where they are faster and fit, and kept to by a training that is gone on with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import saved_tiny_bundle

from ksm_edge import native
from ksm_edge.autodiff import spec
from ksm_edge.bundle.layers import Bundle
from ksm_edge.bundle.load import load_bundle
from ksm_edge.errors import UsageError
from ksm_edge.runtimes import cache
from ksm_edge.runtimes.compile import CompiledGraph, compiled
from ksm_edge.runtimes.engine import Engine
from ksm_edge.training import planner, tuning
from ksm_edge.training.planner import Plan, make_plan
from ksm_edge.training.settings import Settings
from ksm_edge.training.trainer import gradient_spec
from ksm_edge.training.tuning import ALTERNATIVES, USUAL, Tuned, forms_that_may_differ, measured

SETTINGS = Settings(batch=4)
LARGER, STANDARD, APART = "larger convs by tiles", "standard operators", "no 1x1 convs along with depthwise ones"
PRODUCTS = {spec.FLOATS: "standard products", spec.STANDARD: "this project's products"}
MIB = 2**20

needs_operators = pytest.mark.skipif(native.operators is None, reason="installed without a C compiler")


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    monkeypatch.setenv("KSM_EDGE_CACHE", str(tmp_path / "cache"))
    return saved_tiny_bundle(tmp_path / "bundle")


def graphs(bundle: Bundle, classes: int = 4, settings: Settings = SETTINGS) -> dict[str, CompiledGraph]:
    """The usual one, and all that may be another."""
    usual = compiled(bundle, gradient_spec(bundle, classes, settings, 1))
    return {n: compiled(bundle, replace(usual.spec, **form)) for n, form in forms_that_may_differ(usual).items()}


@pytest.mark.parametrize(
    ("ms", "name"),
    [
        ({USUAL: 100.0}, USUAL),
        ({USUAL: 100.0, STANDARD: 200.0}, USUAL),
        ({USUAL: 100.0, STANDARD: 99.0}, USUAL),  # less than a measurement errs
        ({USUAL: 100.0, STANDARD: 96.0}, STANDARD),
        ({USUAL: 100.0, STANDARD: 90.0, LARGER: 80.0}, LARGER),
    ],
)
def test_the_usual_forms_stay_unless_others_are_clearly_faster(ms: dict[str, float], name: str) -> None:
    found = Tuned.of(ms)
    assert found.name == name
    assert found.share == ms[name] / 100


@needs_operators
@pytest.mark.parametrize(
    ("changes", "others"),
    [
        ({}, {*ALTERNATIVES} - {*PRODUCTS.values()}),
        ({"statistics": "batch"}, {STANDARD, APART}),  # never by tiles
        ({"method": "head"}, set()),
    ],
    ids=["default", "batch statistics", "head"],
)
def test_only_what_may_differ_is_looked_at(
    changes: dict[str, str], others: set[str], bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    for faster, other in ((True, PRODUCTS[spec.FLOATS]), (False, PRODUCTS[spec.STANDARD])):
        monkeypatch.setattr(native, "multiplies_faster", lambda faster=faster: faster)
        expected = {USUAL, *others, *([] if changes else [other])}
        assert graphs(bundle, settings=replace(SETTINGS, **changes)).keys() == expected


@needs_operators
def test_halves_that_were_asked_for_stay(bundle: Bundle) -> None:
    usual = compiled(bundle, replace(gradient_spec(bundle, 4, SETTINGS, 1), products=spec.HALVES))
    for form in forms_that_may_differ(usual).values():
        assert replace(usual.spec, **form).products == spec.HALVES
        assert replace(usual.spec, **form).own


def test_an_update_is_timed_behind_what_it_uses_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "SECONDS", 0)
    calls: list[str] = []
    found = tuning._fastest(lambda: calls.append("accumulate"), lambda: calls.append("update"))
    assert calls == ["accumulate", "update"] * (1 + tuning.RUNS)
    assert len(found) == 2
    assert all(ms > 0 for ms in found)


@needs_operators
def test_only_graphs_that_do_differ_are_measured(bundle: Bundle) -> None:
    """At 16 pixels nothing is done by tiles, nor is a 1x1 conv done along with another."""
    found = measured(bundle, SETTINGS, Engine(), graphs(bundle))
    assert found.ms.keys() == {USUAL, STANDARD, PRODUCTS[graphs(bundle)[USUAL].spec.products]}
    assert all(ms > 0 for ms in found.ms.values())


def test_where_there_is_nothing_to_choose_from_nothing_is_measured(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = {USUAL: graphs(bundle)[USUAL]}
    monkeypatch.setattr(cache, "make_in_child", None)
    for given in (
        alone,
        {},
        {STANDARD: alone[USUAL]},
    ):  # the last: of the usual forms there is no memory for a measurement
        assert measured(bundle, SETTINGS, Engine(), given).name == USUAL


@needs_operators
def test_it_is_measured_once_for_all_trainings_whose_steps_take_as_long(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = measured(bundle, SETTINGS, Engine(), graphs(bundle))
    of_more_classes = graphs(bundle, classes=7)

    def again(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(cache, "make_in_child", again)
    assert measured(bundle, SETTINGS, Engine(), graphs(bundle)) == first
    assert measured(bundle, replace(SETTINGS, seed=3, epochs=30), Engine(), of_more_classes) == first
    for settings, engine in ((SETTINGS, Engine(threads=2)), (replace(SETTINGS, batch=8), Engine())):
        with pytest.raises(AssertionError, match="again"):
            measured(bundle, settings, engine, graphs(bundle))


@needs_operators
def test_half_a_measurement_is_made_again(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forms = graphs(bundle)
    whole = measured(bundle, SETTINGS, Engine(), forms)
    (path,) = (p for p in tmp_path.rglob(cache.DESCRIPTION) if "ms" in json.loads(p.read_text()))
    good, made = path.read_text(), []

    def again(module: str, bundle: Bundle, folder: Path, words: str) -> None:
        made.append(module)
        (folder / cache.DESCRIPTION).write_text(good)

    monkeypatch.setattr(cache, "make_in_child", again)
    for left in ("", "{}", '{"name": "a", "ms": {}}', '{"name": "a", "ms": {"a": 1.0}}'):
        path.write_text(left)
        assert measured(bundle, SETTINGS, Engine(), forms) == whole
        assert len(made) == 1, left
        made.clear()


def plan(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, *, name: str = STANDARD, budget: int | None = None) -> Plan:
    """With forms that are said to have been measured as the fastest, if they may be measured at all."""

    def as_said(bundle: Bundle, settings: Settings, engine: Engine, graphs: Mapping[str, CompiledGraph]) -> Tuned:
        return Tuned(name if name in graphs else USUAL, {n: 1.0 if n == name else 2.0 for n in (USUAL, *graphs)})

    monkeypatch.setattr(planner, "measured", as_said)
    monkeypatch.setattr(planner, "rss_bytes", lambda: 10 * MIB)
    return make_plan(bundle, 4, SETTINGS, threads=1, budget_bytes=budget, tune=True)


def usual_plan(bundle: Bundle) -> Plan:
    return make_plan(bundle, 4, SETTINGS, threads=1, budget_bytes=None)


@needs_operators
def test_a_plan_takes_what_was_measured_and_a_training_keeps_to_it(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, tuned = usual_plan(bundle).choices, plan(bundle, monkeypatch)
    assert tuned.choices == {**usual, "own": False, "products": spec.STANDARD}
    assert tuned.tuned is not None
    monkeypatch.setattr(planner, "measured", None)  # not asked again
    for tune in (False, True):
        again = make_plan(bundle, 4, SETTINGS, threads=1, budget_bytes=None, before=tuned.choices, tune=tune)
        assert again.choices == tuned.choices


@needs_operators
def test_what_does_not_fit_beside_this_process_is_not_even_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    embedded = load_bundle("embedded")
    bundle = replace(embedded, input=replace(embedded.input, size=256, resize=256))
    usual, fastest = usual_plan(bundle), plan(bundle, monkeypatch, name=APART)
    assert fastest.expected_peak_bytes is not None
    assert usual.expected_peak_bytes is not None
    assert fastest.expected_peak_bytes > usual.expected_peak_bytes
    enough = fastest.expected_peak_bytes + 10 * MIB
    assert plan(bundle, monkeypatch, name=APART, budget=enough).choices == fastest.choices
    assert plan(bundle, monkeypatch, name=APART, budget=enough - 1).choices == usual.choices
    short = plan(bundle, monkeypatch, name=APART, budget=usual.expected_peak_bytes)
    assert short.choices == usual.choices
    assert short.tuned is not None
    assert APART not in short.tuned.ms


def test_a_training_that_needs_the_operators_says_so_where_there_are_none(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {**usual_plan(bundle).choices, "own": True}
    monkeypatch.setattr(native, "operators", None)
    with pytest.raises(UsageError, match="begun with operators in C, which this installation lacks"):
        make_plan(bundle, 4, SETTINGS, threads=1, budget_bytes=None, before=before)


def test_a_training_in_forms_that_these_settings_do_not_need_is_gone_on_with(bundle: Bundle) -> None:
    """What else differs is for whoever reads the checkpoint to say."""
    before = {**usual_plan(bundle).choices, "fast": False}
    settings = replace(SETTINGS, method="head")
    found = make_plan(bundle, 4, settings, threads=1, budget_bytes=None, before=before)
    assert found.choices == before
