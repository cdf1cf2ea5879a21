"""The integer linear program that places weights, KV cache and hidden states. The only module that knows PuLP.

FlexGen's linear program (Sheng et al., ICML 2023, section 4.3) with whole layers and rows in place of fractions, so
that its memory bounds hold for the policy as it runs. How much decode attention the CPU takes is a variable as well.
Every formula is `cost.py`'s; how much work is in flight is given. Solved by HiGHS in process, or by the CBC that PuLP
brings where highspy is not installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pulp  # type: ignore[import-untyped]

from flexeval.policy.cost import LEAST_HOST_ROWS, CostModel
from flexeval.policy.placement import Linear, Placement
from flexeval.policy.policy import Policy, Split, Tier
from flexeval.policy.sweeps import plan_sweeps

GB, MS = 1e9, 1e3
"""Units inside the program: bytes and seconds would span twenty orders, and HiGHS then returns false optima."""
GAP = 1e-4
"""Relative distance to the optimum at which a program counts as solved."""
TIME_LIMIT_S = 5.0
"""Seconds until the best placement found so far is taken; programs take milliseconds."""
TOLERANCE_GB = 1e-6
"""What the solver takes for zero; twice this much of each tier is left free."""
SHARE_DIGITS = 3
"""Of the CPU's share of attention; finer than whole rows come true, and fit to be read."""
STREAMING_COST_MS = 1e-6
"""Decides for the compute device where nothing else does."""


def least_seconds(model: CostModel, sizes: Policy) -> float | None:
    """A lower bound of `objective_s` over all placements, from fractions of layers; None where nothing fits."""
    if _is_home_alone(model):
        policy = _all_at_home(model, sizes)
        return None if policy is None else model.cost(policy).objective_s
    problem, _ = _timed(model, sizes)
    return pulp.value(problem.objective) / MS if _solve(problem, whole=False) else None


def best_placement(model: CostModel, sizes: Policy) -> Policy | None:
    """`sizes` with the placement of least `objective_s`; None where nothing fits."""
    if _is_home_alone(model):
        return _all_at_home(model, sizes)
    problem, placement = _timed(model, sizes)
    if not _solve(problem, whole=True):
        return None
    splits = {kind: _split(counts) for kind, counts in placement.counts.items()}
    num_on_host = pulp.value(placement.counts["kv"][Tier.CPU])
    share = pulp.value(placement.host_attention) / num_on_host if num_on_host else 0.0
    host_attention = round(min(1.0, share), SHARE_DIGITS)
    return replace(
        sizes, weights=splits["weights"], kv=splits["kv"], hidden=splits["hidden"], host_attention=host_attention
    )


def missing_bytes(model: CostModel, sizes: Policy, price: Mapping[Tier, float]) -> dict[Tier, float] | None:
    """What would have to be added to the tiers in `price` for something to fit, at the least total price.

    Returns:
        Bytes for each tier that lacks any; None where even unbounded room in these tiers does not help.
    """
    problem = pulp.LpProblem("missing", pulp.LpMinimize)
    added = {tier: problem.add_variable(f"added_{tier}", 0) for tier in price}
    problem += pulp.lpSum(price[tier] * added[tier] for tier in price)
    _constrain(problem, model, sizes, added)
    if not _solve(problem, whole=True):
        return None
    return {tier: pulp.value(gb) * GB for tier, gb in added.items() if pulp.value(gb) > TOLERANCE_GB}


def _is_home_alone(model: CostModel) -> bool:
    """Whether there is one tier, and so one placement: nothing to solve."""
    return all(tier is model.hardware.home or not model.hardware.capacity_bytes(tier) for tier in Tier)


def _all_at_home(model: CostModel, sizes: Policy) -> Policy | None:
    """`sizes` with all on the compute device; None where it does not fit."""
    home = model.hardware.home
    everything = Split(**{home: 1.0})
    policy = replace(sizes, weights=everything, kv=everything, hidden=everything, host_attention=0.0)
    peak_bytes = model.peak_bytes(policy, model.place(policy))[home]
    return policy if peak_bytes <= model.hardware.capacity_bytes(home) - 2 * TOLERANCE_GB * GB else None


def _split(counts: Mapping[Tier, pulp.LpVariable]) -> Split:
    whole = {tier: round(pulp.value(count)) for tier, count in counts.items()}
    return Split(**{tier: count / sum(whole.values()) for tier, count in whole.items()})


def _timed(model: CostModel, sizes: Policy) -> tuple[pulp.LpProblem, Placement]:
    """The program of least `objective_s`: a sweep takes as long as the most of its bounds."""
    problem = pulp.LpProblem("placement", pulp.LpMinimize)
    placement = _constrain(problem, model, sizes, added={})
    objective_s: Linear = 0
    for phase, sweep in plan_sweeps(sizes, model.workload).items():
        lane_s = model.lane_seconds(sizes, sweep, placement)
        sweep_ms = problem.add_variable(f"{phase}_ms", 0)
        for seconds in model.sweep_bounds(sweep, lane_s):
            problem += sweep_ms >= MS * seconds
        objective_s += model.phase_objective(sweep, sweep_ms / MS, lane_s)
    problem.setObjective(MS * objective_s + STREAMING_COST_MS * pulp.lpSum(placement.streams.values()))
    return problem, placement


def _constrain(
    problem: pulp.LpProblem, model: CostModel, sizes: Policy, added: Mapping[Tier, pulp.LpVariable]
) -> Placement:
    """Variables for every placement, bound to the room in each tier plus what is `added` (in GB)."""
    hardware = model.hardware
    tiers = {tier for tier in Tier if hardware.capacity_bytes(tier) > 0 or tier in added}
    counts, streams, on_disk = {}, {}, {}
    for kind, num in model.num_items(sizes).items():
        counts[kind] = {
            tier: problem.add_variable(f"{kind}_{tier}", 0, num if tier in tiers else 0, cat="Integer") for tier in Tier
        }
        streams[kind] = problem.add_variable(f"{kind}_streams", cat="Binary")
        on_disk[kind] = problem.add_variable(f"{kind}_on_disk", cat="Binary")
        problem += pulp.lpSum(counts[kind].values()) == num
        problem += num - counts[kind][hardware.home] <= num * streams[kind]
        problem += counts[kind][Tier.DISK] <= num * on_disk[kind]
    is_step_in_parts = problem.add_variable("is_step_in_parts", cat="Binary")
    for kind in ("weights", "kv"):
        problem += is_step_in_parts >= streams[kind]
    host_attention: Linear = 0
    is_slab_ahead: Linear = 0
    if model.can_attend_on_host and sizes.num_groups >= LEAST_HOST_ROWS:
        host_attention = problem.add_variable("host_attention", 0)
        problem += host_attention <= counts["kv"][Tier.CPU]
        is_slab_ahead, attends = (problem.add_variable(name, cat="Binary") for name in ("is_slab_ahead", "attends"))
        problem += host_attention <= model.shape.num_layers * attends
        problem += is_slab_ahead >= attends + streams["weights"] - 1
    placement = Placement(
        counts=counts,
        streams=streams,
        on_disk=on_disk,
        is_step_in_parts=is_step_in_parts,
        is_slab_ahead=is_slab_ahead,
        host_attention=host_attention,
    )
    for tier, peak in model.peak_bytes(sizes, placement).items():
        if tier in tiers:
            room_gb = hardware.capacity_bytes(tier) / GB - 2 * TOLERANCE_GB + added.get(tier, 0)
            problem += peak * (1 / GB) <= room_gb
    return placement


def _solve(problem: pulp.LpProblem, *, whole: bool) -> bool:
    """Solve in place, in whole items or in fractions of them; False where no placement fits."""
    solver = pulp.HiGHS(mip=whole, msg=False, threads=1, gapRel=GAP, timeLimit=TIME_LIMIT_S)
    if not solver.available():
        solver = pulp.PULP_CBC_CMD(mip=whole, msg=False, gapRel=GAP, timeLimit=TIME_LIMIT_S)
    problem.solve(solver)
    return problem.sol_status in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible)
