"""Corrects the cost model by sweeps that were measured, so that the rest of their run is foretold as it goes.

For a sweep that was measured the cost model says how long each lane should have been busy with what its rows did. Each
measured figure is a sum of such seconds, each times a factor to be found:

    busy_j = sum_c f_c T_jc

over the phases c that the sweep has a part in, and the lanes that one figure covers. Factors come by the multiplicative
rule f_c <- f_c sum_j T_jc (busy_j / sum_d f_d T_jd) / sum_j T_jc (Richardson 1972; Lucy 1974; Shepp and Vardi 1982).
They stay positive, what they foretell adds up to what was measured, and what sweeps cannot tell apart keeps one ratio.
A figure far from what is foretold of it (a page fault, another process) counts as the most that it may differ by, as
Huber (1981) has it; little evidence moves a factor little; and no factor leaves its bounds.

What sweeps take beyond their busiest lane (lanes that wait, Python) is a factor a phase, found likewise. It also has
what a plan does not know of how work is cut: prompts that enter one by one as seats become free. Knows plain numbers.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import TypeVar

import numpy as np

from flexeval.policy.correction import NO_CORRECTION, Correction
from flexeval.policy.cost import CostModel, Lane
from flexeval.policy.done import as_planned, total
from flexeval.policy.placement import Placement
from flexeval.policy.policy import Policy, Tier
from flexeval.policy.sweeps import Sweep, plan_sweeps

K = TypeVar("K", bound=Hashable)

BOUNDS = (0.1, 10.0)
"""Least and most of a factor."""
OUTLIER = 2.0
"""A figure counts for this many times of what is foretold of it at most, and for so small a part at least."""
HALF_EVIDENCE_S = 0.02
"""Foretold seconds of a factor's work that count as much as what was held of it before."""
NUM_ROUNDS, NUM_STEPS = 12, 60
"""How often figures are looked at for outliers, and steps of the rule in between."""
MOST_SWEEPS = 512
"""The last ones are looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredSweep:
    """One pass over the layers as it was."""

    done: Mapping[str, Sweep]
    """Phase: what it did."""
    elapsed_s: float
    """Seconds that it took."""
    compute_s: float
    """Of these, the compute device was at work."""
    in_s: float
    """Seconds of moving towards the compute device, from whichever tier."""
    out_s: float
    """Seconds of moving away from it."""
    host_attention_s: float
    """Seconds of attention on the CPU beside the compute device."""


def correct(
    model: CostModel,
    policy: Policy,
    sweeps: Sequence[MeasuredSweep],
    known: Correction = NO_CORRECTION,
    *,
    untimed: Sequence[MeasuredSweep] = (),
) -> Correction:
    """What `model` is to be multiplied by, from sweeps under `policy`.

    Args:
        model: As it is without any correction.
        policy: What the sweeps ran under.
        sweeps: What was measured, at least one.
        known: What was held before, of other sweeps on this machine.
        untimed: Further sweeps, whose seconds tell nothing, but how they were cut.
    """
    sweeps = sweeps[-MOST_SWEEPS:]
    plain = replace(model, correction=NO_CORRECTION)
    placement = plain.place(policy)
    lanes = Correction(lanes=_fit_lanes(plain, policy, placement, sweeps, known))
    corrected = replace(plain, correction=lanes)
    bounds = [_bound_seconds(corrected, policy, placement, sweep) for sweep in sweeps]
    cutting = {}
    for phase in {phase for sweep in (*untimed, *sweeps) for phase in sweep.done}:
        done = [sweep.done[phase] for sweep in (*untimed, *sweeps) if phase in sweep.done]
        as_cut_s = sum(_sweep_seconds(corrected, policy, placement, one) for one in done)
        cutting[phase] = as_cut_s / seconds_of(corrected, policy, total(done))
    start = {phase: 1.0 for parts in bounds for phase in parts}
    waiting = _fit(bounds, [sweep.elapsed_s for sweep in sweeps], start)
    return replace(lanes, waiting=waiting, cutting=cutting)


def seconds_of(
    model: CostModel,
    policy: Policy,
    work: Sweep,
    *,
    num_sweeps: float | None = None,
    weights_share: float = 1.0,
) -> float:
    """What the model says of `work`, in sweeps as the plan cuts them, or in so many; weights come for such a part."""
    plan = replace(plan_sweeps(policy, model.workload)[work.phase], weights_share=weights_share)
    if num_sweeps is not None:
        num_tokens = work.num_tokens / num_sweeps if num_sweeps else 0.0
        plan = replace(plan, num_tokens=num_tokens, num_calls=ceil(num_tokens / policy.group_sequences))
    if not work.num_tokens:
        return 0.0
    num_planned, sweep = as_planned(work, plan)
    return num_planned * _sweep_seconds(model, policy, model.place(policy), sweep)


def _fit_lanes(
    model: CostModel, policy: Policy, placement: Placement, sweeps: Sequence[MeasuredSweep], known: Correction
) -> dict[tuple[str, str], float]:
    # What rests on disk comes through a link as well, in pieces: while the disk is read, it is no further lane.
    hosted = replace(placement, counts={kind: _without_disk(tiers) for kind, tiers in placement.counts.items()})
    terms: list[dict[tuple[str, str], float]] = []
    measured: list[float] = []
    for sweep in sweeps:
        figures: dict[str, dict[tuple[str, str], float]] = {name: {} for name in _FIGURES}
        for phase, done in _parts(sweep):
            lanes, hosted_lanes = (model.lane_seconds(policy, done, place) for place in (placement, hosted))
            for name, of_figure in _FIGURES.items():
                for lane in of_figure:
                    chosen = hosted_lanes if lane in (Lane.TO_GPU, Lane.FROM_GPU) else lanes
                    if seconds := float(chosen.get(lane, 0.0)):
                        figures[name][phase, lane] = seconds
        for name, parts in figures.items():
            if parts:
                terms.append(parts)
                measured.append(getattr(sweep, name))
    start = {key: known.of_lane(*key) for parts in terms for key in parts}
    return {**known.lanes, **_fit(terms, measured, start)}


_FIGURES: Mapping[str, tuple[Lane, ...]] = {
    "compute_s": (Lane.COMPUTE,),
    "in_s": (Lane.TO_GPU, Lane.DISK_READ),
    "out_s": (Lane.FROM_GPU, Lane.DISK_WRITE),
    "host_attention_s": (Lane.HOST_ATTENTION,),
}
"""What is measured of a sweep, and the lanes that it covers."""


def _bound_seconds(model: CostModel, policy: Policy, placement: Placement, sweep: MeasuredSweep) -> dict[str, float]:
    """By phase, its seconds of whatever a sweep takes longest for: lanes do the work of both."""
    bounds = {
        phase: [float(s) for s in model.sweep_bounds(done, model.lane_seconds(policy, done, placement))]
        for phase, done in _parts(sweep)
    }
    together = [sum(seconds) for seconds in zip(*bounds.values(), strict=True)]
    longest = together.index(max(together))
    return {phase: seconds[longest] for phase, seconds in bounds.items()}


def _parts(sweep: MeasuredSweep) -> Iterator[tuple[str, Sweep]]:
    """The phases of a sweep, and what each did: weights come once, with the first of them."""
    for index, (phase, done) in enumerate(sweep.done.items()):
        yield phase, replace(done, weights_share=float(index == 0))


def _without_disk(tiers: Mapping[Tier, float]) -> dict[Tier, float]:
    return {**tiers, Tier.DISK: 0}


def _sweep_seconds(model: CostModel, policy: Policy, placement: Placement, sweep: Sweep) -> float:
    return float(max(model.sweep_bounds(sweep, model.lane_seconds(policy, sweep, placement))))


def _fit(terms: Sequence[Mapping[K, float]], measured: Sequence[float], start: Mapping[K, float]) -> dict[K, float]:
    """Factors with which the terms add up to what was measured; as in `start` where there is little of it."""
    keys = list(start)
    if not keys:
        return {}
    column = {key: index for index, key in enumerate(keys)}
    terms_JC = np.zeros((len(terms), len(keys)))
    for row, parts in enumerate(terms):
        for key, seconds in parts.items():
            terms_JC[row, column[key]] = seconds
    held_C = np.array([start[key] for key in keys])
    measured_J, seen_C = np.array(measured), terms_JC.sum(0)
    found_C, counted_J = held_C, measured_J
    for _ in range(NUM_ROUNDS):
        for _ in range(NUM_STEPS):
            found_C = found_C * (terms_JC.T @ (counted_J / (terms_JC @ found_C))) / seen_C
            found_C = np.clip(found_C, *BOUNDS)
        foretold_J = terms_JC @ found_C
        counted_J = np.clip(measured_J, foretold_J / OUTLIER, foretold_J * OUTLIER)
    evidence_C = seen_C / (seen_C + HALF_EVIDENCE_S)
    return dict(zip(keys, (held_C * (found_C / held_C) ** evidence_C).tolist(), strict=True))
