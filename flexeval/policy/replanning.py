"""Whether the rest of a run had better be placed anew, by a cost model that was corrected. Knows the search; no tensor.

What is in flight is finished first, with fewer and fewer sequences at once; then the weights are moved. Both must be
won back, and a good deal more: what a placement that never ran would take is foretold, not measured.
"""

from __future__ import annotations

from dataclasses import replace

from flexeval.policy.cost import CostModel
from flexeval.policy.policy import KINDS, Policy
from flexeval.policy.search import search
from flexeval.policy.sweeps import COUNTS, DECODE, PREFILL, plan_sweeps
from flexeval.policy.telling import tell_shares

LEAST_GAIN = 0.1
"""Share of the rest's seconds that must be saved beside what moving costs: factors are known to a few percent."""
ALIKE = 1.1
"""Lanes whose factors differ by no more than this times are planned as before: only their proportion matters."""
SEARCHES = 20.0
"""A search is worth its time where the rest takes so many times as long."""


def is_worth_a_search(model: CostModel, policy: Policy, left_s: float, search_s: float) -> bool:
    """Whether a search might find a better placement: lanes are busy at other proportions than was planned with.

    Args:
        model: Corrected.
        policy: Under which the run is.
        left_s: Seconds that the rest should take.
        search_s: Seconds that a search takes.
    """
    if left_s < SEARCHES * search_s:
        return False
    lanes = model.cost(policy).lanes
    busy = {(phase, lane) for phase, of_phase in lanes.items() for lane, seconds in of_phase.items() if seconds}
    factors = [model.correction.of_lane(*key) for key in busy]
    return len({lane for _, lane in busy}) > 1 and max(factors) > ALIKE * min(factors)


def better_policy(
    model: CostModel, policy: Policy, *, moving_s: float, num_computed_again: float = 0.0
) -> Policy | None:
    """The policy to place the rest by; None where going on under `policy` is as good.

    Args:
        model: Corrected; its workload is what nothing is computed of yet.
        policy: Under which the run is.
        moving_s: Seconds that it takes to place the weights.
        num_computed_again: Of the workload's prompt tokens, those that were computed before, for others.
    """
    best = search(model.shape, model.workload, model.hardware, correction=model.correction)
    stay, go = model.cost(policy), model.cost(best)
    again_s = go.phase_s[PREFILL] * num_computed_again / model.workload.num_prompt_tokens
    gain_s = stay.total_s - go.total_s - moving_s - again_s - _ending_seconds(model, policy)
    return best if gain_s > LEAST_GAIN * stay.total_s else None


def policy_for_more(model: CostModel, policy: Policy, *, search_s: float, load_s: float) -> Policy | None:
    """The policy for another batch, where nothing is in flight; None where the one before is as good.

    Args:
        model: Of that batch.
        policy: Under which the batch before was done.
        search_s: Seconds that a search takes.
        load_s: Seconds that it takes to place the weights.
    """
    stay_s = model.cost(policy).total_s
    if stay_s < SEARCHES * search_s:
        return None
    best = search(model.shape, model.workload, model.hardware, correction=model.correction)
    moving_s = 0.0 if rests_alike(policy, best) else load_s
    return best if stay_s - model.cost(best).total_s - moving_s > LEAST_GAIN * stay_s else None


def rests_alike(one: Policy, other: Policy) -> bool:
    """Whether everything rests in the same places under both, so that only what is in flight differs."""
    return all(getattr(one, kind) == getattr(other, kind) for kind in KINDS) and one.slabs_ahead == other.slabs_ahead


def _ending_seconds(model: CostModel, policy: Policy) -> float:
    """Most that it takes to end what is in flight: the longest text, while half of the seats are empty."""
    sweep = plan_sweeps(policy, model.workload).get(DECODE)
    if sweep is None:
        return 0.0
    half = replace(sweep, **{name: getattr(sweep, name) / 2 for name in COUNTS})
    sweep_s = max(model.sweep_bounds(half, model.lane_seconds(policy, half, model.place(policy))))
    return float((model.workload.max_generated_tokens - 1) * sweep_s)


def tell_move(before: Policy, after: Policy) -> str:
    """What is placed otherwise, in words: `weights 25% gpu, 75% cpu instead of 100% cpu`; sizes as well."""
    changes = [
        f"{kind} {tell_shares(getattr(after, kind))} instead of {tell_shares(getattr(before, kind))}"
        for kind in KINDS
        if getattr(after, kind) != getattr(before, kind)
    ]
    changes += [
        f"{name.replace('_', ' ')} {getattr(after, name):,} instead of {getattr(before, name):,}"
        for name in ("row_tokens", "sweep_tokens", "group_sequences", "num_groups", "group_tokens", "host_attention")
        if getattr(after, name) != getattr(before, name)
    ]
    return "; ".join(changes)
