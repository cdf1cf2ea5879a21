"""Contexts in a log as batches of evenly spaced tokens and a rest. Integers only; knows no tensor.

A prompt lies in a log place by place. The tokens drawn after it lie as many places apart as sequences stepped together,
for as long as these stay the same. Such stretches of several contexts often lie evenly spaced as well: prompts of one
length that entered together, and what was drawn in the same steps. So most of a group's contexts can be read where they
lie, as a few arrays with strides, and only the rest is gathered.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from flexeval.planning.rows import Integers

MIN_LENGTH = 8
"""Tokens of a stretch: a shorter one costs more to merge with the others than to gather."""
MIN_TOKENS = 64
"""Tokens of a batch: gathering fewer costs less than a call of their own."""
MIN_PART_TOKENS = 128
"""Tokens of the parts of a stretch that is cut."""


class _Stretch(NamedTuple):
    """Evenly spaced tokens of one context."""

    place: int
    """Where the first lies."""
    sequence: int
    """Whose."""
    offset: int
    """The first of them in the context."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Parts of contexts that lie alike in a log, evenly spaced."""

    sequences: tuple[int, ...]
    """Whose context each part is of."""
    place: int
    """Where the first token of the first part lies."""
    spacing: int
    """Places from a part to the next."""
    step: int
    """Places from a token of a part to the next."""
    length: int
    """Tokens of a part."""

    @property
    def places(self) -> Integers:
        """Where each token of each part lies."""
        starts = self.place + self.spacing * np.arange(len(self.sequences))
        return starts[:, None] + self.step * np.arange(self.length)

    @property
    def stop(self) -> int:
        """The place behind the last token."""
        return self.place + (len(self.sequences) - 1) * self.spacing + (self.length - 1) * self.step + 1


class Layout(NamedTuple):
    """Contexts, taken apart."""

    batches: tuple[Batch, ...]
    rest: tuple[Integers, ...]
    """Per sequence, the places of all its other tokens, in order."""


def lay_out(contexts: Sequence[Integers], *, num_parts: int) -> Layout:
    """Take contexts apart.

    Args:
        contexts: Per sequence, where each of its tokens lies, in ascending order.
        num_parts: So many parts together keep all of a CPU busy. Stretches that less than half as many others go with
            are cut.
    """
    is_rest = [np.ones(len(places), dtype=bool) for places in contexts]
    alike: dict[tuple[int, int], list[_Stretch]] = {}
    for sequence, places in enumerate(contexts):
        for run in even_runs(places, shortest=MIN_LENGTH):
            step = int(places[run.start + 1] - places[run.start])
            alike.setdefault((step, len(run)), []).append(_Stretch(int(places[run.start]), sequence, run.start))
    batches: list[Batch] = []
    for (step, length), stretches in alike.items():
        for batch in _evenly_spaced(sorted(stretches)):
            if len(batch) * length < MIN_TOKENS:
                continue
            pieces = max(1, min(num_parts, length // MIN_PART_TOKENS)) if 2 * len(batch) < num_parts else 1
            batches += _cut(batch, step, length, pieces) if pieces > 1 else [_joined(batch, step, length)]
            for stretch in batch:  # what does not divide is left
                is_rest[stretch.sequence][stretch.offset : stretch.offset + length - length % pieces] = False
    rest = tuple(places[is_left] for places, is_left in zip(contexts, is_rest, strict=True))
    return Layout(tuple(batches), rest)


def even_runs(places: Integers, *, shortest: int) -> Iterator[range]:
    """Which of some ascending places lie evenly spaced, at least `shortest` (two or more) in a run."""
    steps = np.diff(places)
    assert (steps > 0).all(), "a log is appended to"
    bounds = np.array([0, *(np.flatnonzero(np.diff(steps)) + 1), len(steps)])  # between runs of equal steps
    free = 0  # what lies before it is taken: neighbouring runs of steps have a place in common
    for run in np.flatnonzero(np.diff(bounds) >= shortest - 1):
        start, stop = max(int(bounds[run]), free), int(bounds[run + 1]) + 1
        if stop - start >= shortest:
            free = stop
            yield range(start, stop)


def _evenly_spaced(stretches: Sequence[_Stretch]) -> Iterator[Sequence[_Stretch]]:
    """Stretches in order of their places, apart where they are not evenly spaced."""
    done = 0
    for run in even_runs(np.array([stretch.place for stretch in stretches]), shortest=2):
        yield from ([stretch] for stretch in stretches[done : run.start])
        yield stretches[run.start : run.stop]
        done = run.stop
    yield from ([stretch] for stretch in stretches[done:])


def _joined(stretches: Sequence[_Stretch], step: int, length: int) -> Batch:
    """Evenly spaced stretches as they are."""
    return Batch(
        sequences=tuple(stretch.sequence for stretch in stretches),
        place=stretches[0].place,
        spacing=stretches[1].place - stretches[0].place if len(stretches) > 1 else 0,
        step=step,
        length=length,
    )


def _cut(stretches: Iterable[_Stretch], step: int, length: int, pieces: int) -> Iterator[Batch]:
    """Each stretch by itself in equal parts, which lie evenly spaced."""
    part = length // pieces
    for stretch in stretches:
        yield Batch(
            sequences=(stretch.sequence,) * pieces, place=stretch.place, spacing=part * step, step=step, length=part
        )
