"""Few of many cases: every pair of values is held, those of two places that another test goes through apart."""

from itertools import combinations, product

import pytest
from pairwise import covering, every_pair

AXES = (range(16), "abcdefg", (None, 8, 4, 2), (False, True))
PLACES = list(combinations(range(len(AXES)), 2))


def pairs(cases, places):
    return {(a, b, case[a], case[b]) for case in cases for a, b in places}


@pytest.mark.parametrize("apart", [[], [(0, 1)], [(1, 2), (0, 3)]])
def test_few_cases_hold_every_pair(apart):
    cases = list(product(*AXES))
    chosen = covering(cases, apart_from=apart)
    held = [pair for pair in PLACES if pair not in apart]
    assert pairs(chosen, held) == pairs(cases, held)
    assert len(chosen) == len(set(chosen)) <= 1.1 * max(len(AXES[a]) * len(AXES[b]) for a, b in held)


def test_the_others_are_slow():
    mark = every_pair("number,letter,is_odd", product(range(3), "xy", [False, True]), apart_from=("number", "letter"))
    names, parameters = mark.args
    assert names == "number,letter,is_odd" and len(parameters) == 12
    fast = [one.values for one in parameters if not one.marks]
    assert pairs(fast, [(0, 2), (1, 2)]) == pairs(product(range(3), "xy", [False, True]), [(0, 2), (1, 2)])
    assert len(fast) == 6 and parameters[0].id == "0-x-False"
