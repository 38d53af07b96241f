"""Operators that a compiler made wrong are found before they are learned with, and left out."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sysconfig
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from whole_network import random_bundle

from ksm_edge import native
from ksm_edge.autodiff import own, products, trial_network, windows, winograd
from ksm_edge.autodiff.graph import OWN
from ksm_edge.bundle.load import load_bundle
from ksm_edge.errors import KsmEdgeError, UsageError
from ksm_edge.runtimes import cache, trial
from ksm_edge.runtimes.trial import CRASHED, HALF_LIMIT, LIMIT, Trial, tried, trusted
from ksm_edge.training.planner import make_plan
from ksm_edge.training.settings import Settings
from ksm_edge.training.trainer import gradient_spec

pytestmark = pytest.mark.skipif(native.operators is None, reason="installed without a C compiler")

RIGHT, WRONG, WRONG_IN_HALF = Trial(5e-5, 0.01), Trial(0.3, 0.3), Trial(5e-5, 0.3)
EVERY_OPERATOR = {
    *("Depthwise", "DepthwiseGradient", "Gate"),
    *(*own.WIDENED, *winograd.OPERATORS, *windows.OPERATORS, *products.OPERATORS),
}


def test_every_operator_is_tried() -> None:
    example = trial_network.example(trial_network.spec(own=True, half_products=True))
    found = {node.op_type for node in onnx.load_from_string(example.model).graph.node if node.domain == OWN}
    assert found == EVERY_OPERATOR


@pytest.mark.parametrize("asked", [{"own": False}, {"own": True}, {"own": True, "half_products": True}], ids=str)
def test_every_graph_gives_the_same_of_the_same_numbers(asked: dict[str, bool]) -> None:
    plain, other = (trial_network.example(trial_network.spec(**way)) for way in ({"own": False}, asked))
    assert set(other.outputs) == set(plain.outputs)
    for name in plain.inputs.keys() & other.inputs.keys():
        assert (plain.inputs[name] == other.inputs[name]).all()


def test_operators_that_are_right_pass_by_far(loops: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "halves", lambda: "plain")
    found = tried()
    assert found.is_passed, loops
    assert 0 < found.error < LIMIT / 10
    assert 0 < found.half_error < HALF_LIMIT / 3


# By file what is there, and what a compiler might have made of it.
MISTAKES = {
    "half of a register": (
        "_winograd.h", "store_some(c->product + i, total, count);", "store_some(c->product + i, total, count / 2);"
    ),
    "the first image twice": ("_windows.h", "f->x + (image * s->channels + channel)", "f->x + (0 * image + channel)"),
    "a pixel of many": ("_depthwise.h", "sums += sum(g->dz + at, count);", "sums += sum(g->dz + at, count - 1);"),
    "some channels": ("_depthwise.h", "w.shift[c] = shift[first + c];", "w.shift[c] = shift[first + c / 2];"),
    "a sum of several": ("_depthwise.h", "b->sums[channel] = (float)totals.sums;", "b->sums[channel] = 0;"),
}  # fmt: skip


@pytest.fixture
def compiled_with(tmp_path: Path) -> Callable[[str, str, str], str]:
    """Makes the operators anew, for every processor alike, with one text in place of another in a file."""
    if not shutil.which("cc"):
        pytest.skip("no C compiler here")
    package = Path(native.__file__).parent

    def make(name: str, text: str, other: str) -> str:
        for source in (package / "_operators.c", *package.glob("*.h")):
            shutil.copy(source, tmp_path)
        (tmp_path / "_wider.h").write_text("")
        source = tmp_path / name
        assert source.read_text().count(text) == 1
        source.write_text(source.read_text().replace(text, other))
        library = tmp_path / "operators.so"
        flags = ["-shared", "-fPIC", "-O1", "-Wno-psabi", f"-I{sysconfig.get_path('include')}"]
        subprocess.run(["cc", *flags, "-o", library, tmp_path / "_operators.c", "-lm"], check=True)
        return str(library)

    return make


@pytest.mark.parametrize("mistake", MISTAKES)
def test_operators_that_are_wrong_do_not(
    mistake: str, compiled_with: Callable[[str, str, str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "operators", compiled_with(*MISTAKES[mistake]))
    found = tried()
    assert found.error > 3 * LIMIT
    assert not found.is_passed


def test_what_is_made_again_without_a_mistake_passes(
    compiled_with: Callable[[str, str, str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "operators", compiled_with("_wider.h", "", ""))
    assert tried().is_passed


def test_a_number_that_is_none_does_not_pass() -> None:
    nan = float("nan")
    assert not Trial(nan, 0.0).is_passed
    assert not Trial(0.0, nan).is_passed_in_half
    assert Trial(0.0, nan).is_passed


@pytest.fixture
def _nothing_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KSM_EDGE_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("_nothing_known")
def test_they_are_tried_once_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    first = trial.trial()
    assert first.is_passed

    def again(*_: object) -> None:
        raise AssertionError("tried again")

    monkeypatch.setattr(cache, "child", again)
    assert trial.trial() == first


@pytest.mark.usefixtures("_nothing_known")
def test_others_are_tried_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial.trial()
    other = tmp_path / "other"
    other.write_bytes(b"compiled anew")
    monkeypatch.setattr(native, "operators", str(other))
    monkeypatch.setattr(trial, "_try_in_child", lambda folder: trial._write(WRONG, folder))
    assert trial.trial() == WRONG


@pytest.mark.usefixtures("_nothing_known")
@pytest.mark.parametrize("crash", [signal.SIGSEGV, signal.SIGILL])
def test_a_crash_is_a_trial_that_was_not_passed(crash: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "child", lambda *_: subprocess.CompletedProcess([], -crash, "", ""))
    assert trial.trial() == CRASHED
    monkeypatch.setattr(cache, "child", None)
    assert trial.trial() == CRASHED
    assert str(CRASHED) == "a process crashes that tries them"


@pytest.mark.usefixtures("_nothing_known")
@pytest.mark.parametrize("status", [1, -signal.SIGKILL])
def test_what_says_nothing_of_them_is_an_error_and_not_kept(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(cache, "child", lambda *_: subprocess.CompletedProcess([], status, "", "no disk\n"))
        with pytest.raises(KsmEdgeError, match="could not be tried:\nno disk"):
            trial.trial()
    assert trial.trial().is_passed


@pytest.mark.usefixtures("_nothing_known")
@pytest.mark.parametrize("left", ["", "{}", '{"error": 0.0, "half_error": null}'])
def test_half_a_result_is_made_again(left: str) -> None:
    first = trial.trial()
    (description,) = cache.cache_folder().glob("graphs/*/graph.json")
    assert json.loads(description.read_text())["error"] == first.error
    description.write_text(left)
    assert trial.trial() == first


@pytest.mark.parametrize(
    ("found", "own", "half_products"), [(RIGHT, True, True), (WRONG, False, False), (WRONG_IN_HALF, True, False)]
)
def test_only_what_passed_is_used(
    found: Trial, own: bool, half_products: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "trial", lambda: found)
    asked = replace(gradient_spec(random_bundle("mobilenet_v2", 32, tmp_path), 3, Settings(), 1), half_products=True)
    assert asked.own
    assert trusted(asked) == replace(asked, own=own, half_products=half_products)


def test_what_needs_none_of_them_is_not_tried_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "trial", None)
    head = gradient_spec(random_bundle("mobilenet_v2", 32, tmp_path), 3, Settings(method="head"), 1)
    assert trusted(head) == head


def test_a_plan_is_made_without_them_and_keeps_it_in_mind(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = load_bundle("embedded")
    usual = make_plan(bundle, 3, Settings(), threads=1, budget_bytes=None)
    assert usual.graph.spec.own
    assert usual.failed is None
    for module in ("ksm_edge.training.planner", "ksm_edge.runtimes.trial"):
        monkeypatch.setattr(f"{module}.trial", lambda: WRONG)
    plan = make_plan(bundle, 3, Settings(), threads=1, budget_bytes=None)
    assert not plan.graph.spec.own
    assert plan.failed == WRONG
    with pytest.raises(UsageError, match=r"operators in C, and those of this installation are wrong"):
        make_plan(bundle, 3, Settings(), threads=1, budget_bytes=None, before=usual.choices)
