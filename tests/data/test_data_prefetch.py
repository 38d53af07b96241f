import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksm_edge.data.prefetch import prefetch


def prefetching():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@given(st.lists(st.none() | st.integers()), st.integers(1, 5))
def test_values_come_unchanged_and_in_order(values, depth):
    assert list(prefetch(values, depth)) == values
    assert not prefetching()


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()])
def test_an_exception_is_raised_in_its_turn(error):
    def values():
        yield 1
        yield 2
        raise error

    stream = prefetch(values())
    assert [next(stream), next(stream)] == [1, 2]
    with pytest.raises(type(error)) as caught:
        next(stream)
    assert caught.value is error
    assert not prefetching()


def test_stopping_early_ends_the_thread_and_closes_the_source():
    closed = []

    def values():
        try:
            yield from range(1000)
        finally:
            closed.append(threading.current_thread().name)

    stream = prefetch(values())
    assert next(stream) == 0
    stream.close()
    assert closed == ["prefetch"]
    assert not prefetching()


def test_a_consumer_that_fails_ends_the_thread():
    def consume():
        for value in prefetch(range(1000)):
            raise RuntimeError(value)

    with pytest.raises(RuntimeError):
        consume()
    assert not prefetching()


def test_no_more_than_depth_are_made_ahead():
    made = []

    def values():
        for value in range(50):
            made.append(value)
            yield value

    stream = prefetch(values(), depth=3)
    for taken in range(1, 10):
        next(stream)
        time.sleep(0.002)
        assert len(made) <= taken + 3
    stream.close()


def test_values_are_made_while_the_consumer_works():
    made = [threading.Event() for _ in range(5)]

    def values():
        for value, event in enumerate(made):
            event.set()
            yield value

    for value in prefetch(values()):
        assert made[min(value + 1, 4)].wait(timeout=10)


def test_nothing_starts_before_the_first_value_is_asked_for():
    stream = prefetch(range(3))
    assert not prefetching()
    stream.close()
