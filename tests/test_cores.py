from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ksm_edge import cores
from ksm_edge.cli.main import main
from ksm_edge.data.prefetch import prefetch
from ksm_edge.profiler import child


def board(folder: Path, *capacities: int | str) -> Path:
    """What Linux says of cores of these capacities."""
    for core, capacity in enumerate(capacities):
        (folder / f"cpu{core}").mkdir()
        (folder / f"cpu{core}" / "cpu_capacity").write_text(f"{capacity}\n")
    return folder


@pytest.mark.parametrize(
    ("capacities", "expected"),
    [
        ((1024, 1024, 1024, 1024), {0, 1, 2, 3}),
        ((414, 414, 414, 414, 1024, 1024, 1024, 1024), {4, 5, 6, 7}),  # 4 of 1024 are more than 8 of 414
        ((325, 325, 325, 325, 828, 828, 828, 1024), {4, 5, 6, 7}),  # the fastest alone would be less
        ((485, 485, 485, 485, 1024, 1024), {4, 5} | {0, 1, 2, 3}),  # 6 of 485 are more than 2 of 1024
        ((512, 512, 1024, 1024), {2, 3}),  # of equals the fewer
        ((1024, 1024, 512, 512), {0, 1}),
        ((0, "odd", 1024), {1, 2}),  # what is no number says nothing
    ],
)
def test_cores_are_those_that_do_most_together(
    capacities: tuple[int | str, ...], expected: set[int], tmp_path: Path
) -> None:
    assert cores.fast_cores(range(len(capacities)), board(tmp_path, *capacities)) == expected


def test_only_cores_that_may_be_used_count(tmp_path: Path) -> None:
    assert cores.fast_cores({0, 1}, board(tmp_path, 400, 400, 1024, 1024)) == {0, 1}


def test_without_a_word_from_the_system_all_are_alike(tmp_path: Path) -> None:
    assert cores.fast_cores({2, 5}, tmp_path) == {2, 5}


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, int]]:
    """A fast one and a slow one, of those that there are."""
    before = os.sched_getaffinity(0)
    if len(before) < 2:
        pytest.skip("one core")
    fast, slow = sorted(before)[:2]
    os.sched_setaffinity(0, {fast, slow})
    monkeypatch.setattr(cores, "_before", None)
    monkeypatch.setattr(cores, "fast_cores", lambda: frozenset({fast}))
    yield fast, slow
    os.sched_setaffinity(0, before)


def test_threads_compute_on_fast_cores_and_images_are_made_on_any(two_cores: tuple[int, int]) -> None:
    fast, slow = two_cores
    cores.compute_on_fast_cores(1)
    assert os.sched_getaffinity(0) == {fast}
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(os.sched_getaffinity, 0).result() == {fast}
    assert next(prefetch(os.sched_getaffinity(0) for _ in range(1))) == {fast, slow}
    assert os.sched_getaffinity(0) == {fast}


def test_a_program_that_chooses_its_cores_keeps_them(two_cores: tuple[int, int]) -> None:
    _, slow = two_cores
    os.sched_setaffinity(0, {slow})
    assert next(prefetch(os.sched_getaffinity(0) for _ in range(1))) == {slow}


def test_where_it_is_forbidden_everything_goes_on(two_cores: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*given: object) -> None:
        raise PermissionError

    with monkeypatch.context() as patch:
        patch.setattr(os, "sched_setaffinity", refused)
        cores.compute_on_fast_cores(1)
        patch.setattr(cores, "_before", set(two_cores))
        assert next(prefetch([1])) == 1


def test_adapt_and_what_profile_measures_compute_on_fast_cores(
    two_cores: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast, slow = two_cores
    assert main(["adapt", str(tmp_path / "nothing"), "--threads", "1"]) != 0  # it was pinned before it looked
    assert os.sched_getaffinity(0) == {fast}
    os.sched_setaffinity(0, {fast, slow})
    monkeypatch.setitem(child.MEASURES, "inference", lambda threads: {"cores": list(os.sched_getaffinity(0))})
    (tmp_path / "asked.json").write_text('{"threads": 1}')
    child.main("inference", str(tmp_path / "found.json"), str(tmp_path / "asked.json"))
    assert json.loads((tmp_path / "found.json").read_text()) == {"cores": [fast]}


def test_more_threads_than_fast_cores_have_all(two_cores: tuple[int, int]) -> None:
    cores.compute_on_fast_cores(2)
    assert os.sched_getaffinity(0) == set(two_cores)
