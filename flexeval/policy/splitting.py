"""What becomes of a policy when memory runs out under it all the same: less in flight. Knows the cost model; no tensor.

No model of memory knows everything: other processes take some of it, and libraries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from flexeval.policy.cost import CostModel
from flexeval.policy.policy import Policy, Tier

LEAST_ROW_TOKENS = 16
"""Rows are not made shorter than this: a layer's weights then outweigh all that is computed with them."""


def split(policy: Policy, model: CostModel, full: Tier, *, keeps_rows: bool = False) -> Policy | None:
    """The policy with less in flight at once; its placement stays. None where nothing is left to halve.

    Either rows and sweeps get half of their tokens, or groups half of their sequences, or half as many groups are in
    flight: whatever gives back most of the tier that is `full`, and among equals what takes least time.

    Args:
        policy: Under which memory ran out.
        model: Knows what is still to be answered.
        full: The tier that had no room.
        keeps_rows: Whether rows stay as long as they are, as answers may depend on it to the bit.
    """

    def rank(smaller: Policy) -> tuple[float, float]:
        cost = model.cost(smaller)
        return float(cost.peak_bytes[full]), cost.objective_s

    return min(_halves(policy, model, keeps_rows), key=rank, default=None)


def tell_split(before: Policy, after: Policy) -> str:
    """What `split` has changed, in words: `rows of 1,024 tokens instead of 2,048`."""
    changes = [
        ("rows of {} tokens", before.row_tokens, after.row_tokens),
        ("sweeps of {} tokens", before.sweep_tokens, after.sweep_tokens),
        ("groups of {} sequences", before.group_sequences, after.group_sequences),
        ("{} groups at once", before.num_groups, after.num_groups),
        ("room for {} tokens of a group", before.group_tokens, after.group_tokens),
    ]
    return ", ".join(f"{words.format(f'{now:,}')} instead of {was:,}" for words, was, now in changes if now != was)


def _halves(policy: Policy, model: CostModel, keeps_rows: bool) -> Iterator[Policy]:
    """The policy with one of its sizes half of what the work makes use of."""
    work = model.workload
    least_row = policy.row_tokens if keeps_rows else min(policy.row_tokens, LEAST_ROW_TOKENS)
    row_tokens = max(least_row, _half(policy.row_tokens, work.num_prompt_tokens))
    # Of a prompt that takes several sweeps, keys and values would have to be kept between them.
    least_tokens = min(policy.sweep_tokens, max(row_tokens, work.max_prompt_tokens))
    sweep_tokens = max(least_tokens, _half(policy.sweep_tokens, work.num_prompt_tokens))
    smaller = replace(policy, row_tokens=row_tokens, sweep_tokens=sweep_tokens)
    if smaller != policy:
        yield smaller
    if (num_generating := work.num_generating_sequences) > 1:
        if policy.group_sequences > 1:
            half = _half(policy.group_sequences, num_generating)
            yield replace(policy, group_sequences=half, group_tokens=(policy.group_tokens + 1) // 2)
        if policy.num_groups > 1:
            num_used = -(-num_generating // policy.group_sequences)
            yield replace(policy, num_groups=_half(policy.num_groups, num_used))


def _half(size: int, most: int) -> int:
    return max(1, min(size, most) // 2)
