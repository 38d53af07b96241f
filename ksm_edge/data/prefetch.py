"""Values made by a thread before they are asked for, so that a training step does not wait for its images."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterable
from queue import SimpleQueue
from typing import TypeVar

from ksm_edge.cores import run_anywhere

T = TypeVar("T")


def prefetch(values: Iterable[T], depth: int = 2) -> Generator[T, None, None]:
    """The same values, with at most `depth` made or in the making ahead of the consumer.

    The thread starts with the first value asked for and has ended when the generator ends or is closed; `values` is
    then closed too, where it can be. What `values` raises is raised here, in its turn.
    """
    made: SimpleQueue[tuple[bool, T | BaseException | None]] = SimpleQueue()
    room = threading.Semaphore(depth)
    stop = threading.Event()
    thread = threading.Thread(target=_make, args=(values, made, room, stop), name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            more, value = made.get()
            if more:
                room.release()
                yield value  # type: ignore[misc]  # a value, as the flag says
            elif value is None:
                return
            else:
                raise value  # type: ignore[misc]  # an exception, as the flag says
    finally:
        stop.set()
        room.release()
        thread.join()


def _make(
    values: Iterable[T],
    made: SimpleQueue[tuple[bool, T | BaseException | None]],
    room: threading.Semaphore,
    stop: threading.Event,
) -> None:
    """The thread: (True, value) for each, then (False, None), or (False, the exception)."""
    iterator = iter(values)
    try:
        run_anywhere()
        while True:
            room.acquire()
            if stop.is_set():
                break
            made.put((True, next(iterator)))
    except StopIteration:
        made.put((False, None))
    except BaseException as error:  # noqa: BLE001 - raised again in the consumer's thread
        made.put((False, error))
    finally:
        close = getattr(iterator, "close", None)
        if close is not None:
            close()
