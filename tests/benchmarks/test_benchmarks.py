"""The benchmarks' own sums, files and command lines, and the README's table on canned results; nothing is timed."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
IN_README = ("accuracy", "adaptation", "demo", "forgetting", "latency", "memory", "pack", "prediction", "startup")
SCRIPTS = (*IN_README, "apps", "bits", "layers", "levers", "runtimes")


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_benchmark_says_its_question_without_measuring(name: str) -> None:
    done = run(ROOT / "benchmarks" / f"{name}.py", "--help")
    assert done.returncode == 0, done.stderr
    assert "?" in done.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_benchmarks_need_neither_torch_nor_onnxruntime_to_start(load: Any, name: str) -> None:
    heavy = {"torch", "onnxruntime"} - set(sys.modules)
    load(name).arguments()
    assert not heavy & set(sys.modules)


def test_too_few_runs_for_a_p95_are_refused() -> None:
    done = run(ROOT / "benchmarks" / "latency.py", "--runs", 99)
    assert done.returncode == 2
    assert "at least 100" in done.stderr


def test_percentiles_are_measured_values(load: Any) -> None:
    rows = load("latency").summary({"plain": [float(i) for i in range(1, 101)], "fused": [2.0] * 100})["sessions"]
    assert (rows["plain"]["p50_ms"], rows["plain"]["p95_ms"]) == (50.0, 95.0)
    assert rows["fused"]["p50_ratio"] == 2 / 50


def test_keep_bits_are_held_against_what_they_would_take_at_best(load: Any) -> None:
    pack, rng = load("pack"), np.random.default_rng(0)
    even = rng.random((400, 300)) < 0.03
    entropy = pack.layer_entropy(even)
    assert entropy == pytest.approx(even.size * 0.1944, rel=0.02)  # H(0.03)
    assert pack.layer_entropy(np.ones((4, 4), bool)) == 0
    assert 0.99 * entropy < pack.best_model(even) < 1.01 * entropy
    uneven = rng.random((400, 300)) < 0.03 * rng.choice([0.2, 4], (400, 1))
    assert pack.best_model(uneven) < 0.9 * pack.layer_entropy(uneven)


def test_packs_of_one_task_are_summed_up_over_their_seeds(load: Any) -> None:
    row = {"classes": 7, "scores": 1000, "cut": 10, "layer_entropy_bytes": 50.0, "best_model_bytes": 40.0}
    rows = [
        {**row, "pack": f"a_b-{seed}.ksm", "bytes": 100 + seed, "parts": {"keep_bits": 50 + seed}} for seed in (0, 2)
    ]
    (found,) = load("pack").summary(rows).values()
    assert (found["packs"], found["bytes"], found["parts"]) == (2, 101, {"keep_bits": 51})
    assert (found["against_layer_entropy"], found["against_best_model"]) == pytest.approx((1.02, 1.275))


def test_a_quick_look_writes_nothing_unless_told_where(load: Any, tmp_path: Path) -> None:
    adaptation, measure = load("adaptation"), load("measure")
    parse = lambda *words: measure.output(adaptation.arguments().parse_args(words), "adaptation")  # noqa: E731
    assert parse() == measure.RESULTS / "adaptation.json"
    assert parse("--quick") is None
    assert parse("--quick", "--out", str(tmp_path / "x.json")) == tmp_path / "x.json"


@pytest.mark.parametrize("losses", [[1.0, 1.5], [1.0, float("nan")]])
def test_a_loss_that_does_not_fall_is_a_wrong_answer(load: Any, losses: list[float]) -> None:
    assert not load("timing").falls(losses)


def test_steps_are_timed_behind_the_warm_up(load: Any) -> None:
    timing, calls = load("timing"), iter(range(100, 0, -1))
    found = timing.timed(lambda: float(next(calls)), 4, warm_up=2)
    assert found["losses"] == [100, 99, 98, 97, 96, 95]
    assert len(found["step_ms"]) == 4
    assert found["peak_rss_bytes"] > 2**20
    assert timing.falls(found["losses"])


def test_files_of_another_version_are_refused(load: Any, tmp_path: Path) -> None:
    measure: ModuleType = load("measure")
    measure.write(tmp_path / "x.json", {"version": 1, "runs": [[0.5, 1e-7], []]})
    assert measure.read(tmp_path / "x.json")["runs"] == [[0.5, 1e-7], []]
    measure.write(tmp_path / "x.json", {"version": 2})
    with pytest.raises(SystemExit, match="format version 2"):
        measure.read(tmp_path / "x.json")


def test_a_busy_machine_is_told_of(load: Any) -> None:
    measure = load("measure")
    idle = {"time": "now", "load_average": [1.0, 1.0, 1.0], "busy_cores": 0.1}
    assert measure.disturbance(idle) == []
    assert "run this again" in measure.disturbance({**idle, "busy_cores": 1.5})[0]
    assert measure.share_warning("x", [0.99]) == []
    assert "50%" in measure.share_warning("x", [0.99, 0.5])[0]


def accuracy_run(task: str, seed: int, test: float, method: str = "ksm", batch: int = 16) -> dict[str, Any]:
    return {
        "identity": {
            "method": method,
            "recipe": "mobilenet_v2",
            "size": 160,
            "task": task,
            "seed": seed,
            "batch": batch,
        },
        "test_accuracy": test,
        "validation_accuracy": 0.5,
        "pack_bytes": 50_000,
        "wall_seconds": 600.0,
        "peak_rss_bytes": 200 * 2**20,
        "machine": MACHINE,
        "after": AFTER,
        "warnings": [],
    }


MACHINE = {"cpu": "Some CPU", "cores": 2}
AFTER = {"time": "2026-01-02T03:04:05+00:00"}


def test_a_run_done_again_takes_the_place_of_the_first(load: Any, tmp_path: Path) -> None:
    accuracy = load("accuracy")
    for seed, test in ((0, 0.5), (1, 0.7), (0, 0.9)):
        accuracy.keep(tmp_path / "accuracy.json", accuracy_run("flowers5", seed, test))
    content = json.loads((tmp_path / "accuracy.json").read_text())
    assert [run["test_accuracy"] for run in content["runs"]] == [0.7, 0.9]
    assert content["summary"]["mobilenet_v2, 160 px"]["flowers5"]["ksm"]["test_accuracy"] == pytest.approx(0.8)
    assert content["machine"] == MACHINE


def test_of_each_method_only_runs_like_the_latest_are_reported(load: Any) -> None:
    runs = [
        accuracy_run("flowers5", 0, 0.1, batch=8),
        accuracy_run("flowers5", 0, 0.3, method="full"),
        accuracy_run("flowers5", 0, 0.9),
        accuracy_run("trashnet@10", 0, 0.6, batch=4),
        accuracy_run("flowers5@10", 0, 0.7, batch=8),
        accuracy_run("trashnet", 1, 0.8),
    ]
    assert [run["test_accuracy"] for run in load("accuracy").STANDING(runs)] == [0.3, 0.9, 0.7, 0.8]


@pytest.fixture
def results(load: Any, tmp_path: Path) -> Path:
    """A folder with a small file of every benchmark."""
    adaptation, latency, pack, startup, accuracy = (
        load(n) for n in ("adaptation", "latency", "pack", "startup", "accuracy")
    )
    times = {"decode_ms": [4.0, 5.0, 9.0], "fuse_ms": [2.0], "session_ms": [28.0]}
    common = {"version": 1, "machine": MACHINE, "after": AFTER, "warnings": []}
    shown = {"recipe": "mobilenet_v2", "size": 224}
    steps = adaptation.summary(
        [{**adaptation_run(*step), **shown} for step in ((adaptation.OURS, 200.0), (adaptation.FULL, 800.0))]
    )
    tasks = load("readme_table").TASKS
    runs = [accuracy_run(task, seed, 0.9 + seed / 100) for task in tasks for seed in (0, 1, 2)]
    few = [accuracy_run(f"{task}@10", seed, 0.7 + seed / 50) for task in tasks for seed in (0, 1)]
    for run in [*few, *runs[-3:]]:  # learned as it is today; the other tasks' heads began otherwise
        now = {"head_start": "zero", "head_rate": 5e-4, "join_at": 0.75, "crop_scale": None, "crop_start": None}
        run["identity"] |= now
    linear = [accuracy_run(f"{task}@10", 0, 0.6, method="linear") for task in tasks]
    for run in linear:
        run["identity"]["join_at"] = 0.75
    runs = [*few, *linear, *runs, accuracy_run("flowers5", 0, 0.893, method="linear")]
    commands = [{"command": name, "seconds": [0.1], "heavy_imports": []} for name in startup.COMMANDS]
    demo = {"test_accuracy": 0.96, "wall_seconds": 73.2, "pack_bytes": 29_800, "peak_rss_bytes": 157 * 2**20}
    demo |= {"transcript": ["Task pack  digits.ksm"]}
    files = {
        **{n: {**common, "summary": {"cases": steps, "exponents": []}} for n in ("adaptation", "adaptation-avx2")},
        "latency": {**common, "summary": latency.summary({"plain": [10.0] * 100, "fused": [11.0] * 100})},
        "pack": {**common, "summary": {"times": {"mobilenet_v2": pack.medians(times)}}},
        "startup": {**common, "summary": startup.summary(commands), "warnings": ["busy"]},
        "demo": {**common, "summary": demo},
        "accuracy": {**common, "runs": runs, "summary": accuracy.summary(runs)},
        "prediction": {**common, "summary": {"left_out": {"rows": [{"board": "a"}, {"board": "b"}, {"board": "a"}],
                                                          "median_error": 0.084, "worst_factor": 1.311}}},
        "forgetting": {**common, "summary": {"tasks": 20, "largest_loss": 0.0, "after_learning": 0.98,
                                             "pack_bytes": 400_000}},
        "memory": {**common, "summary": {"least": 1.01, "most": 1.09, "exceeded": 0}},
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def readme_table(results: Path, readme: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return run(ROOT / "scripts" / "readme_table.py", "--results", results, "--readme", readme, *more)


def test_few_images_learned_otherwise_than_today_are_marked(load: Any) -> None:
    table = load("readme_table")

    def what(earlier: dict[str, Any]) -> str:
        row = {"test_accuracy": 0.7, "seeds": [0], "earlier": {}}
        tasks = {f"{task}@10": {"ksm": row, "linear": row} for task in table.TASKS}
        tasks["trashnet@10"] = {"ksm": {**row, "earlier": earlier}, "linear": row}
        ((found, *_),) = table._few_rows(tasks)
        return str(found)

    assert what({}).endswith("ten images a class, mean")
    assert what({"crop_start": 0.8}).endswith("ten images a class, mean (crops from 80 %)")
    assert what({"join_at": 1.0, "warmup": 0.1}).endswith("ten images a class, mean (earlier settings)")


def test_the_readme_says_what_the_results_say(results: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    demo = "<!-- demo -->\n<!-- /demo -->\n"
    readme.write_text(f"{demo}before\n<!-- results -->\nold\n<!-- /results -->\nafter\n")
    assert readme_table(results, readme, "--check").returncode == 1
    assert "old" in readme.read_text()
    done = readme_table(results, readme)
    assert done.returncode == 0, done.stderr
    text = readme.read_text()
    assert text.startswith("<!-- demo -->\n```\n$ pip install")
    assert "\nTask pack  digits.ksm\n```\n<!-- /demo -->\nbefore\n<!-- results -->\n| measured |" in text
    assert text.endswith("\n<!-- /results -->\nafter\n")
    for words in (
        "| 200 ms | torch, full fine-tuning: 800 ms (ratio 0.25) |",
        "| 91.0 % (90.0 to 92.0, 3 seeds) | classifier only: 89.3 % (a tenth left out) |",
        "| Test accuracy, flowers5, 160 px (earlier settings) | 91.0 %",
        "| Test accuracy, omniglot_small1, 160 px | 91.0 %",
        "| The same five from ten images a class, mean | 71.0 % (2 seeds) | classifier only: 60.0 % |",
        "| 0.00 points of 98.0 % | all their packs together: 400 kB |",
        "| 11.0 ms | plain backbone: 10.0 ms (ratio 1.10) |",
        "| 7.0 ms | making an ONNX Runtime session: 28 ms (ratio 0.25) |",
        "| Latency predicted for each of 2 boards that the fit has not seen | median error 8%, worst factor 1.31 |",
        "| 1.01 to 1.09 of what was measured | held to what was expected: none stopped |",
        "| 96.0 % of held-out digits in 73 s | pack 30 kB, peak RSS 157 MiB |",
        "Some CPU, 2 cores; 2026-01-02. Something else ran on the machine during: startup.",
        "In brackets: what has changed since a task was learned",
    ):
        assert words in text
    assert readme_table(results, readme, "--check").returncode == 0


@pytest.mark.parametrize("name", IN_README)
def test_a_missing_result_names_the_benchmark_to_run(results: Path, tmp_path: Path, name: str) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("<!-- demo -->\n<!-- /demo -->\n<!-- results -->\n<!-- /results -->\n")
    (results / f"{name}.json").unlink()
    done = readme_table(results, readme)
    assert done.returncode == 1
    assert f"run python benchmarks/{name}.py" in done.stderr


def test_a_grid_with_gaps_is_no_result(load: Any, results: Path) -> None:
    accuracy = load("accuracy")
    content = json.loads((results / "accuracy.json").read_text())
    whole = [run for run in content["runs"] if run["identity"]["method"] == "ksm"]
    content["summary"] = accuracy.summary(whole[:-3])
    (results / "accuracy.json").write_text(json.dumps(content))
    lacking = r"lacks omniglot_small1 with seed 0, 1, 2: run python benchmarks/accuracy\.py"
    with pytest.raises(SystemExit, match=lacking):
        load("readme_table").load_whole(results, "accuracy")


@pytest.mark.parametrize("text", ["nothing", "<!-- /results -->\n<!-- results -->", "<!-- results -->" * 2])
def test_a_readme_without_the_markers_is_left_alone(load: Any, text: str) -> None:
    with pytest.raises(SystemExit, match="needs the lines"):
        load("readme_table").between(text, "results", "table", Path("README.md"))


def test_a_board_takes_no_part_in_its_own_prediction(load: Any) -> None:
    fitting_script = load("fitting")
    rows, _ = fitting_script.read_published()
    rows = [row for row in rows if row.kernels == "ncnn" and not row.half]
    fitting = fitting_script.Fitting({})
    found = fitting.leave_one_out(rows, lambda row: row.board)
    assert {row for row, _ in found} == set(rows)
    lying = [replace(row, ms=100 * row.ms) if row.board == "raspberry-pi-4" else row for row in rows]
    again = dict(fitting.leave_one_out(lying, lambda row: row.board))
    for row, predicted in found:
        if row.board == "raspberry-pi-4":  # that row said something else now, and changes nothing
            assert again[replace(row, ms=100 * row.ms)] == pytest.approx(predicted)
    errors = load("prediction")._errors(found)
    assert errors["median_error"] < 0.25
    assert errors["worst_factor"] < 2


def test_a_fit_finds_the_numbers_that_times_were_made_with(load: Any) -> None:
    fitting_script = load("fitting")
    rows, _ = fitting_script.read_published()
    fitting = fitting_script.Fitting({})
    numbers = {name: prior.value for name, prior in fitting_script.PRIORS.items()} | {"traffic": 1.7, "dense": 1.4}
    made = [replace(row, ms=fitting.predicted(row, numbers)) for row in rows if not row.half]
    found = fitting.fit(made)
    assert found["traffic"] == pytest.approx(1.7, rel=0.1)
    assert found["dense"] == pytest.approx(1.4, rel=0.1)


def test_half_precision_is_predicted_with_twice_the_rates(load: Any) -> None:
    fitting_script = load("fitting")
    fitting = fitting_script.Fitting({})
    numbers = {name: prior.value for name, prior in fitting_script.PRIORS.items()} | {"overhead_cycles": 1e-3}
    row = fitting_script.Row("raspberry-pi-5", "ncnn", 4, "mobilenet_v2", 1.0)
    whole, half = (fitting.predicted(replace(row, half=half), numbers) for half in (False, True))
    assert half == pytest.approx(whole / 2, rel=1e-3)


def test_mobilenet_of_half_the_width_is_the_published_one(load: Any) -> None:
    flops = sum(work.flops for work in load("fitting").work_of("mobilenet_v2_half", False, True))
    assert flops / 2e6 == pytest.approx(97, rel=0.03)  # million multiply-adds, Sandler et al. 2018, table 4


def test_the_numbers_in_use_are_those_that_the_script_found(load: Any) -> None:
    path = ROOT / "ksm_edge" / "profiler" / "kernels.toml"
    summary = json.loads((ROOT / "benchmarks" / "results" / "prediction.json").read_text())["summary"]
    assert tomllib.loads(path.read_text()) == summary["kernels"]
    assert summary["training"]["worst_error"] <= summary["floors"]["training_worst_error"]
    assert summary["left_out"]["worst_factor"] <= summary["floors"]["worst_factor"]


def test_layers_are_compared_run_by_run(load: Any) -> None:
    def run(way: str, seed: int, accuracy: float) -> dict[str, Any]:
        identity = {"task": "a", "seed": seed, "way": way}
        return {"identity": identity, "validation_accuracy": accuracy, "pack_bytes": 1000}

    runs = [run("", 0, 0.8), run("", 1, 0.9), run("few", 0, 0.79), run("few", 1, 0.87), run("few", 2, 0.1)]
    row = load("layers").summary(runs)["few"]
    assert (row["runs"], row["accuracy_change"]) == (3, pytest.approx(-0.02))
    assert row["accuracy_change_error"] == pytest.approx(0.01)


def test_layers_are_not_compared_across_settings(load: Any) -> None:
    def run(way: str, **settings: Any) -> dict[str, Any]:
        return {"identity": {"task": "a", "way": way, "settings": {"score_rate": 1, "views": 0, **settings}}}

    without, slow, few = {"identity": {"task": "a", "way": ""}}, run("", score_rate=0.5), run("views=4", views=4)
    layers = load("layers")
    assert layers.STANDING([without, slow, run(""), few]) == [run(""), few]
    together = [
        {"identity": {"task": "a", "settings": layers.settings_by(list(layers._words(way)))}} for way in layers.WAYS
    ]
    assert layers.STANDING(together) == together


def test_runs_of_one_task_amplify_alike_and_those_of_others_need_not(load: Any) -> None:
    def run(task: str, seed: int, amplify: bool | None) -> dict[str, Any]:
        identity = {"method": "ksm", "recipe": "r", "size": 1, "task": task, "seed": seed}
        return {"identity": {**identity, "settings": {"epochs": 8, "amplify": amplify}}}

    old, other, new = [run("many", seed, False) for seed in (0, 1)], run("few", 0, None), run("many", 0, None)
    assert load("accuracy").STANDING([*old, other, new]) == [other, new]
    assert load("accuracy").STANDING([*old, other]) == [*old, other]


def test_a_way_is_what_adapt_takes(load: Any) -> None:
    layers = load("layers")
    assert list(layers._words("layers=35%.. views=4")) == ["--layers", "35%..", "--views", "4"]
    assert layers._settings("layers=35%.. views=4") == {"layers": "35%..", "views": 4}
    assert list(layers._words("train-scale=0.7 layers=a-b..")) == ["--train-scale", "0.7", "--layers", "a-b.."]
    assert layers._settings("train-scale=0.7") == {"train_scale": 0.7}
    assert list(layers._words("")) == []


def test_levers_are_held_against_the_usual_plan(load: Any) -> None:
    levers = load("levers")
    runs = [
        {
            "recipe": "a",
            "lever": lever,
            "step_ms": [ms, ms, 1e6],
            "peak_rss_bytes": peak,
            "activation_bytes": 1,
            **error,
        }
        for lever, ms, peak, error in (
            (levers.USUAL, 40.0, 200, {}),
            ("other", 50.0, 150, {"gradient_error": 1e-4, "largest_gradient_error": 1e-3}),
        )
    ]
    usual, other = levers.summary(runs)["a"].values()
    assert (other["step_ms"], other["time_ratio"], other["saved_bytes"]) == (50.0, 1.25, 50)
    assert (other["gradient_error"], other["largest_gradient_error"]) == (1e-4, 1e-3)
    assert "gradient_error" not in usual


def adaptation_run(rival: str, step_ms: float, batch: int = 8) -> dict[str, Any]:
    return {"recipe": "a", "size": 96, "batch": batch, "threads": 1, "rival": rival, "step_ms": [step_ms, 1.0, 1e6],
            "losses": [2.0, 1.0], "peak_rss_bytes": 100 * batch,
            "flop_rate": 1e9, "bound_flops": 1e7 * batch}  # fmt: skip


def test_adaptation_keeps_what_it_does_not_measure_again(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adaptation, measure, file = load("adaptation"), load("measure"), tmp_path / "adaptation.json"
    monkeypatch.setattr(adaptation, "backbone", lambda *given, **named: nullcontext(tmp_path))
    monkeypatch.setattr(adaptation, "_bound", lambda *given: 1e7)
    monkeypatch.setattr(
        adaptation, "fresh_json",
        lambda command, threads: {"step_ms": [threads], "losses": [2, 1], "peak_rss_bytes": 1, "flop_rate": 1e9,
                                  "cpu_share": threads},
    )  # fmt: skip
    for threads, words in (("1", []), ("2", []), ("2", ["--add"]), ("1", ["--add"])):
        few = ["--recipes", "mobilenet_v2", "--rivals", adaptation.OURS, "--repeats", "1", "--out", str(file)]
        monkeypatch.setattr("sys.argv", ["adaptation.py", *few, "--threads", threads, *words])
        adaptation.main()
    assert [row["threads"] for row in measure.read(file)["summary"]["cases"]] == [2, 1]


def test_adaptation_keeps_torch_for_what_it_does_not_measure_again(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adaptation, measure, file = load("adaptation"), load("measure"), tmp_path / "adaptation.json"

    def added(*rivals: str) -> list[str]:
        words = ["--recipes", "a", "--threads", "1", "--rivals", *rivals, "--repeats", "1", "--add", "--out", str(file)]
        monkeypatch.setattr("sys.argv", ["adaptation.py", *words])
        adaptation.main()
        return [run["rival"] for run in measure.read(file)["runs"]]

    monkeypatch.setattr(adaptation, "RECIPES", ("a", "b"))
    monkeypatch.setattr(adaptation, "backbone", lambda *given, **named: nullcontext(tmp_path))
    monkeypatch.setattr(adaptation, "_runs", lambda case, bundle, options: (
        {**adaptation_run(rival, 100.0), **case} for rival in options.rivals))  # fmt: skip
    ours, fast, full = adaptation.OURS, adaptation.FASTEST, adaptation.FULL
    assert added(ours, fast, full) == [ours, fast, full]
    assert added(fast, full) == [ours, full, fast, full]
    assert added(ours, fast, full) == [ours, fast, full]


def test_adaptation_is_held_against_torch_and_the_bound(load: Any) -> None:
    adaptation = load("adaptation")
    runs = [
        {**adaptation_run(list(adaptation.RIVALS)[-1], 0.0), "absent": "no such package"},
        adaptation_run(adaptation.FULL, 400.0),
        *(adaptation_run(adaptation.OURS, ms) for ms in (90.0, 100.0, 300.0)),
        adaptation_run(adaptation.FASTEST, 50.0),
    ]
    ours, fastest, full, absent = adaptation.summary(runs)  # in the rivals' order
    assert fastest["time_ratio"] == 0.125
    assert "bound_ms" not in fastest  # of what it leaves out there is none
    assert (ours["step_ms"], ours["time_ratio"], ours["memory_ratio"]) == (100.0, 0.25, 1.0)
    assert ours["bound_ms"] == pytest.approx(80.0)
    assert "time_ratio" not in absent
    assert full["time_ratio"] == 1.0
    assert full["learns"]
    (stuck,) = adaptation.summary([{**adaptation_run(adaptation.FULL, 1.0), "losses": [1.0, 1.0]}])
    assert not stuck["learns"]


def test_what_was_measured_at_another_time_is_held_against_torch_of_that_time(load: Any) -> None:
    adaptation = load("adaptation")
    slow = {"commit": "slow", "losses": [2.0, 1.0]}
    runs = [
        adaptation_run(adaptation.OURS, 100.0),
        adaptation_run(adaptation.FASTEST, 50.0),
        adaptation_run(adaptation.FULL, 400.0),
        {**adaptation_run(adaptation.OURS, 150.0), **slow},
        {**adaptation_run(adaptation.FULL, 600.0), **slow},
        {**adaptation_run(load("step_rivals").STANDARD, 80.0), "commit": "other"},
    ]
    ours, standard, fastest, full = adaptation.summary(runs)
    assert [row["step_ms"] for row in (ours, standard, fastest, full)] == [150.0, 80.0, 50.0, 600.0]
    assert [row["time_ratio"] for row in (ours, standard, fastest, full)] == [0.25, 0.2, 0.125, 1.0]


def test_growth_is_the_exponent_over_the_cases_of_one_axis(load: Any) -> None:
    adaptation = load("adaptation")
    runs = [adaptation_run(adaptation.OURS, 10.0 * batch**0.9, batch) for batch in (1, 8, 32)]
    (found,) = adaptation.exponents(runs)
    assert (found["axis"], found["recipe"]) == ("batch", "a")
    assert found["exponent"] == pytest.approx(0.9)


def test_runtimes_are_told_by_their_medians(load: Any) -> None:
    runs = [
        {"way": "a", "tasks": tasks, "rss_bytes": [10] + [10 + 5 * (i + 1) for i in range(tasks)],
         "first_ms": [9.0] + [2.0] * (tasks - 1), "run_ms": [1.0, 3.0, 2.0]}
        for tasks in (1, 2, 5)
    ]  # fmt: skip
    row = load("runtimes").summary(runs)["ways"]["a"]
    assert row == {
        "before_bytes": 10,
        "rss_bytes": {"1": 15, "2": 20, "5": 35},
        "first_ms": 9,
        "next_ms": 2,
        "run_ms": 2,
    }


def test_growth_is_that_of_the_later_half(load: Any) -> None:
    filling = [[0, 0], [100, 900], [200, 1000], [300, 1000]]
    assert load("apps").slope(filling + [[100 * i, 1000 + 300 * (i - 4)] for i in range(4, 8)]) == pytest.approx(3)
    assert load("apps").slope([[0, 5]]) == 0


def test_an_app_is_held_against_one_onnx_file_for_each_task(load: Any) -> None:
    apps = load("apps")
    names = ("pack, prepared graph", "pack, graph optimised each time", "an ONNX file for each task")
    ways = {name: {part: [1.0, 3.0, 2.0] for part in apps.PARTS} | {"bytes": 1000} for name in names}
    ways[names[0]] |= {"session": [0.0, 0.0, 0.0], "bytes": 50}
    found = apps.summary(
        ways,
        {"tasks": 10, "before_bytes": 1000, "after_bytes": 1600},
        {"rss_bytes": [[0, 7], [100, 7]], "ready_switch_ms": 0.1, "peak_rss_bytes": 9, "budget_bytes": 10,
         "board": "b", "switches": 200},
        {"by_processes": {}},
    )  # fmt: skip
    row = found["loads"][names[0]]
    assert (row["total"], row["ratio"], row["bytes_ratio"]) == (8.0, 0.8, 0.05)
    assert (found["loaded_task_bytes"], found["loaded_task_ratio"]) == (60, 1.2)


def test_a_step_in_images_of_two_sizes_takes_what_it_does_on_the_mean_over_the_epochs(load: Any) -> None:
    rivals = load("step_rivals")
    given = {"recipe": "embedded", "size": 96, "batch": 2, "threads": 1, "steps": 2, "bundle": "embedded"}
    found = rivals.RIVALS[rivals.OURS]({**given, "train_scale": 0.5})
    small, whole = found["stages"]
    assert [(stage["size"], stage["epochs"]) for stage in (small, whole)] == [(48, 6), (96, 2)]
    means = [0.75 * s + 0.25 * w for s, w in zip(small["step_ms"], whole["step_ms"], strict=True)]
    assert found["step_ms"] == pytest.approx(means, abs=1e-3)
    assert "stages" not in rivals.RIVALS[rivals.OURS](given)
