"""Measuring, files of what was measured, and two of them side by side."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import saved_tiny_bundle, tiny_pack

from ksm_edge.errors import DamagedFileError, UnsupportedVersionError, UsageError, WrongBackboneError
from ksm_edge.pack.files import save_pack
from ksm_edge.profiler.child import COLD_PARTS, STEP_PARTS
from ksm_edge.profiler.files import compare_profiles, load_profile, save_profile
from ksm_edge.profiler.plots import plot_profile
from ksm_edge.profiler.profile import measure_profile, summary


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of the tiny backbone and a pack, measured once."""
    folder = tmp_path_factory.mktemp("profile")
    bundle = saved_tiny_bundle(folder / "bundle")
    save_pack(tiny_pack(changes={"backbone": bundle.digest}), folder / "a.ksm")
    return measure_profile(bundle, [folder / "a.ksm"], runs=120, processes=2, batch=4, steps=3)


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
    assert all(len(steps[name]) == 3 for name in STEP_PARTS)
    assert len(steps["losses"]) == 6  # and of three steps before, in which memory settles
    assert all(map(np.isfinite, steps["losses"]))
    times, sizes = zip(*steps["rss_over_time"], strict=True)
    assert list(times) == sorted(times)
    assert max(sizes) <= 1.1 * steps["peak_rss_bytes"]
    assert result["work"]["packs"].keys() == {"a.ksm"}
    assert not result["emulated"]


def test_the_summary_is_of_the_raw_values(result: dict[str, Any]) -> None:
    found = result["summary"]["inference"]["plain backbone"]
    values = sorted(value for part in result["inference"]["plain backbone"]["latency_ms"] for value in part)
    assert (found["n"], found["p50_ms"], found["p95_ms"]) == (120, values[59], values[113])
    assert "p99_ms" not in found  # 120 values say nothing of the hundredth
    steps = result["summary"]["adaptation"]
    parts = [float(np.median(result["adaptation"][f"{name}_ms"])) for name in ("forward", "backward", "update")]
    assert steps["step_ms"] == pytest.approx(sum(parts))
    assert steps["images_per_second"] == pytest.approx(4e3 / sum(parts))


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
        (None, UsageError, "cannot be read: No such file"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str | None, error: type[Exception], message: str) -> None:
    if content is not None:
        (tmp_path / "a.json").write_text(content)
    with pytest.raises(error, match=message):
        load_profile(tmp_path / "a.json")


def slower(result: dict[str, Any], factor: float) -> dict[str, Any]:
    changed = copy.deepcopy(result)
    raw = changed["inference"]["plain backbone"]
    raw["latency_ms"] = [[factor * value for value in part] for part in raw["latency_ms"]]
    return changed


def test_a_result_against_itself_is_one(result: dict[str, Any]) -> None:
    rows = compare_profiles(result, result)["rows"]
    assert all(row["ratio"] in (1, None) for row in rows.values())
    for row in rows.values():
        if "interval" in row:
            assert row["interval"][0] <= 1 <= row["interval"][1]
    assert {name.split(": ")[0] for name in rows} == {"plain backbone", "a.ksm", "adaptation"}


def test_what_is_slower_is_seen_with_its_interval(result: dict[str, Any]) -> None:
    row = compare_profiles(result, slower(result, 2))["rows"]["plain backbone: latency_ms"]
    assert row["ratio"] == pytest.approx(2)
    low, high = row["interval"]
    assert 1 < low <= 2 <= high


def test_the_interval_covers_the_ratio_as_often_as_it_says() -> None:
    """Of 60 pairs of five processes with 30 values each, truly 1.1 apart; processes differ more than their runs."""
    from ksm_edge.profiler.files import _processes, _ratio

    rng, covered = np.random.default_rng(0), 0
    for _ in range(60):
        first, second = (
            _processes([mean * rng.normal(0, 0.05, 1) + mean + rng.normal(0, 0.02, 30) for _ in range(5)])
            for mean in (1.0, 1.1)
        )
        low, high = _ratio(first, second)["interval"]
        covered += low <= 1.1 <= high
    assert 45 <= covered <= 60  # the bootstrap of five is known to be a little narrow


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
