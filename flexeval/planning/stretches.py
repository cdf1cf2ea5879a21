"""A context's places in a log as long, evenly spaced stretches and a rest. Integers only; knows no tensor.

A prompt lies in a log place by place. The tokens drawn after it lie as many places apart as sequences stepped together,
for as long as these stay the same. So most of a context can be read where it lies, and only the rest is gathered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from flexeval.planning.rows import Integers

MIN_TOKENS = 64
"""Shorter stretches belong to the rest: gathering them costs less than a call of their own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """Tokens of a context that lie evenly spaced in the log."""

    offset: int
    """First of them in the context."""
    place: int
    """Where it lies in the log."""
    step: int
    """Places from one to the next."""
    length: int
    """How many."""


class Layout(NamedTuple):
    """A context, taken apart."""

    stretches: tuple[Stretch, ...]
    """In order."""
    rest: Integers
    """Offsets in the context of all other tokens, in order."""


def lay_out(places: Integers) -> Layout:
    """Take a context apart, given where each of its tokens lies, in ascending order."""
    steps = np.diff(places)
    assert (steps > 0).all(), "a log is appended to"
    bounds = np.array([0, *(np.flatnonzero(np.diff(steps)) + 1), len(steps)])  # between runs of equal steps
    is_rest = np.ones(len(places), dtype=bool)
    stretches: list[Stretch] = []
    free = 0  # tokens before it are taken: neighbouring runs of steps have a token in common
    for run in np.flatnonzero(np.diff(bounds) >= MIN_TOKENS - 1):
        offset = max(int(bounds[run]), free)
        length = int(bounds[run + 1]) + 1 - offset
        if length >= MIN_TOKENS:
            free = offset + length
            is_rest[offset:free] = False
            step = int(steps[offset])
            stretches.append(Stretch(offset=offset, place=int(places[offset]), step=step, length=length))
    return Layout(tuple(stretches), np.flatnonzero(is_rest))
