"""Where in the model numbers ceased to be any. Knows hidden states layer by layer; not what requests ask.

It is looked for afterwards, in a sweep of a failed request alone: a look at every row of every layer would cost all
other requests a wait for the device.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flexeval.engine.memory.hidden import HiddenStore

MOST_EXPLAINED = 8
"""Failed requests of a batch for which the layer is looked for; each takes a sweep."""
MOST_WITHOUT_ANSWER = 64
"""A batch is given up where so many requests have failed before the first was answered."""
NOT_FINITE = "the model's logits are not finite"


class WatchedHidden(HiddenStore):
    """The hidden states of a sweep, looked at as they come from the embedding and from each layer."""

    def __init__(self, *args: Any, **kwargs: Any):
        """As a `HiddenStore` is made."""
        super().__init__(*args, **kwargs)
        self._num_saved: dict[int, int] = {}
        self._first_broken: int | None = None

    def save(self, row: int, hidden_1TD: Tensor) -> None:
        """Look, and put a row's hidden states to rest."""
        num_before = self._num_saved.get(row, 0)
        self._num_saved[row] = num_before + 1
        is_first = self._first_broken is None or num_before < self._first_broken
        if is_first and not hidden_1TD.isfinite().all():
            self._first_broken = num_before
        super().save(row, hidden_1TD)

    def first_broken(self) -> str | None:
        """What made the first numbers that are none: the embedding or a layer; None where all were finite."""
        if self._first_broken is None:
            return None
        return f"layer {self._first_broken - 1}" if self._first_broken else "the embedding"
