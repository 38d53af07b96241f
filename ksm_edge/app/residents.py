"""Tasks that are ready to run: at most so many at once, of which the one used least recently leaves first."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from ksm_edge.errors import BudgetError
from ksm_edge.pack.calibration import Calibration
from ksm_edge.runtimes.base import Session


@dataclass(frozen=True)
class Resident:
    """One task with its weights in memory."""

    session: Session
    head_weight: np.ndarray  # (C, F)
    head_bias: np.ndarray  # (C,)
    classes: tuple[str, ...]
    calibration: Calibration

    def logits(self, inputs: np.ndarray) -> np.ndarray:
        """Preprocessed images (N, 3, S, S) float32 -> (N, C) float32."""
        return self.session.run(inputs) @ self.head_weight.T + self.head_bias


class _Place:
    """What one of the residents takes: it is there before the resident is, and counts from then on."""

    def __init__(self) -> None:
        self.resident: Resident | None = None
        self.users = 1  # whoever makes it
        self.leaving = False  # True: somebody waits for its room, so it takes no new users


class Residents:
    """Thread-safe. `make` runs outside the lock, so that other tasks answer meanwhile."""

    def __init__(self, make: Callable[[str], Resident], limit: int) -> None:
        self.limit = limit
        self._make = make
        self._places: OrderedDict[str, _Place] = OrderedDict()  # the one used last is at the end
        self._pinned: set[str] = set()
        self._line: deque[object] = deque()  # of threads that need room
        self._changed = threading.Condition()

    @property
    def names(self) -> tuple[str, ...]:
        """Those that are ready, the one used last at the end."""
        with self._changed:
            return tuple(name for name, place in self._places.items() if place.resident is not None)

    @contextmanager
    def use(self, name: str) -> Iterator[Resident]:
        """The resident of that name, made first if need be; it does not leave while it is in use."""
        place = self._enter(name)
        try:
            if place.resident is None:
                place.resident = self._make(name)
                with self._changed:
                    self._changed.notify_all()
            yield place.resident
        finally:
            with self._changed:
                place.users -= 1
                failed, free = place.resident is None, place.leaving and not place.users
                if (failed or free) and self._places.get(name) is place:
                    del self._places[name]
                self._changed.notify_all()

    def pin(self, name: str) -> bool:
        """Keep that task once it is ready; whether that is new. BudgetError where others would have no place left."""
        with self._changed:
            if len(self._pinned | {name}) >= self.limit:
                raise BudgetError(
                    f"task {name!r} cannot be pinned: of {self.limit} sessions one has to be free for all other tasks; "
                    f"there has to be room for {len(self._pinned | {name}) + 1}"
                )
            is_new = name not in self._pinned
            self._pinned.add(name)
            if name in self._places:
                self._places[name].leaving = False
            self._changed.notify_all()
            return is_new

    def unpin(self, name: str) -> None:
        with self._changed:
            self._pinned.discard(name)
            self._changed.notify_all()

    def forget(self, name: str) -> None:
        """Let go of a task, or of what is left of it once whoever is using it is done."""
        with self._changed:
            self._pinned.discard(name)
            self._places.pop(name, None)
            self._changed.notify_all()

    def clear(self) -> None:
        with self._changed:
            self._pinned.clear()
            self._places.clear()
            self._changed.notify_all()

    def _enter(self, name: str) -> _Place:
        """The task's place, counted as in use: either its resident is there, or it is the caller's to make.

        Who needs room stands in line for it: whoever has just left would otherwise be back in before those who wait.
        """
        ticket: object | None = None
        with self._changed:
            try:
                while True:
                    place = self._places.get(name)
                    if place is not None and not place.leaving:
                        if place.resident is not None:
                            self._places.move_to_end(name)
                            place.users += 1
                            return place
                    elif ticket is None:
                        ticket = object()
                        self._line.append(ticket)
                    if place is None and self._line[0] is ticket and self._has_room():
                        self._places[name] = place = _Place()
                        return place
                    self._changed.wait()  # until another thread has made it, or is done with one that is to leave
            finally:
                if ticket is not None:
                    self._line.remove(ticket)
                    self._changed.notify_all()

    def _has_room(self) -> bool:
        """Whether there is, once what may leave has left. If not, the one used least recently is to leave: users that
        come one after the other would otherwise keep it for ever.
        """
        while len(self._places) >= self.limit:
            loose = [(n, place) for n, place in self._places.items() if n not in self._pinned]
            idle = next((n for n, place in loose if not place.users), None)
            if idle is None:
                if loose and not any(place.leaving for _, place in loose):
                    loose[0][1].leaving = True
                return False
            del self._places[idle]
        for place in self._places.values():
            place.leaving = False  # room has come from elsewhere
        return True
