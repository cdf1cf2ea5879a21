"""How a row that is replayed enters the layers: looked up, and brought to where they read it; recorded as well.

Knows the model's beginning; neither its layers nor when a row comes.

Shapes: T tokens of a row, filled up.
"""

from __future__ import annotations

from torch import Tensor

from flexeval.engine.compute.anatomy import Anatomy
from flexeval.engine.compute.frame import Frame
from flexeval.engine.compute.tape import Tape, Tapes


class Entrance:
    """Of rows with so many tokens."""

    def __init__(self, anatomy: Anatomy, tapes: Tapes, ids_1T: Tensor, positions_1T: Tensor):
        """Let the first such row in: what it needs is compiled then, and it shows whether it can be recorded."""
        self._anatomy = anatomy
        self._tapes = tapes
        self._ids_1T, self._positions_1T = ids_1T.clone(), positions_1T.clone()
        self._tape: Tape | None = None
        with tapes.waits() as waits:
            embedded = anatomy.embed(ids_1T, positions_1T)
            self.frame = Frame(embedded)
            """Where the row is afterwards."""
            self.frame.fill(embedded.hidden_1TD, embedded.calls)
        self._is_recordable = not waits

    def enter(self, ids_1T: Tensor, positions_1T: Tensor) -> None:
        """Let another row in, over the one before."""
        self._ids_1T.copy_(ids_1T)
        self._positions_1T.copy_(positions_1T)
        if not self._is_recordable:
            return self._enter()
        if self._tape is None:
            tape = self._tapes.new()
            with self._tapes.recording():
                tape.begin()
                self._enter()
                tape.end()
            self._tape = tape
        self._tape.replay()

    def _enter(self) -> None:
        embedded = self._anatomy.embed(self._ids_1T, self._positions_1T)
        self.frame.fill(embedded.hidden_1TD, embedded.calls)
