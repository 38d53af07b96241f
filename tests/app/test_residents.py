"""At most so many tasks are ready at once, whatever threads ask for, and none leaves that is pinned or in use."""

from __future__ import annotations

import threading
import time
from random import Random

import numpy as np
import pytest

from ksm_edge.app.residents import Resident, Residents
from ksm_edge.errors import BudgetError
from ksm_edge.pack.calibration import Calibration


class Maker:
    """Makes residents that say their name, and counts how many are there."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.made: list[str] = []
        self.seconds = seconds

    def __call__(self, name: str) -> Resident:
        time.sleep(self.seconds)
        if name == "broken":
            raise RuntimeError("cannot be made")
        self.made.append(name)
        return Resident(None, np.zeros(0), np.zeros(0), (name,), Calibration())  # type: ignore[arg-type]


def used(residents: Residents, *names: str) -> None:
    for name in names:
        with residents.use(name) as resident:
            assert resident.classes == (name,)


def test_the_one_used_least_recently_leaves() -> None:
    residents = Residents(make := Maker(), limit=2)
    used(residents, "a", "b", "a", "c", "a", "b")
    assert make.made == ["a", "b", "c", "b"]
    assert residents.names == ("a", "b")


def test_a_pinned_one_stays_and_leaves_again_once_unpinned() -> None:
    residents = Residents(make := Maker(), limit=2)
    residents.pin("a")
    used(residents, "a", "b", "c", "b")
    assert residents.names == ("a", "b")
    residents.unpin("a")
    used(residents, "c")
    assert residents.names == ("b", "c")
    assert make.made == ["a", "b", "c", "b", "c"]


def test_pins_leave_a_place_for_the_others() -> None:
    residents = Residents(Maker(), limit=2)
    residents.pin("a")
    residents.pin("a")
    with pytest.raises(BudgetError, match=r"'b' cannot be pinned: of 2 sessions one has to be free.*room for 3"):
        residents.pin("b")


def test_one_that_cannot_be_made_leaves_no_trace() -> None:
    residents = Residents(Maker(), limit=1)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="cannot be made"):
            used(residents, "broken")
    used(residents, "a")
    assert residents.names == ("a",)


def test_one_that_is_forgotten_in_use_is_made_anew_for_the_next() -> None:
    residents = Residents(make := Maker(), limit=1)
    with residents.use("a") as first:
        residents.forget("a")
        with residents.use("a") as second:
            assert second is not first
    assert residents.names == ("a",)
    assert make.made == ["a", "a"]


def test_one_in_use_does_not_leave_before_its_user_is_done() -> None:
    residents = Residents(Maker(), limit=1)
    order: list[str] = []

    def other() -> None:
        with residents.use("b"):
            order.append("b is ready")

    with residents.use("a"):
        thread = threading.Thread(target=other)
        thread.start()
        time.sleep(0.05)
        order.append("a is done")
    thread.join()
    assert order == ["a is done", "b is ready"]


def test_one_that_was_to_leave_stays_where_room_has_come_from_another() -> None:
    residents = Residents(make := Maker(), limit=2)
    other = threading.Thread(target=used, args=(residents, "c"))
    with residents.use("a"):
        with residents.use("b"):
            other.start()
            deadline = time.monotonic() + 60
            while not residents._places["a"].leaving:
                assert time.monotonic() < deadline
                time.sleep(0.001)
        other.join(60)  # in the place of "b", which was done first
    assert residents.names == ("a", "c")
    used(residents, "a")
    assert make.made == ["a", "b", "c"]


def test_users_that_follow_each_other_do_not_keep_another_task_out() -> None:
    residents, done = Residents(Maker(), limit=1), threading.Event()

    def busy() -> None:
        while not done.is_set():
            with residents.use("a"):
                time.sleep(0.01)

    workers = [threading.Thread(target=busy) for _ in range(4)]
    for worker in workers:
        worker.start()
        time.sleep(0.003)  # so that one of them is always inside
    other = threading.Thread(target=used, args=(residents, "b"))
    other.start()
    other.join(5)
    was_let_in = not other.is_alive()
    done.set()
    for worker in (*workers, other):
        worker.join()
    assert was_let_in


def test_others_answer_while_one_is_being_made() -> None:
    residents, make = Residents(Maker(), limit=2), Maker()
    begun, goes_on = threading.Event(), threading.Event()
    used(residents, "a")

    def held_up(name: str) -> Resident:
        begun.set()
        assert goes_on.wait(60)
        return make(name)

    residents._make = held_up
    thread = threading.Thread(target=used, args=(residents, "slow"))
    thread.start()
    assert begun.wait(60)
    used(residents, "a")
    assert residents.names == ("a",)  # and "slow" is still on its way
    goes_on.set()
    thread.join()
    assert set(residents.names) == {"a", "slow"}


@pytest.mark.parametrize("limit", [1, 3])
def test_sixteen_threads_never_have_more_than_the_limit_and_each_its_own(limit: int) -> None:
    residents = Residents(make := Maker(0.001), limit)
    inside: list[str] = []
    lock, faults = threading.Lock(), []

    def work(seed: int) -> None:
        random = Random(seed)
        for _ in range(20):
            name = random.choice("abcde")
            with residents.use(name) as resident:
                with lock:
                    inside.append(name)
                    if len(set(inside)) > limit or resident.classes != (name,):
                        faults.append((name, list(inside)))
                time.sleep(0.0005)
                with lock:
                    inside.remove(name)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert len(residents.names) <= limit
    assert len(make.made) >= 5
