"""Being told to stop, at a good moment: half an optimizer step is nothing a training could go on from."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

TERMINATING = (signal.SIGTERM, signal.SIGHUP)  # a shutdown, a lost connection


@contextmanager
def interrupt_held_back() -> Iterator[None]:
    """Inside, Ctrl-C waits, and what else raises in its way; it comes when the block has ended.

    Does nothing outside the main thread, as signals do.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        waiting.append(number)

    # A shell's background job ignores SIGINT, and goes on doing so.
    before = {n: handler for n in (signal.SIGINT, *TERMINATING) if callable(handler := signal.getsignal(n))}
    for number in before:
        signal.signal(number, remember)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if waiting:
        signal.raise_signal(waiting[0])


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise KeyboardInterrupt, as Ctrl-C does; not where they are ignored, as by nohup."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [number for number in TERMINATING if signal.getsignal(number) is signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
