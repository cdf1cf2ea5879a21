"""HELM talks a lot: its log, prints and progress bars go to a file. Knows the streams, not what is said."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import nltk  # type: ignore[import-untyped]


class _Nowhere(io.TextIOBase):
    """A stream that forgets what is written to it."""

    def write(self, s: str, /) -> int:
        return len(s)


@contextmanager
def quiet_import() -> Iterator[None]:
    """Import HELM within the block: its metrics then fetch an NLTK model, aloud, and leave half of it if interrupted.

    Not here: `punkt.missing_for_metrics` fetches the model before a run that needs it.
    """
    download = nltk.download
    nltk.download = lambda *_, **__: False
    try:
        nowhere = _Nowhere()  # never closed: NLTK keeps what it finds as stdout when it is imported
        with redirect_stdout(nowhere), redirect_stderr(nowhere):
            yield
    finally:
        nltk.download = download


@contextmanager
def helm_talks_to(path: Path) -> Iterator[None]:
    """Append to `path` whatever HELM says within the block."""
    path.parent.mkdir(parents=True, exist_ok=True)
    logger = logging.getLogger("helm")
    level, propagate, handlers = logger.level, logger.propagate, logger.handlers
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        handler = logging.StreamHandler(file)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.setLevel(logging.INFO)
        logger.propagate, logger.handlers = False, [handler]
        try:
            with redirect_stdout(file), redirect_stderr(file):
                yield
        finally:
            logger.setLevel(level)
            logger.propagate, logger.handlers = propagate, handlers
