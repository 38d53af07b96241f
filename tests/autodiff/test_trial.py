"""Operators that a compiler made wrong are found before they are learned with, and left out."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import mistakes
import numpy as np
import onnx
import pytest

from ksm_edge import native
from ksm_edge.autodiff.graph import OWN
from ksm_edge.autodiff.spec import FLOATS, HALVES, STANDARD
from ksm_edge.autodiff.trial_networks import NAMES, example
from ksm_edge.bundle.layers import Bundle
from ksm_edge.bundle.load import load_bundle
from ksm_edge.errors import BudgetError, KsmEdgeError, UsageError
from ksm_edge.runtimes import cache, trial
from ksm_edge.runtimes.trial import HALF_LIMIT, LIMIT, Trial, trusted, trusted_if_known
from ksm_edge.training.planner import Plan, make_plan
from ksm_edge.training.settings import Settings
from ksm_edge.training.trainer import gradient_spec

pytestmark = pytest.mark.skipif(native.operators is None, reason="installed without a C compiler")

RIGHT, WRONG, WRONG_IN_HALF = Trial(1e-6, 0.005), Trial(0.3, 0.3), Trial(1e-6, 0.3)
FAILED = Trial(None, None)
PACKAGE = Path(native.__file__).parent


@pytest.fixture(scope="module")
def embedded() -> Bundle:
    return load_bundle("embedded")


@pytest.fixture
def _nothing_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KSM_EDGE_CACHE", str(tmp_path / "cache"))


def tried(folder: Path) -> Trial:
    """In this process, products in half precision too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "halves", lambda: "plain")
        trial.build_into(folder)
        trial.try_into(folder)
    return trial._read(folder)


def test_every_operator_is_tried() -> None:
    examples = [example(name, own=True, products=precision) for name in NAMES for precision in (FLOATS, HALVES)]
    graphs = [onnx.load_from_string(each.model).graph for each in examples]
    found = {node.op_type for graph in graphs for node in graph.node if node.domain == OWN}
    assert found == set(re.findall(r'= OPERATOR\("(\w+)"', (PACKAGE / "_operators.c").read_text()))


@pytest.mark.parametrize("name", NAMES)
def test_every_graph_is_given_the_same_numbers_for_the_same_outputs(name: str) -> None:
    plain, *others = (
        example(name, own=own, products=precision)
        for own, precision in ((False, STANDARD), (True, FLOATS), (True, HALVES))
    )
    assert not any(node.domain == OWN for node in onnx.load_from_string(plain.model).graph.node)
    for other in others:
        assert set(other.outputs) == set(plain.outputs)
        for shared in plain.inputs.keys() & other.inputs.keys():
            assert np.array_equal(plain.inputs[shared], other.inputs[shared])


@pytest.mark.parametrize("name", NAMES)
def test_hardly_any_number_says_nothing(name: str) -> None:
    """A clip that lets nothing through hides what stands in front of it, and behind."""
    given = example(name, own=False)
    for output, values in trial._outputs(given).items():
        if f"acc:{output}" in given.inputs:
            assert np.mean(values == given.inputs[f"acc:{output}"]) < 1 / 8, output


def test_operators_that_are_right_pass_by_far(loops: str, tmp_path: Path) -> None:
    found = tried(tmp_path)
    assert found.error is not None
    assert found.half_error is not None
    assert 0 < found.error < LIMIT / 10, loops
    assert 0 < found.half_error < HALF_LIMIT / 4, loops


# By what goes wrong: the file, what is there, and what a compiler might have made of it.
MISTAKES = {
    "a lane of a register": (
        "_winograd.h",
        "store_some(c->product + i, total, count);",
        "total[1] = 0; store_some(c->product + i, total, count);",
    ),
    "what was there before": ("_winograd.h", "total = load_some(c->before + i, count);", "total = {0};"),
    "the second image": ("_windows.h", "f->x + (image * s->channels + channel)", "f->x + (0 * image + channel)"),
    "the last pixel of a sum": ("_rows.h", "lanes[0] += load_some(row + i, count - i);", ";"),
    "one tap of two": (
        "_rows.h",
        "case 2: weighted(row, taps->offset, weight, 2, start, count, out)",
        "case 2: weighted(row, taps->offset, weight, 1, start, count, out)",
    ),
    "a pixel behind the last whole register": (
        "_depthwise.h", "total += dz[c * count + i] * x[k * pixels + i];", ";"
    ),
    "rows that two parts read": ("_depthwise.h", "i >= own && i < own_end ? total : 0", "total"),
    "a row of the part before": ("_depthwise.h", "before / down + 1, own", "before / down + 2, own"),
    "a number behind the last register": ("_rows.h", "met_total += met ? met[i] * given : 0;", ";"),
    "the second register of two": (
        "_rows.h", "met_totals[0][j] + met_totals[1][j];", "met_totals[0][j];"
    ),
    "the end of a row": ("_rows.h", "store(to + width - LANES, load(from + width - LANES));", ";"),
    "a column without another": ("_depthwise.h", "to[end] = plane[d->W - 1];", ";"),
    "one tap of the second row": ("_rows.h", "if (k >= 3)", "if (k > 3)"),
    "terms of the left side": ("_products.h", "left += along, right += PANEL", "right += PANEL"),
    "what a product is added to": ("_products.h", "(Sums)load(t->from + i * t->from_pitch + r * LANES)", "(Sums){0}"),
    "a tile that is not whole": ("_products.h", "t.from = tile;", "memset(tile, 0, sizeof tile);"),
    "a column that is alone": (
        "_products.h", "product(left + i * part->down, right, part->words)", "product(left, right, part->words)"
    ),
    "a column of a left side that is turned": (
        "_products.h", "load_some(left + r * LANES, rows - r * LANES);", "load_some(left, rows - r * LANES);"
    ),
    "what a turned result is added to": ("_products.h", "before + turned[j * p->rows + i]", "turned[j * p->rows + i]"),
    "the order of words": ("_words.h", "(LANES + l) / 2 + l % 2 * LANES", "(LANES + l) / 2 + 1 % 2 * LANES"),
    "some channels": ("_depthwise.h", "w.shift[c] = shift[first + c];", "w.shift[c] = shift[first + c / 2];"),
}  # fmt: skip
MISTAKES_IN_HALF = {
    "a pair of terms": (
        "_halves.h", "+ (Sums)(all & high) * (Sums)(each & high)", ""
    ),
    "the second of a row's": (
        "_halves.h", "PICKED(odd, first, second, 2 * l + 1)", "PICKED(odd, first, second, 2 * l)"
    ),
}  # fmt: skip


@pytest.fixture
def compiled_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, str], None]:
    """Makes the operators anew, for every processor alike, with one text in place of another in a file."""

    def make(name: str, text: str, other: str) -> None:
        library = mistakes.compiled(["_operators.c", "_halves_plain.c"], tmp_path, name, text, other)
        monkeypatch.setattr(native, "operators", str(library))

    return make


@pytest.mark.parametrize("mistake", MISTAKES)
def test_operators_that_are_wrong_do_not(
    mistake: str, compiled_with: Callable[[str, str, str], None], tmp_path: Path
) -> None:
    compiled_with(*MISTAKES[mistake])
    found = tried(tmp_path)
    assert found.error is not None
    assert found.error > 10 * LIMIT
    assert not found.is_passed


@pytest.mark.parametrize("mistake", MISTAKES_IN_HALF)
def test_products_in_half_precision_that_are_wrong_do_not(
    mistake: str, compiled_with: Callable[[str, str, str], None], tmp_path: Path
) -> None:
    compiled_with(*MISTAKES_IN_HALF[mistake])
    found = tried(tmp_path)
    assert found.is_passed
    assert found.half_error is not None
    assert found.half_error > 3 * HALF_LIMIT


def test_what_is_made_again_without_a_mistake_passes(
    compiled_with: Callable[[str, str, str], None], tmp_path: Path
) -> None:
    compiled_with("_wider.h", "", "")
    assert tried(tmp_path).is_passed_in_half


def test_operators_that_refuse_have_failed(compiled_with: Callable[[str, str, str], None], tmp_path: Path) -> None:
    compiled_with("_operators.c", '= OPERATOR("Gate"', '= OPERATOR("Gates"')
    found = tried(tmp_path)
    assert (found.error, found.half_error) == (None, None)
    assert "Gate" in str(found)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_number_that_is_none_is_not_lost_among_others(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    right = [{"a": np.ones(3), "b": np.ones(2)} for _ in NAMES]
    found = [{name: array.copy() for name, array in each.items()} for each in right]
    found[place]["a"][1] = np.nan
    monkeypatch.setattr(trial, "_outputs", lambda number: found[number])
    error, _ = trial._judged([0, 1, 2], right)  # type: ignore[list-item]
    assert error is not None
    assert np.isnan(error)


def test_only_a_number_that_is_small_passes() -> None:
    nan = float("nan")
    assert not Trial(nan, 0.0).is_passed
    assert not Trial(0.0, nan).is_passed_in_half
    assert not Trial(0.0, None).is_passed_in_half
    assert not Trial(1.0, 0.0).is_passed_in_half
    assert Trial(0.0, nan).is_passed


@pytest.mark.usefixtures("_nothing_known")
def test_they_are_tried_once_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    first = trial.trial()
    assert first.is_passed
    assert [path.name for path in cache.cache_folder().glob("graphs/*/*")] == [cache.DESCRIPTION]
    monkeypatch.setattr(cache, "child", None)
    assert trial.trial() == first


def test_who_runs_them_has_no_onnx_in_its_memory(tmp_path: Path) -> None:
    """With it, and the parent beside, there would be more than compiling takes."""
    trial.build_into(tmp_path)
    code = (
        "import sys; from ksm_edge.runtimes import trial; status = trial._main(*sys.argv[1:]); "
        "sys.exit(status or 'onnx' in sys.modules)"
    )
    subprocess.run([trial.sys.executable, "-c", code, "try", str(tmp_path)], check=True)
    assert trial._read(tmp_path).is_passed


@pytest.mark.usefixtures("_nothing_known")
def test_others_are_tried_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial.trial()
    other = tmp_path / "other"
    other.write_bytes(b"compiled anew")
    monkeypatch.setattr(native, "operators", str(other))
    monkeypatch.setattr(trial, "_try_in_child", lambda folder: trial._write(WRONG, folder))
    assert trial.trial() == WRONG


def ending(monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    """Have the process that tries them end so where it first comes to one."""
    code = (
        "import os, signal, sys, time; from ksm_edge.runtimes import trial; "
        f"trial._difference = lambda *_: {end}; sys.exit(trial._main(*sys.argv[1:]))"
    )
    monkeypatch.setattr(
        "ksm_edge.runtimes.cache.module_command", lambda _, *words: [trial.sys.executable, "-c", code, *words]
    )


# By the system itself, also where a sanitizer would come between.
SEGFAULT = "(signal.signal(signal.SIGSEGV, signal.SIG_DFL), os.kill(os.getpid(), signal.SIGSEGV))"


@pytest.mark.usefixtures("_nothing_known")
@pytest.mark.parametrize(("end", "said"), [(SEGFAULT, "signal 11, Segmentation"), ("os.abort()", "signal 6, Aborted")])
def test_a_crash_is_a_trial_that_was_not_passed(end: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ending(monkeypatch, end)
    found = trial.trial()
    assert not found.is_passed
    assert str(found).startswith(f"trying them fails: the process was ended by {said}")
    monkeypatch.setattr(cache, "child", None)
    assert trial.trial() == found


@pytest.mark.usefixtures("_nothing_known")
def test_what_never_ends_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(_: str, step: str, folder: str, **__: object) -> subprocess.CompletedProcess[str]:
        if step == "build":
            return subprocess.CompletedProcess([], 0, "", "")
        trial._write(FAILED, Path(folder))
        raise subprocess.TimeoutExpired("tried", trial.SECONDS)

    monkeypatch.setattr(cache, "child", never)
    assert str(trial.trial()) == f"trying them fails: the process took more than {trial.SECONDS} s"


def test_a_child_is_waited_for_no_longer_than_asked() -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        cache.child("this", seconds=0.01)  # Python itself takes longer


@pytest.mark.usefixtures("_nothing_known")
def test_a_lack_of_memory_says_nothing_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    ending(monkeypatch, "(_ for _ in ()).throw(MemoryError('std::bad_alloc'))")
    with pytest.raises(KsmEdgeError, match=r"(?s)could not be tried: .*out of memory: std::bad_alloc"):
        trial.trial()


@pytest.mark.usefixtures("_nothing_known")
def test_what_crashes_in_half_precision_is_no_reason_against_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(_: str, step: str, folder: str, **__: object) -> subprocess.CompletedProcess[str]:
        if step == "try":
            trial._write(Trial(1e-6, None), Path(folder))
        return subprocess.CompletedProcess([], -signal.SIGILL if step == "try" else 0, "", "")

    monkeypatch.setattr(cache, "child", crash)
    assert trial.trial().is_passed
    assert not trial.trial().is_passed_in_half


@pytest.mark.usefixtures("_nothing_known")
@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "was ended by signal 9, Killed"),  # for memory, say
        ("sys.exit('no disk')", "ended with 1.*no disk"),
        ("sys.exit(3)", "ended with 3"),
    ],
)
def test_what_says_nothing_of_them_is_an_error_and_not_kept(
    end: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        ending(patch, end)
        with pytest.raises(KsmEdgeError, match=f"(?s)could not be tried: the process {said}"):
            trial.trial()
    assert trial.trial().is_passed


@pytest.mark.usefixtures("_nothing_known")
@pytest.mark.parametrize("status", [-signal.SIGSEGV, 1, None], ids=["crash", "error", "never"])
def test_graphs_that_cannot_be_built_say_nothing_of_them(status: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(_: str, step: str, *__: str, **___: object) -> subprocess.CompletedProcess[str]:
        assert step == "build"
        if status is None:
            raise subprocess.TimeoutExpired("built", trial.SECONDS)
        return subprocess.CompletedProcess([], status, "", "no disk")

    with monkeypatch.context() as patch:
        patch.setattr(cache, "child", build)
        with pytest.raises(KsmEdgeError, match="could not be tried: the process "):
            trial.trial()
    assert trial.known() is None


@pytest.mark.usefixtures("_nothing_known")
@pytest.mark.parametrize("left", ["", "{}", "[]", '{"error": 0.0}', '{"error": "small", "half_error": null}'])
def test_half_a_result_is_made_again(left: str) -> None:
    first = trial.trial()
    (description,) = cache.cache_folder().glob("graphs/*/graph.json")
    assert json.loads(description.read_text())["error"] == first.error
    description.write_text(left)
    assert trial.trial() == first


@pytest.mark.parametrize(
    ("found", "own", "passed"),
    [
        (RIGHT, True, {STANDARD, FLOATS, HALVES}),
        (WRONG, False, {STANDARD}),
        (FAILED, False, {STANDARD}),
        (WRONG_IN_HALF, True, {STANDARD, FLOATS}),
    ],
)
def test_only_what_passed_is_used(
    found: Trial, own: bool, passed: set[str], embedded: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "trial", lambda: found)
    for method, products in product(("ksm", "head"), (STANDARD, FLOATS, HALVES)):
        asked = replace(gradient_spec(embedded, 3, Settings(method=method), 1), products=products)
        assert asked.own
        answer = trusted(asked)
        if method == "head" and products == STANDARD:
            assert answer == asked  # has none
        else:
            assert answer == replace(asked, own=own, products=products if products in passed else STANDARD)


@pytest.mark.usefixtures("_nothing_known")
def test_what_is_known_is_told_without_trying(embedded: Bundle) -> None:
    asked = gradient_spec(embedded, 3, Settings(), 1)
    assert trusted_if_known(asked) is None
    trial.trial()
    assert trusted_if_known(asked) == asked


def test_what_needs_none_of_them_is_not_tried_for(embedded: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "trial", None)
    for spec in (
        gradient_spec(embedded, 3, Settings(method="head"), 1),
        replace(gradient_spec(embedded, 3, Settings(), 1), own=False),
    ):
        assert trusted(spec) == trusted_if_known(spec) == spec


def found_to_be(monkeypatch: pytest.MonkeyPatch, found: Trial) -> None:
    for name in ("trial", "known"):
        monkeypatch.setattr(trial, name, lambda: found)


def plan(bundle: Bundle, **more: object) -> Plan:
    return make_plan(bundle, 3, Settings(), threads=1, **{"budget_bytes": None, **more})  # type: ignore[arg-type]


def test_a_plan_is_made_without_them_and_says_why(embedded: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = plan(embedded)
    assert usual.graph.spec.own
    assert usual.distrusted is None
    found_to_be(monkeypatch, WRONG)
    without = plan(embedded)
    assert not without.graph.spec.own
    assert without.distrusted == WRONG
    with pytest.raises(UsageError, match=r"those of this installation are wrong, as gradients differ by 0\.3 of the"):
        plan(embedded, before=usual.choices)


@pytest.mark.usefixtures("_nothing_known")
def test_a_training_that_has_none_of_them_goes_on_without_a_trial(
    embedded: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        found_to_be(patch, WRONG)
        before = plan(embedded).choices
        assert plan(embedded, before=before).distrusted == WRONG
    monkeypatch.setattr(trial, "trial", None)
    gone_on_with = plan(embedded, before=before)
    assert gone_on_with.choices == before
    assert gone_on_with.distrusted is None  # as far as is known


@pytest.mark.usefixtures("_nothing_known")
@pytest.mark.parametrize("goes_on", [False, True])
def test_a_budget_is_refused_before_anything_is_tried(
    goes_on: bool, embedded: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"before": plan(embedded).choices} if goes_on else {}
    monkeypatch.setenv("KSM_EDGE_CACHE", str(cache.cache_folder() / "empty"))
    monkeypatch.setattr(trial, "trial", None)
    monkeypatch.setattr("ksm_edge.training.refusal.room_bytes", lambda: 60 << 20)
    with pytest.raises(BudgetError, match="compiling the graphs"):
        plan(embedded, budget_bytes=60 << 20, **more)
