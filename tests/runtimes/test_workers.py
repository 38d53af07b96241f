"""Who runs what, and when, with sessions that only say so."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import ClassVar

import pytest

from ksm_edge.runtimes import workers as module
from ksm_edge.runtimes.workers import Workers


class FakeSession:
    made: ClassVar[list[FakeSession]] = []

    def __init__(self) -> None:
        self.has_run, self.busy = False, False
        FakeSession.made.append(self)


@pytest.fixture(autouse=True)
def pages(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sessions that only say what they do; an item for every call for huge pages."""
    FakeSession.made, pages = [], []
    monkeypatch.setattr(module, "use_huge_pages", lambda: pages.append(running()))
    return pages


def workers(count: int) -> Workers:
    return Workers([FakeSession() for _ in range(count)])  # type: ignore[misc]


def running() -> int:
    return sum(session.busy for session in FakeSession.made)


def work(session: FakeSession, item: int) -> tuple[int, int, int]:
    """The item, the session's number, and how many ran at the same time."""
    assert not session.busy  # nobody else's
    session.busy = True
    time.sleep(0.02 if item % 2 else 0.01)
    found = item, FakeSession.made.index(session), running()
    session.busy, session.has_run = False, True
    return found


@pytest.mark.parametrize("count", [1, 2, 3])
def test_results_come_in_the_order_of_the_items(count: int) -> None:
    found = list(workers(count).map(work, range(10)))  # type: ignore[arg-type]
    assert [item for item, *_ in found] == list(range(10))
    assert [number for _, number, _ in found] == [item % count for item in range(10)]


def test_the_first_of_all_runs_alone_and_then_all_at_once() -> None:
    team, meeting = workers(3), threading.Barrier(3)

    def met(session: FakeSession, item: int) -> int:
        at_once = work(session, item)[-1]
        if item:
            meeting.wait(timeout=10)  # of three, or nobody gets on
        return at_once

    assert next(iter(team.map(met, range(7)))) == 1  # type: ignore[arg-type]
    assert len(list(team.map(met, range(1, 7)))) == 6  # type: ignore[arg-type]


def test_a_run_that_gives_memory_back_is_alone() -> None:
    team, inside, at_once = workers(3), [], {}
    meeting = threading.Barrier(2)
    list(team.map(work, range(3)))  # type: ignore[arg-type]

    def counted(session: FakeSession, item: int) -> None:
        inside.append(item)
        if item < 2:
            meeting.wait(timeout=60)
        work(session, item)
        at_once[item] = len(inside)
        if item < 2:
            meeting.wait(timeout=60)
        inside.remove(item)

    list(team.map(counted, range(9), releases=lambda item: item == 4))  # type: ignore[arg-type]
    assert at_once[4] == 1
    assert at_once[0] >= 2 <= at_once[1]


def test_only_the_time_when_nothing_runs_is_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("ksm_edge.runtimes.workers.time.perf_counter", lambda: clock[0])

    def waited_ms(count: int) -> float:
        """Of four items that take 50 ms each to come by, where a run lasts until the item behind it is there."""
        team, there = workers(count), [threading.Event() for _ in range(5)]
        list(team.map(work, range(count)))  # type: ignore[arg-type]

        def items() -> Iterator[int]:
            for item in range(4):
                clock[0] += 0.05
                there[item].set()
                yield item
            there[4].set()

        def lasting(session: FakeSession, item: int) -> None:
            assert count == 1 or there[item + 1].wait(timeout=60)

        before = team.waited_ms
        list(team.map(lasting, items()))  # type: ignore[arg-type]
        return team.waited_ms - before

    assert waited_ms(1) == pytest.approx(200)
    assert waited_ms(2) == pytest.approx(50)


def test_an_item_is_asked_for_when_there_is_a_session_for_it() -> None:
    team, done = workers(2), []
    asked = [threading.Event() for _ in range(6)]
    list(team.map(work, range(1)))  # type: ignore[arg-type]

    def items() -> Iterator[int]:
        for item in range(6):
            assert len(done) >= item - 1  # all but one before it
            asked[item].set()
            yield item

    def waiting(session: FakeSession, item: int) -> None:
        assert item == 5 or item % 2 or asked[item + 1].wait(timeout=10)  # while it still runs
        done.append(item)

    list(team.map(waiting, items()))  # type: ignore[arg-type]
    assert len(done) == 6


def test_a_failure_arrives_when_nothing_is_running_any_more() -> None:
    team = workers(2)
    list(team.map(work, range(2)))  # type: ignore[arg-type]
    caller = threading.get_ident()

    def failing(session: FakeSession, item: int) -> int:
        assert threading.get_ident() != caller
        if item == 2:
            raise ValueError("the third")
        work(session, item)
        return item

    found = team.map(failing, range(6))  # type: ignore[arg-type]
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(ValueError, match="the third"):
        next(found)
    assert running() == 0


def test_huge_pages_are_asked_for_when_all_have_their_memory_and_nothing_runs(pages: list[int]) -> None:
    team, calls = workers(2), []
    for items, last in ((range(1), -1), (range(1), -1), (range(4), -1), (range(4), -1), (range(4), 3), (range(4), -1)):
        list(team.map(work, items, releases=lambda item, last=last: item == last))  # type: ignore[arg-type]
        calls.append(len(pages))
    assert calls == [0, 0, 0, 1, 1, 2]
    assert not any(pages)
