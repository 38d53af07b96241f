"""Benchmarks whose runs are kept one by one: what they keep, sum up and show, on canned runs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import saved_tiny_bundle, tiny_bundle, tiny_pack

from ksm_edge.data.digits import digits
from ksm_edge.pack.files import save_pack
from ksm_edge.profiler.child import write_photos

ROOT = Path(__file__).resolve().parents[2]
KEEP = """
import sys
sys.path.insert(0, sys.argv[1])
import grid
from pathlib import Path
for i in range(20):
    run = {"identity": {"who": sys.argv[3], "i": i}, "machine": {}, "after": {}, "warnings": []}
    grid.keep(Path(sys.argv[2]), {"benchmark": "x"}, run, lambda runs: {"runs": len(runs)})
"""


def test_two_processes_that_fill_one_file_lose_nothing(load: Any, tmp_path: Path) -> None:
    path = tmp_path / "results" / "x.json"
    command = [sys.executable, "-c", KEEP, str(ROOT / "benchmarks"), str(path)]
    both = [subprocess.Popen([*command, who]) for who in ("a", "b")]
    assert [process.wait() for process in both] == [0, 0]
    grid = load("grid")
    assert len(grid.runs(path)) == json.loads(path.read_text())["summary"]["runs"] == 40
    assert grid.has(path, {"who": "b", "i": 19})
    assert not grid.has(path, {"who": "b", "i": 20})
    assert [other.name for other in path.parent.iterdir()] == ["x.json"]


def test_a_run_from_before_a_setting_had_its_default(load: Any, tmp_path: Path) -> None:
    grid, path = load("grid"), tmp_path / "x.json"
    which = {"task": "flowers5", "recipe": "mobilenet_v2"}
    old = {"identity": {**which, "settings": {"epochs": 8}}, "machine": {}, "after": {}, "warnings": []}
    grid.keep(path, {}, old, lambda runs: {})
    assert grid.has(path, {**which, "settings": {"epochs": 8, "learn_in_bits": False}})
    assert grid.runs(path)[0]["identity"]["settings"]["head_start"] == "random"  # as it was then
    assert not grid.has(path, {**which, "settings": {"epochs": 8, "learn_in_bits": True}})


@pytest.mark.parametrize(
    ("task", "recipe", "words", "expected"),
    [
        ("flowers5", "mobilenet_v2", {}, None),
        ("flowers5", "resnet20_cifar10", {}, False),
        ("gtsrb43@10", "mobilenet_v2", {}, False),
        ("gtsrb43", "mobilenet_v2", {"thin": 0.7}, None),
        ("gtsrb43", "mobilenet_v2", {"method": "norm"}, None),
        ("gtsrb43", "mobilenet_v2", {"amplify": True}, True),
        ("flowers5", "mobilenet_v2", {"granularity": "group:4"}, False),
        ("flowers5", "resnet20_cifar10", {"granularity": "element"}, None),
    ],
)
def test_runs_from_before_kernels_could_grow_are_told_where_they_would_now(
    load: Any, tmp_path: Path, task: str, recipe: str, words: dict[str, Any], expected: bool | None
) -> None:
    grid, path = load("grid"), tmp_path / "x.json"
    identity = {"task": task, "recipe": recipe, "settings": {"mask_bits": 0.25, "thin": None, **words}}
    grid.keep(path, {}, {"identity": identity, "machine": {}, "after": {}, "warnings": []}, lambda runs: {})
    assert grid.runs(path)[0]["identity"]["settings"]["amplify"] is expected


def test_runs_that_were_thinned_by_half_are_earlier_ones(load: Any, tmp_path: Path) -> None:
    grid, methods, path = load("grid"), load("methods"), tmp_path / "x.json"
    for name in ("ksm", "whole"):
        wanted = methods.identity(name, tiny_bundle(tmp_path / name), digits(), 0)
        assert not methods.outdated(wanted)
        old = {**wanted, "settings": {n: value for n, value in wanted["settings"].items() if n != "mask_bits"}}
        grid.keep(path, {}, {"identity": old, "machine": {}, "after": {}, "warnings": []}, lambda runs: {})
        # What has a share of its own was never thinned by anything else.
        assert grid.has(path, wanted) == (name == "whole")
        assert bool(methods.outdated(grid.runs(path)[-1]["identity"])) == (name == "ksm")


def test_only_runs_like_the_last_one_count(load: Any) -> None:
    standing = load("grid").latest(lambda run: run["method"], lambda run: run["rate"])
    runs = [{"method": m, "rate": r, "n": n} for n, (m, r) in enumerate([("a", 1), ("b", 1), ("a", 2), ("b", 1)])]
    assert [run["n"] for run in standing(runs)] == [1, 2, 3]


def bits_run(setting: str, exact: float, coarse: float) -> dict[str, Any]:
    row = {"cross_entropy": 1.0, "pack_bytes": 1000}
    rows = {"unquantized": {**row, "accuracy": exact}, "scale 2": {**row, "accuracy": coarse, "cross_entropy": 1.5}}
    return {"identity": {"task": "t"}, "setting": setting, "rows": rows}


def test_changes_by_bits_are_taken_run_by_run(load: Any) -> None:
    runs = [bits_run("default", 0.90, 0.91), bits_run("default", 0.50, 0.48), bits_run("small", 0.1, 0.1)]
    found = load("bits").summary(runs)
    row = found["default"]["rows"]["scale 2"]
    assert row["accuracy_change"] == pytest.approx(-0.005)
    assert row["accuracy_change_error"] == pytest.approx(0.015)  # of +1 and -2 points: 2.1 / sqrt(2)
    assert row["cross_entropy_change"] == 0.5
    assert (found["default"]["runs"], found["small"]["runs"]) == (2, 1)
    assert "accuracy_change_error" not in found["small"]["rows"]["scale 2"]


@pytest.mark.parametrize("part", ["scale", "norm", "head"])
def test_one_part_is_made_coarse_and_no_other(load: Any, part: str) -> None:
    exact, coarse = tiny_pack(seed=1), tiny_pack(seed=2)
    mixed = load("bits").with_part(exact, coarse, part)
    assert (mixed.head_weight is coarse.head_weight) == (part == "head")
    for layer, state in mixed.layers.items():
        assert state.mask is (coarse if part == "scale" else exact).layers[layer].mask
        assert state.gamma_delta is (coarse if part == "norm" else exact).layers[layer].gamma_delta
        assert state.beta_delta is (coarse if part == "norm" else exact).layers[layer].beta_delta


def accuracy_run(method: str, task: str, seed: int, accuracy: float, recipe: str = "mobilenet_v2") -> dict[str, Any]:
    size = 96 if recipe == "mobilenet_v2" else 32
    return {
        "identity": {
            "method": method,
            "task": task,
            "recipe": recipe,
            "size": size,
            "seed": seed,
            "epochs": 8,
            "head_start": "random" if method == "full" else "zero",
            "crop_scale": None,
            "crop_start": None,
            "head_rate": 5e-4,
            "join_at": 0.75,
        },
        "test_accuracy": accuracy,
        "validation_accuracy": accuracy,
        "pack_bytes": 50_000 if method == "ksm" else 4_500_000,
        "steps": 900,
        "wall_seconds": 60.0,
        "peak_rss_bytes": 2**27,
        "machine": {"cpu": "Some CPU", "cores": 2},
        "after": {"time": "2026-01-02T03:04:05+00:00"},
        "warnings": [],
    }


FIVE = ("flowers5", "trashnet", "pacs_sketch7", "gtsrb43", "omniglot_small1")
ACCURACY = [
    accuracy_run("ksm", "trashnet", 0, 0.8),
    accuracy_run("ksm", "trashnet", 1, 0.9),
    accuracy_run("full", "trashnet", 0, 0.85),
    accuracy_run("ksm", "gtsrb43", 0, 0.7, "resnet20_cifar10"),
    *(accuracy_run("linear", task, 0, 0.5) for task in FIVE),
    accuracy_run("binary", "trashnet", 0, 0.84),
    *(accuracy_run("full", f"caltech100-0{number}", 0, 0.9 + number / 10) for number in (0, 1)),
    accuracy_run("ksm", "caltech100-00", 0, 1.0),
]
FORGETTING = {
    "runs": [{"task": "one", "after_learning": 0.9, "after_all": 0.9, "pack_bytes": 20_000}],
    "summary": {"tasks": 1, "after_learning": 0.9, "after_all": 0.9, "largest_loss": 0.0, "pack_bytes": 20_000,
                "digests_compared": 1},
}  # fmt: skip


def test_figures_are_means_over_seeds(load: Any) -> None:
    found = load("accuracy").summary(ACCURACY)
    row = found["mobilenet_v2, 96 px"]["trashnet"]["ksm"]
    assert row["test_accuracy"] == pytest.approx(0.85)
    assert (row["seeds"], row["test_accuracy_range"]) == ([0, 1], [0.8, 0.9])
    assert list(found["resnet20_cifar10, 32 px"]) == ["gtsrb43"]


def test_every_method_is_one_that_adapt_or_a_script_knows(load: Any, tmp_path: Path) -> None:
    from ksm_edge.cli.main import build_parser

    methods, bundle = load("methods"), tiny_bundle(tmp_path)
    scripts = {name for name, method in methods.ALL.items() if method.words is None}
    assert scripts == {"full", "lora:4", "lora:8", "linear", "reference"}
    for name in methods.ALL.keys() - scripts:
        build_parser().parse_args(["adapt", "DATA", *methods.ALL[name].words(bundle)])
    assert methods.METHODS["late"].words(bundle) == ("--masked", "project..")


def test_ksm_as_released_has_the_constants_of_the_authors(load: Any, tmp_path: Path) -> None:
    made = load("methods").identity("released", tiny_bundle(tmp_path), digits(), 0)
    wanted = {"epochs": 30, "batch": 32, "score_rate": 2e-4, "norm_rate": 2e-4, "head_rate": 2e-4, "warmup": 0.0,
              "label_smoothing": 0.0, "thin": 0.0, "statistics": "batch", "granularity": "kernel"}  # fmt: skip
    assert {name: made["settings"][name] for name in wanted} == wanted


def test_what_a_later_task_changes_is_noticed(load: Any, tmp_path: Path) -> None:
    forgetting, bundle = load("forgetting"), saved_tiny_bundle(tmp_path / "b")
    tasks = [tmp_path / "one.zip", tmp_path / "two.zip"]
    for seed, data in enumerate(tasks):
        save_pack(tiny_pack(seed=seed), data.with_suffix(".ksm"))
    runs = [{"state": forgetting._state(bundle.path, data.with_suffix(".ksm"))} for data in tasks]
    before = forgetting._bundle_bytes(bundle.path)
    forgetting._require_unchanged(runs, bundle.path, before, tasks)
    save_pack(tiny_pack(seed=5), tmp_path / "one.ksm")
    with pytest.raises(SystemExit, match="learning two changed what one had learned"):
        forgetting._require_unchanged(runs, bundle.path, before, tasks)
    (bundle.path / "manifest.json").write_text("{}")
    with pytest.raises(SystemExit, match="changed the bundle"):
        forgetting._require_unchanged(runs, bundle.path, before, tasks)


def test_forgetting_is_the_largest_loss_of_any_task(load: Any) -> None:
    rows = [(0.9, 0.9), (0.8, 0.7), (0.7, 0.75)]
    runs = [{"after_learning": first, "after_all": last, "pack_bytes": 1000} for first, last in rows]
    found = load("forgetting").summary(runs)
    assert found["largest_loss"] == pytest.approx(0.1)
    assert (found["tasks"], found["pack_bytes"], found["digests_compared"]) == (3, 3000, 6)


def image_zip(path: Path, classes: Sequence[str], count: int) -> None:
    with zipfile.ZipFile(path, "w") as file:
        for split, name in product(("train", "test"), classes):
            for number in range(count):
                file.writestr(f"{split}/{name}/{number}.png", f"{split} {name} {number}")


def test_few_images_of_each_class_are_drawn_by_the_seed(load: Any, tmp_path: Path, monkeypatch: Any) -> None:
    tasks = load("tasks")
    monkeypatch.setenv("KSM_EDGE_DATA", str(tmp_path))
    image_zip(tmp_path / "things.zip", ("a", "b"), 9)
    drawn = []
    for seed in (0, 0, 1):
        with zipfile.ZipFile(tasks.task_data("things@3", tmp_path, seed)) as file:
            names = file.namelist()
        drawn.append([name for name in names if name.startswith("train/")])
        assert len([name for name in names if name.startswith("test/")]) == 18
    assert drawn[0] == drawn[1] != drawn[2]
    assert {split.count("/a/") for split in map("".join, drawn)} == {3}


def test_a_task_of_a_suite_has_its_own_classes(load: Any, tmp_path: Path, monkeypatch: Any) -> None:
    tasks = load("tasks")
    monkeypatch.setenv("KSM_EDGE_DATA", str(tmp_path))
    image_zip(tmp_path / "things.zip", ("a", "b", "c"), 2)
    (tmp_path / "things_20tasks.json").write_text(json.dumps({"tasks": [["a"], ["b", "c"]]}))
    path = tasks.task_data("things/1", tmp_path)
    assert path.name == "things-01.zip"
    with zipfile.ZipFile(path) as file:
        assert {name.split("/")[1] for name in file.namelist()} == {"b", "c"}
    assert tasks.task_data("things") == tmp_path / "things.zip"
    with pytest.raises(SystemExit, match="no other"):
        tasks.task_data("other")


def test_plots_are_the_same_for_the_same_figures(load: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pareto, found = load("pareto"), load("accuracy").summary(ACCURACY)
    for name, cost in pareto.COSTS.items():
        for copy in ("a", "b"):
            pareto.plot(found, cost, tmp_path / f"{copy}-{name}.svg")
        assert (tmp_path / f"a-{name}.svg").read_bytes() == (tmp_path / f"b-{name}.svg").read_bytes()


def test_front_has_what_nothing_beats(load: Any) -> None:
    points = [(2.0, 80.0), (1.0, 70.0), (3.0, 80.0), (2.0, 60.0), (9.0, 81.0)]
    assert load("pareto")._front(points) == [(1.0, 70.0), (2.0, 80.0), (9.0, 81.0)]


@pytest.fixture
def pages(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script with pages and results of its own."""
    script = load("pages")
    monkeypatch.setattr(script, "DOCS", tmp_path)
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    for name in script.PAGES:
        shutil.copy(ROOT / "docs" / name, tmp_path)
    origin = {"version": 1, **{name: ACCURACY[0][name] for name in ("machine", "after")}}
    runs = [bits_run("default", 0.90, 0.91), bits_run("default", 0.5, 0.5)]
    summaries = {"bits": load("bits").summary(runs), "accuracy": load("accuracy").summary(ACCURACY)}
    for name, summary in summaries.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({**origin, "runs": [], "summary": summary}))
    others = {"apps": APPS, "prediction": PREDICTION, "memory": MEMORY, "levers": LEVERS, "runtimes": RUNTIMES}
    few = {"runs": 9, "accuracy": 0.9, "pack_bytes": 50_000, "accuracy_change": -0.021, "accuracy_change_error": 0.003}
    others["forgetting"] = FORGETTING
    case = {"recipe": "a-net", "size": 96, "batch": 8, "threads": 1}
    cost = {"step_ms": 100.0, "peak_rss_bytes": 150 << 20, "bound_ms": 25.0, "time_ratio": 0.3}
    cases = [{**case, "rival": "ours", **cost}, {**case, "rival": "theirs", "absent": "no such package"}]
    others["adaptation"] = others["adaptation-avx2"] = {"summary": {"cases": cases}}
    others["layers"] = {"summary": {"layers=few.. views=2": few}}
    others["layer-steps"] = {"summary": {"": {"step_ms": 90.0, "ratio": 0.5, "peak_rss_bytes": 150 << 20}}}
    for name, content in others.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({**origin, **content}))
    return script


def test_every_machine_of_a_grid_is_named(pages: Any) -> None:
    mine, other, unnamed = {"cpu": "Mine", "cores": 2}, {"cpu": "Other", "cores": 1}, {"bytes_per_second": 1.0}
    runs = [{"machine": other}, {"machine": mine}, {"machine": unnamed}, {"step_ms": 1.0}]
    content = {"machine": mine, "after": ACCURACY[0]["after"], "runs": runs}
    assert pages._origin(content).startswith("Mine, 2 cores; Other, 1 core; 2026-01-02;")


ROW = {"board": "a-board", "threads": 4, "network": "a-net", "training": False, "ms": 20.0, "predicted_ms": 22.0}
PREDICTION = {
    "summary": {
        "left_out": {"rows": [{**ROW, "ratio": 1.1}], "median_error": 0.1, "worst_factor": 1.1},
        "reported": [{**ROW, "ratio": 1.1}],
        "gpu": {"rows": [{**ROW, "board": "a-gpu", "ratio": 1.1}], "median_error": 0.1, "worst_factor": 1.1},
        "training": {"rows": [{**ROW, "training": True, "ratio": 1.1}], "worst_error": 0.1},
        "adaptation": {"rows": {"a-net": {"measured_ms": 30.0, "counted_ms": 20.0, "ratio": 1.5}}, "factor": 1.5},
    }
}
MEMORY = {
    "summary": {"least": 1.01, "most": 1.09, "exceeded": 0},
    "runs": [{"recipe": "a-net", "size": 96, "options": ["--batch", "8"], "expected_bytes": 200 << 20,
              "peak_rss_bytes": 190 << 20}],
}  # fmt: skip
LEVER = {"step_ms": 300.0, "time_ratio": 1.0, "peak_rss_bytes": 180 << 20}
LEVERS = {
    "settings": {"batch": 8, "size": 224},
    "summary": {
        "a-net": {"as usual": LEVER, "another": {**LEVER, "gradient_error": 1e-4, "largest_gradient_error": 0.02}}
    },
}
RUNTIMES = {
    "settings": {"size": 224},
    "summary": {"ways": {"a way": {"first_ms": 9.0, "next_ms": 8.0, "run_ms": 7.0, "before_bytes": 70 << 20,
                                   "rss_bytes": {"1": 80 << 20, "2": 90 << 20}}}},
}  # fmt: skip
APPS = {
    "settings": {"size": 224, "tasks": 50},
    "runs": [{"way": "pack", "read": [], "session": [], "bytes": 1}],
    "summary": {
        "loads": {"pack": {"read": 1, "session": 2.25, "total": 3.25, "ratio": 0.5, "bytes": 50_000}},
        "ready_switch_ms": 0.005,
        "loaded_task_ratio": 1.05,
        "switches": 10_000,
        "peak_rss_bytes": 150 << 20,
        "budget_bytes": 200 << 20,
        "board": "a-board",
        "leak_bytes_per_switch": 0.0,
        "by_processes": {str(n): {"rss_bytes": 100 << 20, "pss_bytes": (90 // n) << 20} for n in (1, 3)},
    },
}


def test_figures_of_the_engine_are_drawn_from_results(load: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plots = load("engine_plots")
    traces = {plots.OURS: [(0.0, 100 << 20), (5.0, 180 << 20)], plots.FULL: [(1.0, 600 << 20), (9.0, 1100 << 20)]}
    row = {**plots.CASE, "step_ms": 900.0, "peak_rss_bytes": 1 << 30}
    cases = [{**row, "rival": plots.FULL}, {**row, "rival": plots.OURS}, {**row, "rival": plots.SMALLEST, "size": 96}]
    for path in (
        plots.draw_traces(traces, tmp_path / "memory.svg"),
        plots.draw_ways(cases, tmp_path / "pareto.svg"),
    ):
        assert f"<!-- {plots.FULL} -->" in path.read_text()  # the legend, drawn as paths


def test_the_tables_of_pages_are_those_of_the_results(pages: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["pages.py", "--check"])
    assert pages.main() == 1
    monkeypatch.setattr(sys, "argv", ["pages.py"])
    assert pages.main() == 0
    text = (tmp_path / "pack-size.md").read_text()
    assert "| scale 2 | +0.50 ± 0.50 | +0.5000 ± 0.0000 | 1.0 |" in text
    assert "| KSM, default | not measured | not measured | 85.0 %, 50.0 (2 seeds) |" in text
    assert "| full fine-tuning, fp16 (earlier settings) | not measured | not measured | 85.0 %, 4,500.0 |" in text
    text = (tmp_path / "accuracy.md").read_text()
    assert "| KSM, default |  | 85.0 (2 seeds) |  |  |  |  |  |  |" in text
    assert f"| classifier only, logistic regression |{' 50.0 |' * 5} **50.0** | 4,500.0 | 900 |" in text
    assert (
        "| full fine-tuning, fp16 (earlier settings) | 95.0 | 90.0 | 4,500.0 |" in text
    )  # of the suite; the default lacks a task of it
    assert "| binary masks | +4.0 |" in text  # against the same seed
    assert "| one | 90.00 | 90.00 | 20.0 |" in text
    text = (tmp_path / "app.md").read_text()
    assert "| pack | 1.0 | 2.2 | 3.2 | 0.50 | 50 kB |" in text
    assert "10,000 switches among all of them, peak RSS | 150 MiB of the 200 MiB budget of a-board (emulated" in text
    text = (tmp_path / "boards.md").read_text()
    assert "| a-board | 4 | a-net | 20.0 | 22.0 | 1.10 |" in text
    assert "| a-gpu | 4 | a-net | 20.0 | 22.0 | 1.10 |" in text
    assert "| a-board | 4 | a-net, all weights | 20.0 | 22.0 | 1.10 |" in text
    assert "| a-net | 30 | 20 | 1.50 |" in text
    assert "| a-net | 96 | --batch 8 | 200 | 190 |" in text
    assert "| `--layers few.. --views 2` | 9 | 90.00 % | -2.10 ± 0.30 | 50.0 |" in (tmp_path / "engine.md").read_text()
    assert "| all layers | 90 | 0.50 | 150 |" in (tmp_path / "engine.md").read_text()
    assert "| a-net | 96 | 8 | 1 | ours | 100 | 0.30 | 25% | 150 |" in (tmp_path / "engine.md").read_text()
    assert "| theirs | not measured | no such package |" in (tmp_path / "engine.md").read_text()
    assert "| a-net | another | 300 | 1.00 | 180 | 1e-04 | 2e-02 |" in (tmp_path / "engine.md").read_text()
    assert "| a way | 9.0 | 8.0 | 7.0 | 70 MiB | 80, 90 MiB |" in (tmp_path / "mobile.md").read_text()
    text = (tmp_path / "app.md").read_text()
    assert "| each of 3 such processes on one bundle: RSS, PSS | 100 MiB, 30 MiB |" in text
    monkeypatch.setattr(sys, "argv", ["pages.py", "--check"])
    assert pages.main() == 0


def test_images_a_class_are_compared_with_the_same_seed(pages: Any) -> None:
    def of_seeds(*earlier: str, **accuracies: float) -> dict[str, Any]:
        by_seed = {seed.removeprefix("seed"): value for seed, value in accuracies.items()}
        return {"by_seed": by_seed, "earlier": dict.fromkeys(earlier)}

    tasks = {
        "flowers5@5": {"ksm": of_seeds("crop_start", seed0=0.7), "linear": of_seeds(seed0=0.6)},
        "flowers5": {"ksm": of_seeds(seed0=0.9, seed1=0.1)},
        "gtsrb43@10": {"ksm": of_seeds(seed1=0.8)},
    }
    table = pages.accuracy_tables.count_tables({"summary": {"mobilenet_v2, 160 px": tasks}})
    assert table.splitlines()[2:] == [
        "| 5 | KSM, default (crops from 80 %) | 70.0 |  |  |  |  |",
        "| 5 | classifier only, logistic regression | 60.0 |  |  |  |  |",
        "| all | KSM, default | 90.0 |  |  |  |  |",
    ]


def test_a_change_is_held_only_against_a_default_that_is_otherwise_alike(pages: Any) -> None:
    def learned(accuracy: float, *given: str, **earlier: Any) -> dict[str, Any]:
        return {"test_accuracy": accuracy, "by_seed": {"0": accuracy}, "earlier": earlier, "given": list(given)}

    def lines(**earlier: Any) -> list[str]:
        tasks = {"trashnet": {"ksm": learned(0.8, **earlier), "binary": learned(0.7, crop_scale=0.35, warmup=0.05),
                              "channel": learned(0.6, **earlier), "crop-wide": learned(0.9, "crop_scale"),
                              "norm-slow": learned(0.5, "norm_rate")}}  # fmt: skip
        return pages.accuracy_tables.ablation_tables({"summary": {"mobilenet_v2, 96 px": tasks}}).splitlines()[4:]

    filters, wide = "| one score per filter | -20.0 |", "| crops of 65 % of an image or more | +10.0 |"
    assert lines(crop_scale=0.35) == ["| the default (crops of 35 %) | 80.0 |", filters, wide]
    slow = "| batch-norm at 2.5e-4 | -30.0 |"
    assert lines() == ["| the default | 80.0 |", filters, slow, wide]


def test_crops_are_compared_over_runs_that_differ_in_nothing_else(pages: Any, load: Any, tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "b")

    def run(method: str, accuracy: float, seed: int = 0, task: str = "gtsrb43", **changed: Any) -> dict[str, Any]:
        found = load("methods").identity(method, bundle, digits(), seed)
        found |= {"recipe": "mobilenet_v2", "size": 96, "task": task, "settings": found["settings"] | changed}
        return {"identity": found, "test_accuracy": accuracy}

    two = [run("ksm", 0.8), run("ksm", 0.6, seed=1)]
    others = [run("ksm", 0.5, crop_scale=0.35, warmup=0.05), run("ksm", 0.1, task="gtsrb43@10"), run("binary", 0.2)]
    few = run("ksm", 0.3, task="gtsrb43@10", crop_scale=0.35)
    before = run("ksm", 0.4, head_rate=2e-3)
    left_out = [run("ksm", 0.45, join_at=1.0), run("ksm", 0.1, join_at=1.0, amplify=False)]
    runs = [before, *left_out, run("ksm", 0.7, crop_scale=0.35), *two, run("crop-wide", 0.9), *others]
    table = pages.accuracy_tables.crop_tables({"runs": runs}).splitlines()
    assert table[0] == "mobilenet_v2, 96 px, all images a class:"
    assert table[4:] == [
        "| 35 % or more |  |  |  | 70.0 |  |  |",
        "| 65 % or more |  |  |  | 90.0 |  |  |",
        "| 80 % of what evaluation sees at first, then by training accuracy |  |  |  | 70.0 (2 seeds) |  |  |",
        "| 80 % of what evaluation sees at first, then by training accuracy (a tenth left out) |  |  |  | 45.0 |  |  |",
        "| 80 % of what evaluation sees at first, then by training accuracy (head at 2e-3) |  |  |  | 40.0 |  |  |",
    ]
    assert not pages.accuracy_tables.crop_tables({"runs": [*two, *others]})  # nothing to compare
    tables = pages.accuracy_tables.crop_tables({"runs": [few, *runs]}).split("\n\n")
    assert [part for part in tables if part.startswith("mobilenet")] == [
        "mobilenet_v2, 96 px, 10 images a class:",
        "mobilenet_v2, 96 px, all images a class:",
    ]


def test_a_remark_says_what_has_another_default_since(load: Any, tmp_path: Path) -> None:
    methods = load("methods")
    assert methods.title("ksm", {}) == "KSM, default"
    assert methods.title("ksm", {"crop_scale": 0.35}) == "KSM, default (crops of 35 %)"
    assert methods.title("full", {"crop_scale": 0.35, "crop_start": 0.8}) == "full fine-tuning, fp16 (crops of 35 %)"
    assert methods.title("ksm", {"crop_start": 0.8}) == "KSM, default (crops from 80 %)"
    assert methods.title("full", {"head_rate": 2e-3}) == "full fine-tuning, fp16 (head at 2e-3)"
    left_out = methods.title("linear", {"join_at": 1.0})
    assert left_out == "classifier only, logistic regression (a tenth left out)"
    both = methods.title("ksm", {"crop_scale": 0.35, "head_rate": 2e-3})
    assert both == "KSM, default (crops of 35 %, head at 2e-3)"
    assert methods.title("ksm", {"crop_scale": 0.35, "warmup": 0.05}) == "KSM, default (earlier settings)"
    for name, given in {"crop-wide": ["crop_scale", "crop_start"], "binary": ["soft"], "ksm": [], "full": []}.items():
        assert methods.given(methods.identity(name, tiny_bundle(tmp_path / name), digits(), 0)) == given


def test_rivals_share_the_crops_of_the_default(load: Any, tmp_path: Path) -> None:
    methods = load("methods")
    wanted = methods.identity("full", tiny_bundle(tmp_path / "b"), digits(), 0)
    assert not methods.outdated(wanted)
    assert methods.outdated({n: value for n, value in wanted.items() if n != "crop_scale"}) == {"crop_scale": 0.35}
    assert not methods.outdated(methods.identity("linear", tiny_bundle(tmp_path / "c"), digits(), 0))


def test_logistic_regression_is_fitted_to_all_images_once_its_penalty_is_chosen(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    linear, fitted, scores = load("linear"), list[tuple[float, int]](), list[float]()
    fit = linear._fit

    def noted(C: float, features: np.ndarray, labels: np.ndarray) -> object:
        model = fit(C, features, labels)
        fitted.append((C, len(labels)))
        scores.append(model.score(features, labels))
        return model

    monkeypatch.setattr(linear, "_fit", noted)
    for part in ("train", "test"):  # the same photos
        (tmp_path / "photos" / part).mkdir(parents=True)
        write_photos(tmp_path / "photos" / part, 3, 10)
    bundle = saved_tiny_bundle(tmp_path / "bundle").path
    monkeypatch.setattr(sys, "argv", ["linear.py", str(tmp_path / "photos"), "--bundle", str(bundle)])
    assert linear.main() == 0
    report = json.loads(capsys.readouterr().out)
    assert fitted == [*((C, 27) for C in linear.STRENGTHS), (report["rate"], 30)]
    assert (report["test_images"], report["test_accuracy"]) == (30, scores[-1])
