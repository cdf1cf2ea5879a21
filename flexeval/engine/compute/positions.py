"""Which tokens of a row are read off, and cut in which chunks. Knows indices; not logits.

Shapes: W wanted tokens of a row, R those of a chunk, S scores, G generators, N both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from flexeval.engine.compute import keeping
from flexeval.planning.rows import Integers, RowPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Tokens whose logits are there at once, and what is read off them."""

    index_R: slice | Tensor
    """The tokens of the row."""
    shifts_R: Tensor
    """Their `keeping.shifts`, where these are wanted."""
    scored_S: Tensor
    """After which of these, counted from the chunk's first, a prompt token is scored, ..."""
    token_ids_S: Tensor
    """... and which."""
    drawn_G: Tensor
    """After which of these a token is drawn, ..."""
    generators: tuple[tuple[int, int], ...]
    """... as in the plan."""
    is_drawn_only: bool
    """Whether that is one token after each of these, and nothing is scored."""


class Positions:
    """The tokens of a row after which anything is scored or drawn, each once."""

    def __init__(self, plan: RowPlan):
        """Take what the plan asks for, which lies in ascending order."""
        offsets_G = np.array([offset for offset, _ in plan.generators], dtype=np.int64)
        offsets_N = np.concatenate([plan.scores.offsets, offsets_G])
        self._plan = plan
        self.wanted_W, self.place_N = np.unique(offsets_N, return_inverse=True)
        """Tokens of the row, and at which of them each score, then each generator, is read."""
        self._place_S, self._place_G = self.place_N[: len(plan.scores)], self.place_N[len(plan.scores) :]
        assert (np.diff(self._place_S) >= 0).all() and (np.diff(self._place_G) >= 0).all(), (plan.scores, offsets_G)

    def chunks(self, size: int, device: torch.device, *, has_shifts: bool = False) -> Iterator[Chunk]:
        """All of them, `size` at a time; their indices go to the device at once."""
        tokens_W = self.wanted_W if has_shifts else self.wanted_W[:0]
        shifts = keeping.shifts(self._plan.token_ids[tokens_W], self._plan.positions[tokens_W])
        lists = (self.wanted_W, shifts, self._place_S % size, self._plan.scores.token_ids, self._place_G % size)
        values = torch.from_numpy(np.concatenate(lists)).to(device, non_blocking=True)
        wanted_W, shifts_W, scored, token_ids, drawn = values.split([len(entries) for entries in lists])
        cuts = [*range(0, len(self.wanted_W), size), len(self.wanted_W)]
        slices_S, slices_G = _slices(self._place_S, cuts), _slices(self._place_G, cuts)
        for (start, stop), of_S, of_G in zip(pairwise(cuts), slices_S, slices_G, strict=True):
            first, last = int(self.wanted_W[start]), int(self.wanted_W[stop - 1])
            is_run = last - first == stop - 1 - start
            yield Chunk(
                index_R=slice(first, last + 1) if is_run else wanted_W[start:stop],
                shifts_R=shifts_W[start:stop],
                scored_S=scored[of_S],
                token_ids_S=token_ids[of_S],
                drawn_G=drawn[of_G],
                generators=self._plan.generators[of_G],
                is_drawn_only=of_S.start == of_S.stop and of_G.stop - of_G.start == stop - start,
            )


def _slices(places: Integers, cuts: list[int]) -> list[slice]:
    """Of ascending places, those in each part between two cuts."""
    return [slice(first, stop) for first, stop in pairwise(np.searchsorted(places, cuts).tolist())]
