"""Forms are measured once, taken only where they are faster and fit, and kept to by a training that is gone on with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import saved_tiny_bundle

from ksm_edge import native
from ksm_edge.bundle.layers import Bundle
from ksm_edge.bundle.load import load_bundle
from ksm_edge.errors import UsageError
from ksm_edge.runtimes import cache
from ksm_edge.training import planner, tuning
from ksm_edge.training.planner import Plan, make_plan
from ksm_edge.training.settings import Settings
from ksm_edge.training.trainer import gradient_spec
from ksm_edge.training.tuning import ALTERNATIVES, USUAL, Tuned, measure, measured

SETTINGS = Settings(batch=4)
LARGER, STANDARD = "larger convs by tiles", "standard operators"


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    monkeypatch.setenv("KSM_EDGE_CACHE", str(tmp_path / "cache"))
    return saved_tiny_bundle(tmp_path / "bundle")


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
    assert found.form == ALTERNATIVES.get(name, {})
    assert found.share == ms[name] / 100


@pytest.mark.skipif(native.operators is None, reason="installed without a C compiler")
@pytest.mark.parametrize(
    ("forms", "changes", "others"),
    [
        (["channel", "pointwise"], {}, {STANDARD, "no 1x1 convs along with depthwise ones"}),
        (["winograd", "taps"], {}, {STANDARD, "no convs by tiles", LARGER}),
        (["taps"], {}, {STANDARD, LARGER}),
        (["taps"], {"granularity": "element"}, {STANDARD}),
        (["taps"], {"statistics": "batch"}, {STANDARD}),
        ([], {"method": "head"}, set()),
    ],
    ids=str,
)
def test_only_what_may_differ_is_measured(
    forms: list[str], changes: dict[str, str], others: set[str], bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SETTINGS, **changes)
    usual = gradient_spec(bundle, 3, settings, 1)

    def uncompiled(bundle: Bundle, spec: object) -> object:
        return type("Graph", (), {"forms": dict(zip(sorted(usual.trained), forms, strict=False)), "spec": spec})

    monkeypatch.setattr(tuning, "compiled", uncompiled)
    monkeypatch.setattr(tuning, "_run_ms", lambda bundle, graph, settings: 50.0 if graph.spec == usual else 60.0)
    found = measure(bundle, 3, settings, 1)
    assert found.ms.keys() == {USUAL, *others}
    assert found.name == USUAL


def test_without_a_compiler_there_is_nothing_to_choose_from(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "operators", None)
    assert measure(bundle, 4, SETTINGS, 1).ms.keys() == {USUAL}


def test_it_is_measured_once_for_all_trainings_of_the_same_graphs(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = measured(bundle, 4, SETTINGS, 1)
    assert all(ms > 0 for ms in first.ms.values())

    def again(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(cache, "make_in_child", again)
    assert measured(bundle, 4, SETTINGS, 1) == first
    assert measured(bundle, 4, replace(SETTINGS, seed=3, epochs=30), 1) == first
    with pytest.raises(AssertionError, match="again"):
        measured(bundle, 5, SETTINGS, 1)


@pytest.mark.parametrize("left", ["", "{}", '{"name": "a", "ms": {}}', '{"name": "a", "ms": {"a": 1.0}}'])
def test_half_a_measurement_is_made_again(bundle: Bundle, left: str, tmp_path: Path) -> None:
    measured(bundle, 4, SETTINGS, 1)
    (path,) = (p for p in tmp_path.rglob(cache.DESCRIPTION) if "ms" in json.loads(p.read_text()))
    path.write_text(left)
    assert USUAL in measured(bundle, 4, SETTINGS, 1).ms


def plan(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, *, name: str = STANDARD, budget: int | None = None) -> Plan:
    """With forms that are said to have been measured."""
    monkeypatch.setattr(planner, "measured", lambda *given: Tuned(name, {USUAL: 2.0, name: 1.0}))
    return make_plan(bundle, 4, SETTINGS, threads=1, budget_bytes=budget, tune=True)


def usual_plan(bundle: Bundle) -> Plan:
    return make_plan(bundle, 4, SETTINGS, threads=1, budget_bytes=None)


@pytest.mark.skipif(native.operators is None, reason="installed without a C compiler")
def test_a_plan_takes_what_was_measured_and_a_training_keeps_to_it(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, tuned = usual_plan(bundle).choices, plan(bundle, monkeypatch)
    assert tuned.choices == {**usual, "own": False}
    assert tuned.tuned is not None
    monkeypatch.setattr(planner, "measured", None)  # not asked again
    for tune in (False, True):
        again = make_plan(bundle, 4, SETTINGS, threads=1, budget_bytes=None, before=tuned.choices, tune=tune)
        assert again.choices == tuned.choices


@pytest.mark.skipif(native.operators is None, reason="installed without a C compiler")
def test_what_does_not_fit_is_not_taken_however_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    embedded, name = load_bundle("embedded"), "no 1x1 convs along with depthwise ones"
    bundle = replace(embedded, input=replace(embedded.input, size=256, resize=256))
    usual, fastest = usual_plan(bundle), plan(bundle, monkeypatch, name=name)
    assert fastest.expected_peak_bytes is not None
    assert usual.expected_peak_bytes is not None
    assert fastest.expected_peak_bytes > usual.expected_peak_bytes
    assert plan(bundle, monkeypatch, name=name, budget=fastest.expected_peak_bytes - 1).choices == usual.choices


def test_a_training_that_needs_the_operators_says_so_where_there_are_none(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {**usual_plan(bundle).choices, "own": True}
    monkeypatch.setattr(native, "operators", None)
    with pytest.raises(UsageError, match="begun with operators in C, which this installation lacks"):
        make_plan(bundle, 4, SETTINGS, threads=1, budget_bytes=None, before=before)
