"""What the rows of a sweep do, in the numbers that the cost model counts. Knows plans of rows; no seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from flexeval.planning.rows import RowPlan
from flexeval.policy.sweeps import COUNTS, DECODE, PREFILL, Sweep


def done_by(plans: Sequence[RowPlan]) -> dict[str, Sweep]:
    """By phase, what one sweep of these rows computes; a phase without any row is absent."""
    rows = {PREFILL: [plan for plan in plans if plan.fresh], DECODE: [plan for plan in plans if not plan.fresh]}
    return {phase: _count(phase, chosen) for phase, chosen in rows.items() if chosen}


def _count(phase: str, plans: Sequence[RowPlan]) -> Sweep:
    """As `plan_sweeps` counts them: a run of prompt tokens attends in a square, to its own end and all before it."""
    num_pairs = num_own = num_shared = 0
    for plan in plans:
        num_pairs += sum(span.length * (int(plan.positions[span.start]) + span.length) for span in plan.fresh)
        for span in plan.decode:
            positions = plan.positions[span.start : span.start + len(span.own_tokens)]
            num_pairs += int(positions.sum()) + len(positions)
            num_own += int(positions.sum()) + len(positions) - sum(span.first_own_positions)
        if plan.decode:
            num_shared += sum(ancestor.num_keys for ancestor in plan.ancestors)
    return Sweep(
        phase=phase,
        num_sweeps=1,
        num_tokens=sum(plan.num_tokens for plan in plans),
        num_calls=len(plans),
        num_pairs=num_pairs,
        num_hidden_pairs=sum(span.length * (span.length - 1) // 2 for plan in plans for span in plan.fresh),
        num_parts=sum(plan.num_tokens + sum(ancestor.length for ancestor in plan.ancestors) for plan in plans),
        num_logits_rows=sum(len(plan.scores) + len(plan.generators) for plan in plans),
        num_kv_read=num_own + num_shared,
        num_own_read=num_own,
        num_kv_written=sum(keep.num_tokens for plan in plans for keep in plan.keeps),
    )


def total(sweeps: Sequence[Sweep]) -> Sweep:
    """All that some sweeps of one phase do, at least one, as if one had done it."""
    counts = {name: sum(getattr(sweep, name) for sweep in sweeps) for name in ("num_calls", *COUNTS)}
    return replace(sweeps[0], **counts)


def as_planned(work: Sweep, plan: Sweep) -> tuple[float, Sweep]:
    """How many sweeps of the plan's size do `work`, maybe a part of one, and what each of them does. Not of no work."""
    num_sweeps = work.num_tokens / plan.num_tokens
    return num_sweeps, replace(plan, **{name: getattr(work, name) / num_sweeps for name in COUNTS})
