"""A budget is a promise: every recipe adapts within it under an enforced limit, or is refused before it starts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from random_recipe import random_state
from shapes import CLASSES, make_shapes

from ksm_edge import native
from ksm_edge.autodiff.spec import HALVES
from ksm_edge.bundle.layers import Bundle
from ksm_edge.bundle.make import freeze_recipe, save_bundle
from ksm_edge.bundle.recipe import at_size, load_recipe, recipe_names
from ksm_edge.child import module_command
from ksm_edge.errors import BudgetError
from ksm_edge.limits import run_limited
from ksm_edge.training.footprint import compiling_bytes
from ksm_edge.training.planner import make_plan
from ksm_edge.training.settings import Settings

MIB = 1 << 20
BUDGETS = (64, 96, 128, 192, 256, 512)  # MiB
SIZE = {"resnet20_cifar10": 32}  # pixels; of the others 64, so that they are quick


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shapes(tmp_path_factory.mktemp("photos"), count=6)


def random_bundle(name: str, folder: Path) -> Bundle:
    recipe = load_recipe(name)
    contract = at_size(recipe.input, SIZE.get(name, 64))
    return save_bundle(freeze_recipe(recipe, random_state(name)), folder, recipe=name, input_contract=contract)


def refusal(bundle: Bundle, budget: int) -> str | None:
    """What the planner says against adapting within so many MiB."""
    try:
        make_plan(bundle, len(CLASSES), Settings(batch=4), threads=1, budget_bytes=budget * MIB)
    except BudgetError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_keeps_to_its_budget_or_is_refused(name: str, photos: Path, tmp_path: Path) -> None:
    bundle = random_bundle(name, tmp_path / "bundle")
    refusals = {budget: refusal(bundle, budget) for budget in BUDGETS}
    for budget, message in refusals.items():
        if message is not None:
            smallest = re.search(r"--memory-budget (\d+)MiB", message)
            assert smallest
            assert int(smallest[1]) > budget
    allowed = [budget for budget, message in refusals.items() if message is None]
    assert allowed == list(BUDGETS[len(BUDGETS) - len(allowed) :])  # more memory is never refused where less is not
    if allowed:
        assert_kept(bundle, photos, threads=1, budget_bytes=allowed[0] * MIB)


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet20_cifar10"])
def test_workers_take_what_is_expected_of_them(name: str, photos: Path, tmp_path: Path) -> None:
    bundle = random_bundle(name, tmp_path / "bundle")
    plan = make_plan(bundle, len(CLASSES), Settings(batch=4), threads=4, budget_bytes=None)
    assert plan.engine.workers == 4
    assert_kept(bundle, photos, threads=4, budget_bytes=plan.expected_peak_bytes)


@pytest.mark.skipif(native.halves() is None, reason="this processor gains nothing by products in half precision")
@pytest.mark.parametrize("threads", [1, 2])
def test_products_in_half_precision_take_what_is_expected_of_them(threads: int, photos: Path, tmp_path: Path) -> None:
    bundle = random_bundle("mobilenet_v2", tmp_path / "bundle")
    settings = Settings(batch=4, product_bits=16)
    plan = make_plan(bundle, len(CLASSES), settings, threads=threads, budget_bytes=None)
    assert plan.graph.spec.products == HALVES
    assert_kept(bundle, photos, "--product-bits", 16, threads=threads, budget_bytes=plan.expected_peak_bytes)


def test_kernels_that_leave_the_kept_ones_take_what_is_expected_of_them(photos: Path, tmp_path: Path) -> None:
    """At a rate that has as many of them apart within two epochs as a whole training has in the end."""
    bundle = random_bundle("mobilenet_v2", tmp_path / "bundle")
    settings, given = Settings(batch=4, amplify=True, score_rate=5e-3), ("--amplify", "--score-rate", 5e-3)
    with pytest.raises(BudgetError) as refused:
        make_plan(bundle, len(CLASSES), settings, threads=1, budget_bytes=64 * MIB)
    smallest = re.search(r"--memory-budget (\d+)MiB", str(refused.value))
    assert smallest
    assert_kept(bundle, photos, *given, threads=1, budget_bytes=int(smallest[1]) * MIB)


def test_compiling_keeps_to_what_is_expected(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of graphs that have all weights as constants: three times what learning the head takes beside them."""
    bundle = random_bundle("resnet18", tmp_path / "bundle")
    settings = Settings(batch=4, method="head", views=1)
    plan = make_plan(bundle, len(CLASSES), settings, threads=1, budget_bytes=None)
    assert plan.expected_peak_bytes == compiling_bytes(bundle, settings)
    monkeypatch.setenv("KSM_EDGE_CACHE", str(tmp_path / "empty"))
    given = "--method", "head", "--views", 1
    assert_kept(bundle, photos, *given, threads=1, budget_bytes=plan.expected_peak_bytes)


def test_what_waits_for_a_graph_has_not_imported_what_makes_it(photos: Path, tmp_path: Path) -> None:
    """Memory that both would have at once."""
    bundle = random_bundle("resnet20_cifar10", tmp_path / "bundle")
    code = (
        "import sys; from ksm_edge.cli.main import main; from ksm_edge.runtimes import cache; "
        "cache.make_in_child = lambda *_: sys.exit('onnx' in sys.modules or 'onnxruntime' in sys.modules or 7); "
        "main(sys.argv[1:])"
    )
    words = "adapt", photos, "--bundle", bundle.path, "--out", tmp_path / "a.ksm"
    environment = {**os.environ, "KSM_EDGE_CACHE": str(tmp_path / "empty")}
    assert subprocess.run([sys.executable, "-c", code, *words], env=environment, check=False).returncode == 7


def assert_kept(bundle: Bundle, photos: Path, *given: object, threads: int, budget_bytes: int) -> None:
    """An adaptation is told of the budget, held to it, and makes its pack."""
    pack = bundle.path / "a.ksm"
    words = ("adapt", photos, "--bundle", bundle.path, "--out", pack, "--epochs", 2, "--batch", 4,
             "--threads", threads, "--memory-budget", budget_bytes, "--json", *given)  # fmt: skip
    outcome = run_limited(module_command("ksm_edge", *map(str, words)), budget_bytes)
    assert (outcome.exit_status, outcome.exceeded) == (0, False)
    assert pack.exists()
