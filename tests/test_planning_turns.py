"""Rows take turns: every one once, each kind in its own order, evenly mixed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexeval.planning.rows import Compaction, DecodeSpan, FreshSpan, RowPlan
from flexeval.planning.turns import take_turns

FRESH = RowPlan(token_ids=np.zeros(4), positions=np.arange(4), fresh=(FreshSpan(node=0, start=0, length=4),))
DECODE = RowPlan(
    token_ids=np.zeros(1),
    positions=np.zeros(1),
    decode=(DecodeSpan(group=0, start=0, log_length=0, own_tokens=[np.zeros(1)], first_own_positions=[0], version=0),),
)
REWRITING = RowPlan(
    token_ids=DECODE.token_ids,
    positions=DECODE.positions,
    decode=DECODE.decode,
    compactions=(Compaction(group=0, log_length=3, places=np.array([0])),),
)


@given(st.lists(st.sampled_from([FRESH, DECODE]), max_size=20))
def test_every_row_once_and_each_kind_in_its_order(plans: Sequence[RowPlan]) -> None:
    turns = take_turns(plans)
    assert sorted(turns) == list(range(len(plans)))
    for kind in (FRESH, DECODE):
        own = [index for index in turns if plans[index] is kind]
        assert own == sorted(own)


@pytest.mark.parametrize(
    ("num_decode", "num_fresh", "expected"),
    [(1, 1, "fd"), (1, 2, "fdf"), (3, 4, "fdfdfdf"), (2, 6, "ffdffdff"), (5, 1, "ddfddd"), (3, 0, "ddd"), (0, 2, "ff")],
)
def test_rows_that_decode_are_spread_evenly(num_decode: int, num_fresh: int, expected: str) -> None:
    turns = take_turns([DECODE] * num_decode + [FRESH] * num_fresh)
    assert "".join("d" if index < num_decode else "f" for index in turns) == expected


def test_where_a_log_is_rewritten_the_order_stays() -> None:
    assert take_turns([REWRITING, DECODE, FRESH, FRESH]) == [0, 1, 2, 3]
