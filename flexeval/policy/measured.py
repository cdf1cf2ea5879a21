"""Corrects the cost model by sweeps that were measured, so that the rest of their run is foretold as it goes.

For a sweep that was measured the cost model says how long each lane should have been busy with what its rows did. Each
measured figure is a sum of such seconds, each times a factor to be found:

    busy_j = sum_c f_c T_jc

over the phases c that the sweep has a part in, and the lanes that one figure covers. The factors are the most probable
ones where logarithms of figures differ from what is foretold by chance, as widely as these sweeps' do, and factors from
what was held of them by a Student's t distribution: the model is mostly right within a few percent, and now and then
wrong by far (found by Gauss and Newton's steps, reweighted). So what sweeps cannot tell apart keeps one ratio, figures
that scatter move a factor little, and those that agree move it all the way. A figure far from what is foretold of it
(another process) counts for little, as Huber (1981) has it; so does one of a moment; and no factor leaves its bounds.

What sweeps take beyond their busiest lane (lanes that wait, Python) is a factor a phase, found likewise. It also has
what a plan does not know of how work is cut: prompts that enter one by one as seats become free. Knows plain numbers.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, sqrt
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from flexeval.policy.correction import NO_CORRECTION, Correction
from flexeval.policy.cost import CostModel, Lane
from flexeval.policy.done import as_planned, total
from flexeval.policy.placement import Placement
from flexeval.policy.policy import Policy, Tier
from flexeval.policy.sweeps import Sweep, plan_sweeps

K = TypeVar("K", bound=Hashable)
Floats = npt.NDArray[np.float64]

BOUNDS = (0.1, 10.0)
"""Least and most of a factor."""
LEAST_SCATTER = 0.02
"""By which figures of sweeps differ at least from what is foretold, in logarithms."""
HELD_WITHIN, TAILS = 0.15, 3
"""By which factors differ from what was held of them, likewise: the plan is to be right within so much, and seldom is
wrong by far (degrees of freedom of Student's t)."""
OUTLIER = 1.345
"""A figure that differs by more times the scatter counts as if it did not (95 % efficient where all is well)."""
MOMENT_S = 0.002
"""Foretold seconds of a figure that are as good as noise."""
WEAK = 1e-3
"""Weight of what was held while it is to count for nothing, but where sweeps tell nothing."""
NUM_STEPS = 30
"""Of a fit."""
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
    held_C = np.log([start[key] for key in keys])
    sums = _Sums(terms_JC, np.log(np.maximum(measured, BOUNDS[0] * MOMENT_S)))
    # As if nothing had been held: by how much do figures differ that the factors are fitted to?
    alone_C, hold_C = held_C, np.full(len(keys), WEAK)
    for _ in range(NUM_STEPS):
        off_J = np.maximum(np.abs(sums.differences(alone_C)), LEAST_SCATTER)
        alone_C = sums.step(alone_C, held_C, weight_J=1 / (off_J * (1 + sums.moment_J)), hold_C=hold_C)
    num_free = max(1, len(terms) - len(keys))
    scatter = float(np.median(off_J)) / 0.6745 * sqrt(len(terms) / num_free)  # of a normal distribution
    found = (sums.most_probable(start_C, held_C, scatter) for start_C in (held_C, alone_C))
    found_C = min(found, key=lambda found_C: sums.improbability(found_C, held_C, scatter))
    return dict(zip(keys, np.exp(found_C).tolist(), strict=True))


class _Sums:
    """Figures that are sums of terms, each times a factor; everything in logarithms but the terms."""

    def __init__(self, terms_JC: Floats, log_J: Floats):
        self._terms_JC = terms_JC
        self._log_J = log_J
        self.moment_J = MOMENT_S / terms_JC.sum(1)
        """How much of each figure may be noise, however well all others agree."""

    def differences(self, found_C: Floats) -> Floats:
        """Of what was measured from what is foretold."""
        differs_J: Floats = self._log_J - np.log(self._terms_JC @ np.exp(found_C))
        return differs_J

    def step(self, found_C: Floats, held_C: Floats, *, weight_J: Floats, hold_C: Floats) -> Floats:
        """Gauss and Newton's, to the least sum of weighted squares of differences, of figures and of factors."""
        parts_JC = self._terms_JC * np.exp(found_C)
        shares_JC = parts_JC / parts_JC.sum(1)[:, None]
        matrix_CC = (shares_JC.T * weight_J) @ shares_JC + np.diag(hold_C)
        slope_C = shares_JC.T @ (weight_J * self.differences(found_C)) - hold_C * (found_C - held_C)
        step_C: Floats = np.clip(np.linalg.solve(matrix_CC, slope_C), -1.0, 1.0)
        return np.clip(found_C + step_C, *np.log(BOUNDS))

    def most_probable(self, start_C: Floats, held_C: Floats, scatter: float) -> Floats:
        """The next most probable factors, uphill from `start_C`."""
        found_C, noise_J = start_C, np.hypot(scatter, self.moment_J)
        for _ in range(NUM_STEPS):
            off_J = np.maximum(np.abs(self.differences(found_C)), LEAST_SCATTER)
            weight_J = np.minimum(1.0, OUTLIER * noise_J / off_J) / noise_J**2
            hold_C = (1 + TAILS) / (TAILS * HELD_WITHIN**2 + (found_C - held_C) ** 2)
            found_C = self.step(found_C, held_C, weight_J=weight_J, hold_C=hold_C)
        return found_C

    def improbability(self, found_C: Floats, held_C: Floats, scatter: float) -> float:
        """The less, the more probable are these factors."""
        off_J = np.abs(self.differences(found_C)) / np.hypot(scatter, self.moment_J)
        huber_J = np.where(off_J < OUTLIER, off_J**2, OUTLIER * (2 * off_J - OUTLIER))
        moved_C = (1 + TAILS) * np.log1p(((found_C - held_C) / HELD_WITHIN) ** 2 / TAILS)
        return float(huber_J.sum() + moved_C.sum())
