"""Measuring, files of what was measured, and two of them side by side."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import saved_tiny_bundle, tiny_pack

from ksm_edge import native
from ksm_edge.errors import BudgetError, DamagedFileError, UnsupportedVersionError, UsageError, WrongBackboneError
from ksm_edge.pack.files import save_pack
from ksm_edge.profiler.child import COLD_PARTS, STEP_PARTS
from ksm_edge.profiler.files import _ratio, compare_profiles, load_profile, save_profile
from ksm_edge.profiler.plots import plot_profile
from ksm_edge.profiler.profile import measure_profile, summary
from ksm_edge.runtimes import trial
from ksm_edge.runtimes.trial import Trial


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of the tiny backbone and a pack, measured once."""
    folder = tmp_path_factory.mktemp("profile")
    bundle = saved_tiny_bundle(folder / "bundle")
    save_pack(tiny_pack(changes={"backbone": bundle.digest}), folder / "a.ksm")
    return measure_profile(bundle, [folder / "a.ksm"], runs=120, processes=2, batch=4, steps=4)


def test_raw_values_are_all_there(result: dict[str, Any]) -> None:
    assert list(result["inference"]) == ["plain backbone", "a.ksm"]
    for raw in result["inference"].values():
        assert [len(part) for part in raw["latency_ms"]] == [60, 60]
        assert set(raw["cold"]) == set(COLD_PARTS)
        assert all(len(values) == 2 and min(values) >= 0 for values in raw["cold"].values())
        assert min(raw["peak_rss_bytes"]) >= max(raw["baseline_bytes"]) > 20 << 20
        assert 0 < min(raw["pss_bytes"]) <= max(raw["rss_bytes"])
        assert {"Conv 3x3", "Conv 3x3 depthwise", "Conv 1x1", "GlobalAveragePool"} <= raw["operators_ms"].keys()
        assert list(raw["operators_ms"].values()) == sorted(raw["operators_ms"].values(), reverse=True)
    steps = result["adaptation"]
    for name in STEP_PARTS:
        assert [len(values) for values in steps[name]] == [2, 2]
    assert all(len(losses) == 5 and all(map(np.isfinite, losses)) for losses in steps["losses"])  # 3 more, to settle
    for samples, peak in zip(steps["rss_over_time"], steps["peak_rss_bytes"], strict=True):
        times, sizes = zip(*samples, strict=True)
        assert list(times) == sorted(times)
        assert max(sizes) <= 1.1 * peak
    assert result["work"]["packs"].keys() == {"a.ksm"}
    assert not result["emulated"]


def test_operators_that_are_wrong_here_are_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if native.operators is None:
        pytest.skip("installed without a C compiler")
    bundle = saved_tiny_bundle(tmp_path / "bundle")
    for name in ("trial", "known"):
        monkeypatch.setattr(trial, name, lambda: Trial(0.3, None))
    found = measure_profile(bundle, runs=2, processes=1, batch=4, steps=1)["warnings"]
    assert any(warning.startswith("adaptation: by standard operators, as this project's own") for warning in found)


def test_the_summary_is_of_the_raw_values(result: dict[str, Any]) -> None:
    found = result["summary"]["inference"]["plain backbone"]
    values = sorted(value for part in result["inference"]["plain backbone"]["latency_ms"] for value in part)
    assert (found["n"], found["p50_ms"], found["p95_ms"]) == (120, values[59], values[113])
    assert "p99_ms" not in found  # 120 values say nothing of the hundredth
    steps = result["summary"]["adaptation"]
    gradient, update, forward = (
        float(np.median(result["adaptation"][f"{n}_ms"])) for n in ("gradient", "update", "forward")
    )
    assert steps["step_ms"] == pytest.approx(gradient + update)
    assert steps["backward_ms"] == pytest.approx(gradient - forward)
    assert steps["images_per_second"] == pytest.approx(4e3 / (gradient + update))


def test_a_pack_of_another_backbone_is_refused(tmp_path: Path) -> None:
    bundle = saved_tiny_bundle(tmp_path / "bundle")
    save_pack(tiny_pack(changes={"backbone": "0" * 64}), tmp_path / "a.ksm")
    with pytest.raises(WrongBackboneError):
        measure_profile(bundle, [tmp_path / "a.ksm"], runs=2, processes=1, steps=0)


def test_a_file_gives_back_what_was_written(result: dict[str, Any], tmp_path: Path) -> None:
    save_profile(result, tmp_path / "a.json")
    assert load_profile(tmp_path / "a.json") == json.loads(json.dumps(result))


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ("{", DamagedFileError, "is no JSON"),
        ("[]", DamagedFileError, "no profile result: write one with ksm-edge profile --out"),
        ('{"kind": "ksm-edge profile", "version": 99}', UnsupportedVersionError, "version 99"),
        ('{"kind": "ksm-edge profile"}', UnsupportedVersionError, "version None"),
        ('{"kind": "ksm-edge profile", "version": 2}', DamagedFileError, "is damaged: work: is no table"),
        (None, UsageError, "cannot be read: No such file"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str | None, error: type[Exception], message: str) -> None:
    if content is not None:
        (tmp_path / "a.json").write_text(content)
    with pytest.raises(error, match=message):
        load_profile(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["machine"].pop("cpu"), "machine: cpu is missing"),
        (lambda r: r["work"].update(size="96"), "work: size is missing or of another type"),
        (lambda r: r["inference"].pop("plain backbone"), "no inference of the plain backbone"),
        (lambda r: r["inference"]["a.ksm"].update(latency_ms=[[1.0, "x"]]), "a.ksm: latency_ms are no times"),
        (lambda r: r["inference"]["a.ksm"].update(latency_ms=[[1.0, -1.0]]), "a.ksm: latency_ms are no times"),
        (lambda r: r["inference"].update({"a.ksm": 3}), "a.ksm: is no table"),
        (lambda r: r["inference"]["a.ksm"]["cold"].pop("fuse_ms"), "a.ksm: cold fuse_ms is missing"),
        (lambda r: r["adaptation"].update(update_ms=[[0.0]]), "adaptation: update_ms are no times"),
        (lambda r: r.update(adaptation=[]), "adaptation: is no table"),
    ],
)
def test_damaged_files_say_where(
    result: dict[str, Any], tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    damaged = copy.deepcopy(result)
    change(damaged)
    save_profile(damaged, tmp_path / "a.json")
    with pytest.raises(DamagedFileError, match=message):
        load_profile(tmp_path / "a.json")


def more_processes(result: dict[str, Any], factor: float = 1.0, count: int = 5) -> dict[str, Any]:
    """As if that many had measured, each a little slower than the one before, and all by the factor."""
    changed = copy.deepcopy(result)
    raw = changed["inference"]["plain backbone"]
    first = raw["latency_ms"][0]
    raw["latency_ms"] = [[factor * (1 + 0.01 * i) * value for value in first] for i in range(count)]
    return changed


def test_a_result_against_itself_is_one(result: dict[str, Any]) -> None:
    rows = compare_profiles(result, result)["rows"]
    assert all(row["ratio"] == pytest.approx(1) for row in rows.values())
    assert {name.split(": ")[0] for name in rows} == {"plain backbone", "a.ksm", "adaptation"}
    assert "plain backbone: decode_ms" not in rows  # there is nothing to decode
    assert not any("interval" in row for row in rows.values())  # two processes say nothing of how far they differ


def test_what_is_slower_is_seen_with_its_interval(result: dict[str, Any]) -> None:
    found = compare_profiles(more_processes(result), more_processes(result, 2))
    row = found["rows"]["plain backbone: latency_ms"]
    assert row["ratio"] == pytest.approx(2)
    low, high = row["interval"]
    assert 1.9 < low < 2 < high < 2.1
    assert [source["emulated"] for source in found["of"]] == [False, False]


def test_the_interval_covers_the_ratio_as_often_as_it_says() -> None:
    """Five processes against five, truly 1.1 apart, 400 times: 95 % of the intervals, and a little more."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(400):
        low, high = _ratio(rng.lognormal(0, 0.05, 5).tolist(), rng.lognormal(np.log(1.1), 0.05, 5).tolist())["interval"]
        covered += low <= 1.1 <= high
    assert 375 <= covered <= 398


def test_two_packs_of_one_name_are_refused(tmp_path: Path) -> None:
    bundle = saved_tiny_bundle(tmp_path / "bundle")
    with pytest.raises(UsageError, match=r"two of the packs are called a\.ksm"):
        measure_profile(bundle, [tmp_path / "x" / "a.ksm", tmp_path / "a.ksm"])


def test_what_does_not_fit_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="the budget is 1 MiB"):
        measure_profile(saved_tiny_bundle(tmp_path / "bundle"), budget_bytes=1 << 20)


@pytest.mark.parametrize(("name", "value"), [("backbone", "x"), ("size", 8), ("threads", 9), ("batch", 1)])
def test_different_work_is_not_compared(result: dict[str, Any], name: str, value: object) -> None:
    other = {**result, "work": {**result["work"], name: value}}
    with pytest.raises(UsageError, match=f"different work: {name} "):
        compare_profiles(result, other)


def test_different_packs_of_one_name_are_not_compared(result: dict[str, Any]) -> None:
    other = {**result, "work": {**result["work"], "packs": {"a.ksm": "another"}}}
    with pytest.raises(UsageError, match=r"a\.ksm is not the same pack"):
        compare_profiles(result, other)


def test_plots_are_drawn(result: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    written = plot_profile(result, tmp_path / "plots")
    assert {path.name for path in written} == {
        f"{name}.{suffix}" for name in ("latency", "operators", "memory") for suffix in ("png", "svg")
    }
    assert all(path.stat().st_size > 1000 for path in written)
    assert summary(result) == result["summary"]  # drawing changes nothing
