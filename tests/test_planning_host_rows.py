"""The CPU takes its share of the rows, spread over the depth, and no row that it may not."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexeval.planning.host_rows import host_rows
from flexeval.planning.rows import SHARED, Compaction, DecodeSpan, FreshSpan, RowPlan


def decode_row(*rewritten: int) -> RowPlan:
    one = np.zeros(1, dtype=np.int32)
    span = DecodeSpan(group=0, start=0, log_length=0, own_tokens=[one], first_own_positions=[0], version=1)
    compactions = tuple(Compaction(group=group, log_length=1, places=one) for group in rewritten)
    return RowPlan(token_ids=one, positions=one, decode=(span,), compactions=compactions)


FRESH = RowPlan(token_ids=np.zeros(3), positions=np.zeros(3), fresh=(FreshSpan(node=0, start=0, length=3),))


def counts(plans: list[RowPlan], share: float, *, is_on_host: list[bool] | None = None) -> list[int]:
    return [len(rows) for rows in host_rows(plans, is_on_host=is_on_host or [True] * 6, share=share)]


@given(num_rows=st.integers(0, 9), thousandths=st.integers(0, 1000), is_on_host=st.lists(st.booleans(), min_size=1))
def test_the_share_comes_true_at_any_depth(num_rows: int, thousandths: int, is_on_host: list[bool]) -> None:
    rows = host_rows([*[decode_row()] * num_rows, FRESH], is_on_host=is_on_host, share=thousandths / 1000)
    for depth in range(len(rows) + 1):
        wanted = Fraction(thousandths * num_rows * sum(is_on_host[:depth]), 1000)
        assert abs(sum(map(len, rows[:depth])) - wanted) <= 1
    for here, is_here in zip(rows, is_on_host, strict=True):
        assert here == set(range(len(here))), "the first decode rows"
        assert len(here) <= num_rows * is_here


def test_by_example() -> None:
    three = [decode_row()] * 3
    assert counts(three, 0.0) == [0] * 6
    assert counts(three, 0.5) == [1, 2, 1, 2, 1, 2]
    assert counts(three, 1.0) == [3] * 6
    assert counts([decode_row()], 0.5) == [0, 1] * 3
    alternating = [True, False] * 3
    assert counts([decode_row()], 0.7, is_on_host=alternating) == [0, 0, 1, 0, 1, 0], "two of three, not of six"


@pytest.mark.parametrize("share", [0.4, 1.0])
def test_rows_that_rewrite_a_log_attend_where_they_read_it(share: float) -> None:
    plans = [decode_row(0), decode_row(), decode_row(2), decode_row(), FRESH]
    for rows in host_rows(plans, is_on_host=[True] * 5, share=share):
        assert rows <= {1, 3}
    assert host_rows([decode_row(SHARED), decode_row()], is_on_host=[True], share=share) == [frozenset()]
