"""Several micro-batches at once, each in a thread of its own.

An operator on one image is too small to be worth cutting up among threads; a whole micro-batch is not. The weights are
there once, what is computed from an image and the accumulators once for each worker.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

import numpy as np

from ksm_edge.resident import use_huge_pages

T = TypeVar("T")
R = TypeVar("R")


class Session(Protocol):
    """One gradient graph, or its forward part alone, bound to parameters and to accumulators."""

    image: np.ndarray  # (n, 3, S, S) float32, or what the graph begins with instead
    target: np.ndarray  # (n, C)
    has_run: bool

    def run(self, *, release: bool = False) -> None:
        """One micro-batch from `image` and `target`: accumulators are added to.

        `release` gives the activations' memory back behind it.
        """
        ...

    def output(self, name: str) -> np.ndarray:
        """The output `name` of the last run, to be read before the next."""
        ...

    @property
    def accumulators(self) -> Mapping[str, np.ndarray]:
        """The arrays that runs add to, by name."""
        ...


class Workers:
    """Sessions of one gradient graph, each for a thread of its own, which share what other threads there are."""

    def __init__(self, sessions: Sequence[Session]) -> None:
        """`sessions`: the first one's accumulators are those that the sums go to."""
        self.first, self._sessions = sessions[0], tuple(sessions)
        self._pool = ThreadPoolExecutor(len(sessions)) if len(sessions) > 1 else None
        self.waited_ms = 0.0  # in all, for items, while nothing ran
        self._ended = 0.0  # when the last run did
        self._memory_settled = False

    def map(
        self,
        work: Callable[[Session, T], R],
        items: Iterable[T],
        *,
        releases: Callable[[T], bool] = lambda item: False,
    ) -> Iterator[R]:
        """The results of `work`, in the items' order; whatever raises, none is left running behind.

        An item is asked for when there is a session for it; which one follows from its number alone, so that the same
        sums come out every time. One whose run `releases` memory runs while no other does.
        """
        running: deque[Future[R]] = deque()
        steady = all(session.has_run for session in self._sessions)  # all have the memory that they will have
        try:
            for number, item in enumerate(self._asked_for(items, running)):
                # The first run of all finds out how much memory the others need.
                alone = releases(item) or not self.first.has_run
                steady = steady and not alone
                yield from _finished(running, down_to=0 if alone else len(self._sessions) - 1)
                running.append(self._start(work, self._sessions[number % len(self._sessions)], item))
                yield from _finished(running, down_to=0 if alone else len(self._sessions) - 1)
            yield from _finished(running, down_to=0)
        finally:
            for future in running:
                future.exception()
        if steady and not self._memory_settled:
            use_huge_pages()  # 4 to 5 % of a step for MobileNetV2 at 224 px, on one core of a virtual EPYC
        self._memory_settled = steady

    def _asked_for(self, items: Iterable[T], running: deque[Future[R]]) -> Iterator[T]:
        iterator = iter(items)
        while True:
            asked = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            if all(future.done() for future in running):
                self.waited_ms += 1e3 * (time.perf_counter() - max(asked, self._ended))
            yield item

    def _start(self, work: Callable[[Session, T], R], session: Session, item: T) -> Future[R]:
        def run() -> R:
            try:
                return work(session, item)
            finally:
                self._ended = time.perf_counter()

        if self._pool is not None:
            return self._pool.submit(run)
        done: Future[R] = Future()
        done.set_result(run())
        return done

    def empty(self) -> None:
        """Set all accumulators to 0."""
        for session in self._sessions:
            for array in session.accumulators.values():
                array.fill(0)

    def gather(self) -> None:
        """Leave the sums over all sessions in the arrays that the first one is bound to."""
        sums = self.first.accumulators
        for session in self._sessions[1:]:
            for name, array in session.accumulators.items():
                sums[name] += array


def _finished(running: deque[Future[R]], *, down_to: int) -> Iterator[R]:
    """The results of the first ones, until no more than so many are running."""
    while len(running) > down_to:
        result = running[0].result()  # still among those that run while it is waited for
        running.popleft()
        yield result
