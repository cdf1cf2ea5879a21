"""A bound on how long somebody else's code may compute. Knows the processor's clock; must not know what is computed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class OutOfTimeError(Exception):
    """The code was still computing; its message says after how long."""


@contextmanager
def within(processor_s: float, *, unless: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Raise `OutOfTimeError` in the block after so many seconds of processor time, and again after as many more.

    Signals reach the main thread alone: in another one, and where there are no such signals, there is no bound.

    Args:
        processor_s: The seconds; waiting does not count.
        unless: Asked when they are over: whether the block may take as long as it likes so far.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGVTALRM"):
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        if not unless():
            raise OutOfTimeError(f"still computing after {processor_s:g} s")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, processor_s, processor_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
