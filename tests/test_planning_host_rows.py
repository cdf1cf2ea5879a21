"""The CPU takes its share of the rows, spread over the depth, and no row that it may not."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexeval.planning.host_rows import balanced, host_rows
from flexeval.planning.rows import SHARED, Compaction, DecodeSpan, FreshSpan, RowPlan


def decode_row(*rewritten: int) -> RowPlan:
    one = np.zeros(1, dtype=np.int32)
    span = DecodeSpan(group=0, start=0, log_length=1000, own_tokens=[one], first_own_positions=[0], version=1)
    compactions = tuple(Compaction(group=group, log_length=1, places=one) for group in rewritten)
    return RowPlan(token_ids=one, positions=one, decode=(span,), compactions=compactions)


FRESH = RowPlan(token_ids=np.zeros(3), positions=np.zeros(3), fresh=(FreshSpan(node=0, start=0, length=3),))


def assign(plans: list[RowPlan], share: float, *, is_on_host: list[bool]) -> list[frozenset[int]]:
    """Where no weights come: every layer brings the same."""
    kv_bytes = [8 * is_here for is_here in is_on_host]
    return host_rows(plans, kv_bytes=kv_bytes, weight_bytes=[0] * len(kv_bytes), share=share)


def counts(plans: list[RowPlan], share: float, *, is_on_host: list[bool] | None = None) -> list[int]:
    return [len(rows) for rows in assign(plans, share, is_on_host=is_on_host or [True] * 6)]


@given(num_rows=st.integers(0, 9), thousandths=st.integers(0, 1000), is_on_host=st.lists(st.booleans(), min_size=1))
def test_the_share_comes_true_at_any_depth(num_rows: int, thousandths: int, is_on_host: list[bool]) -> None:
    rows = assign([*[decode_row()] * num_rows, FRESH], thousandths / 1000, is_on_host=is_on_host)
    for depth in range(len(rows) + 1):
        wanted = Fraction(thousandths * num_rows * sum(is_on_host[:depth]), 1000)
        assert abs(sum(map(len, rows[:depth])) - wanted) <= 1
    for here, is_here in zip(rows, is_on_host, strict=True):
        assert here == set(range(len(here))), "the first decode rows"
        assert len(here) <= num_rows * is_here


@given(
    layers=st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 10**10)), min_size=1, max_size=60),
    share=st.floats(0, 1),
)
def test_the_cpu_takes_its_share_and_more_of_it_where_weights_come(layers: list[tuple[int, int]], share: float) -> None:
    kv_bytes, weight_bytes = zip(*layers, strict=True)
    parts = balanced(kv_bytes, weight_bytes, share=share)
    taken = [part * size for part, size in zip(parts, kv_bytes, strict=True)]
    assert sum(taken) == pytest.approx(share * sum(kv_bytes), rel=1e-6, abs=1e-3)
    assert all(0 <= part <= 1 for part in parts)
    of_all = {
        round(amount / (kv + weights), 6)
        for amount, part, kv, weights in zip(taken, parts, kv_bytes, weight_bytes, strict=True)
        if kv and part < 1
    }
    assert len(of_all) <= 1, "the same part of what every layer brings"


def test_link_and_cpu_end_together_at_every_layer() -> None:
    parts = balanced([60] * 4, [60, 0, 60, 0], share=0.5)
    assert parts == pytest.approx([2 / 3, 1 / 3, 2 / 3, 1 / 3])
    on_cpu = [60 * part for part in parts]
    over_link = [weights + 60 - amount for weights, amount in zip([60, 0, 60, 0], on_cpu, strict=True)]
    assert [link / cpu for link, cpu in zip(over_link, on_cpu, strict=True)] == pytest.approx([2.0] * 4)
    assert balanced([10, 10], [90, 0], share=0.75) == pytest.approx([1.0, 0.5]), "no more than there is"


def test_by_example() -> None:
    three = [decode_row()] * 3
    assert counts(three, 0.0) == [0] * 6
    assert counts(three, 0.5) == [1, 2, 1, 2, 1, 2]
    assert counts(three, 1.0) == [3] * 6
    assert counts([decode_row()], 0.5) == [0, 1] * 3
    alternating = [True, False] * 3
    assert counts([decode_row()], 0.7, is_on_host=alternating) == [0, 0, 1, 0, 1, 0], "two of three, not of six"
    weights = [24_000, 0] * 2  # as much as the three rows' 1000 tokens of 8 bytes
    rows = host_rows(three, kv_bytes=[8] * 4, weight_bytes=weights, share=0.5)
    assert [len(here) for here in rows] == [2, 1, 2, 1]


@pytest.mark.parametrize("share", [0.4, 1.0])
def test_rows_that_rewrite_a_log_attend_where_they_read_it(share: float) -> None:
    plans = [decode_row(0), decode_row(), decode_row(2), decode_row(), FRESH]
    for rows in assign(plans, share, is_on_host=[True] * 5):
        assert rows <= {1, 3}
    assert assign([decode_row(SHARED), decode_row()], share, is_on_host=[True]) == [frozenset()]
