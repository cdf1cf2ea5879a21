"""Matrices of cases too long to be run whole each time: a few that hold every pair of values run, the rest is slow."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import combinations
from typing import Any

import pytest

Case = tuple[Any, ...]


def covering(cases: list[Case], *, apart_from: Iterable[tuple[int, int]] = ()) -> list[Case]:
    """As few of the cases as hold every pair of values of two places that any case holds; greedy.

    Pairs of the places `apart_from` need not be held.
    """
    places = [pair for pair in combinations(range(len(cases[0])), 2) if pair not in set(apart_from)]
    pairs_of = {case: {(a, b, case[a], case[b]) for a, b in places} for case in cases}
    missing, chosen = set[Any]().union(*pairs_of.values()), []
    while missing:
        chosen.append(max(cases, key=lambda case: len(pairs_of[case] & missing)))  # the first of those that hold most
        missing -= pairs_of[chosen[-1]]
    return chosen


def every_pair(
    names: str, cases: Iterable[Case], *, apart_from: tuple[str, str] | None = None, ids: Callable[[Any], str] = str
) -> pytest.MarkDecorator:
    """Parametrize a test by cases, of which a few that hold every pair of values are not slow.

    Another test goes through the pairs of the two parameters `apart_from`.
    """
    cases, places = list(cases), names.split(",")
    chosen = covering(cases, apart_from=[] if apart_from is None else [tuple(map(places.index, apart_from))])
    return pytest.mark.parametrize(
        names,
        [
            pytest.param(*case, marks=() if case in chosen else pytest.mark.slow, id="-".join(map(ids, case)))
            for case in cases
        ],
    )
