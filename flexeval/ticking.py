"""Something done again and again beside other work. Knows a thread; not what is done."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def ticking(tick: Callable[[], None], *, every_s: float) -> Iterator[None]:
    """Call `tick` every so many seconds on a thread of its own while the block runs; never once it has ended."""
    is_over = threading.Event()

    def run() -> None:
        while not is_over.wait(every_s):
            tick()

    thread = threading.Thread(target=run, name="ticking", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
