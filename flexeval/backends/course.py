"""The course of a batch: what was foretold of it, corrected as it is measured; whether its rest had better move.

Joins the engine's trace to the cost model; chooses nothing itself.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import log, sqrt
from typing import NamedTuple

from flexeval.backends.gauging import measured_sweep, phase_plans
from flexeval.engine.executor import Executor
from flexeval.engine.trace import SweepTrace
from flexeval.meter import PhasePlan
from flexeval.policy.correction import Correction
from flexeval.policy.cost import CostModel
from flexeval.policy.measured import correct, seconds_of
from flexeval.policy.policy import Policy
from flexeval.policy.replanning import better_policy, is_worth_a_search
from flexeval.policy.sweeps import COUNTS, DECODE, PREFILL, Sweep, plan_sweeps, weights_share
from flexeval.policy.work import Workload
from flexeval.request import FinishReason, TokenRequest, TokenResult

FIRST_BLOCK_SHARE = 1 / 16
"""Of the batch's foretold seconds, those of the first block; it is looked at again whenever twice as much is done."""
LEAST_MEASURED_S = 0.5
"""A block takes at least so many seconds: fewer tell little."""
LEAST_SWEEPS = {PREFILL: 2, DECODE: 8}
"""And has so many sweeps of each phase, where the plan has: on a GPU the first make kernels, and record launches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moving:
    """What placing the rest of a batch anew would take."""

    count: Callable[[Sequence[TokenRequest]], Workload]
    """Counts requests."""
    search_s: float
    """Seconds of a search."""
    load_s: float
    """Seconds to place the weights."""


class Course:
    """One batch under one placement. Counts results as they come; asked after each sweep."""

    def __init__(
        self,
        executor: Executor,
        model: CostModel,
        requests: Sequence[TokenRequest],
        *,
        known: Correction,
        moving: Moving | None,
    ):
        """Begin.

        Args:
            executor: Answers the batch.
            model: Of the whole batch, corrected by what is known before anything of the work is computed.
            requests: The batch.
            known: What was measured of this model until now.
            moving: What another placement would take; None where there must be none.
        """
        self._executor, self._requests, self._moving = executor, requests, moving
        self._model, self.correction = model, known
        policy = executor.policy
        cost = model.cost(policy)
        self._sweeps = plan_sweeps(policy, model.workload)
        self.foretold_s = cost.total_s
        """What the cost model says of the batch."""
        self.plan: dict[str, PhasePlan] = phase_plans(cost, self._sweeps)
        """The same by phase."""
        self.planned_bytes = cost.peak_bytes
        """And of each tier: its largest use."""
        self.first_corrected_s: float | None = None
        """What was foretold of the batch after its first block."""
        self.better: Policy | None = None
        """By what the rest should be placed, if another placement pays."""
        self._next_share = FIRST_BLOCK_SHARE
        self._is_corrected = False
        self._num_done = dict.fromkeys(self._sweeps, 0)
        self._num_sweeps = dict.fromkeys(self._sweeps, 0)
        self._prompts_left = _part(self._sweeps[PREFILL], model.workload.num_prompt_tokens)
        self._elapsed_s = 0.0
        self._num_steps_ended = self._num_steps_allowed_ended = self._num_ended = self._num_stopped = 0
        self._ends = [_Ends(0, 0)]  # at first, and after each sweep that continued texts

    def count(self, results: Sequence[tuple[int, TokenResult]]) -> None:
        """Take results: how soon texts end."""
        for index, result in results:
            most = self._requests[index].max_tokens
            if most > 1:
                self._num_ended += 1
                self._num_steps_ended += len(result.token_ids) - 1
                self._num_steps_allowed_ended += most - 1
                self._num_stopped += result.finish_reason is not FinishReason.LENGTH

    def is_enough(self, find_waiting: Callable[[], list[int]]) -> bool:
        """After a sweep: correct the model where a block has ended; True where the rest is to be placed anew.

        A block has ended when the sweeps so far have done a share of what was foretold, and something of each phase.
        """
        last = self._executor.trace.sweeps[-1]
        self._elapsed_s += last.elapsed_s
        for phase, done in last.done.items():
            self._num_done[phase] += int(done.num_tokens)
            self._num_sweeps[phase] += 1
        if PREFILL in last.done:
            self._prompts_left = _less(self._prompts_left, last.done[PREFILL])
        if DECODE in last.done:
            self._ends.append(_Ends(self._num_done[DECODE], self._num_stopped))
        has_few = any(
            self._num_sweeps[phase] < min(LEAST_SWEEPS[phase], plan.num_sweeps) for phase, plan in self._sweeps.items()
        )
        if has_few or self._elapsed_s < LEAST_MEASURED_S:
            return False
        done_s = sum(plan.elapsed_s * self._num_done[name] / plan.num_tokens for name, plan in self.plan.items())
        if done_s < self._next_share * self.foretold_s:
            return False
        self._next_share = 2 * done_s / self.foretold_s
        self._correct()
        left_s, moving, policy = self.left_s() or 0.0, self._moving, self._executor.policy
        if self.first_corrected_s is None:
            self.first_corrected_s = self._elapsed_s + left_s
        if moving is None or not is_worth_a_search(self._corrected_model(), policy, left_s, moving.search_s):
            return False
        self.better = self._find_better(find_waiting(), moving)
        return self.better is not None

    def _corrected_model(self, workload: Workload | None = None) -> CostModel:
        return replace(self._model, correction=self.correction, workload=workload or self._model.workload)

    def _correct(self) -> None:
        """Correct the model by the sweeps so far."""
        self._executor.settle()
        sweeps = [sweep for sweep in self._executor.trace.sweeps if sweep.num_sweeps == 1]
        first, others = _first_of_phases(sweeps)
        self.correction = correct(
            self._model,
            self._executor.policy,
            [measured_sweep(sweep) for sweep in others],
            self.correction,
            untimed=[measured_sweep(sweep) for sweep in first],
        )
        self._is_corrected = True

    def left_s(self) -> float | None:
        """Seconds that what is left should take; None before the first block has ended. Any thread may ask."""
        if not self._is_corrected:
            return None
        policy, model = self._executor.policy, self._corrected_model()
        left_s = seconds_of(model, policy, self._prompts_left)
        if decode := self._sweeps.get(DECODE):
            num_left = self._num_steps_left()
            # As few sequences as are left at last cost almost as much as many.
            num_sweeps = max(num_left / decode.num_tokens, self._longest_left())
            num_scoring_tokens = min(self._prompts_left.num_tokens, model.workload.num_scoring_tokens)
            num_scoring = num_scoring_tokens / self._sweeps[PREFILL].num_tokens
            as_cut = replace(model, correction=replace(self.correction, cutting={}))
            left_s += seconds_of(
                as_cut,
                policy,
                _part(decode, num_left),
                num_sweeps=num_sweeps,
                weights_share=weights_share(num_scoring, num_sweeps),
            )
        return left_s

    def _num_steps_left(self) -> float:
        """Tokens that should still be drawn after the first ones of their texts."""
        num_texts, num_allowed = self._open_texts()
        return num_allowed * self._share_drawn(num_allowed / num_texts) if num_texts and num_allowed else 0.0

    def _open_texts(self) -> tuple[int, int]:
        """Texts that have not ended, and the tokens that they may still draw."""
        work = self._model.workload
        num_texts = work.num_generating_sequences - self._num_ended
        num_allowed = work.num_generated_tokens - work.num_generating_sequences - self._num_steps_allowed_ended
        return max(0, num_texts), max(0, num_allowed - max(0, self._num_done[DECODE] - self._num_steps_ended))

    def _share_drawn(self, num_allowed: float) -> float:
        """Of so many more tokens that a text may have, the share that it should have."""
        chance = self._chance_to_end()
        return (1 - (1 - chance) ** num_allowed) / (chance * num_allowed) if chance else 1.0

    def _longest_left(self) -> float:
        """Sweeps until the last text has ended: what the plan has left, or the mean of the largest geometric number.

        The last one is of the texts that go on longest: by so few ends, their chance may be lower by an error of it.
        """
        num_left = max(0, self._sweeps[DECODE].num_sweeps - len(self._ends) + 1)
        num_texts, _ = self._open_texts()
        num_steps, num_stopped = self._late_ends()
        chance = (num_stopped - sqrt(num_stopped)) / num_steps if num_steps else 0.0
        return min(num_left, (log(num_texts) + _EULER) / chance) if num_texts and chance else num_left

    def _chance_to_end(self) -> float:
        """The chance with which a step ends a text by itself, by the later half of all steps.

        Of a geometric distribution that is the best estimate, those under way counted. Texts differ, and those that go
        on have shown that they are not of the short ones: therefore the later half.
        """
        num_steps, num_stopped = self._late_ends()
        return min(1.0, num_stopped / num_steps) if num_steps else 0.0

    def _late_ends(self) -> _Ends:
        """The later half of all steps, and the ends in it."""
        now = self._ends[-1]
        then = self._ends[bisect_left(self._ends, now.num_steps / 2, key=lambda ends: ends.num_steps)]
        return _Ends(now.num_steps - then.num_steps, now.num_stopped - then.num_stopped)

    def _find_better(self, waiting: Sequence[int], moving: Moving) -> Policy | None:
        """The policy that the requests that wait had better have, if it pays."""
        if not waiting:
            return None
        work = moving.count([self._requests[index] for index in waiting])
        num_texts = work.num_generating_sequences
        if num_steps := work.num_generated_tokens - num_texts:
            num_steps = round(num_steps * self._share_drawn(num_steps / num_texts))
            work = replace(work, num_generated_tokens=num_texts + num_steps)
        num_left = self._model.workload.num_prompt_tokens - self._num_done[PREFILL]
        return better_policy(
            self._corrected_model(work),
            self._executor.policy,
            moving_s=moving.search_s + moving.load_s,
            num_computed_again=max(0, work.num_prompt_tokens - num_left),
        )


_EULER = 0.5772
"""Euler's constant: the largest of n exponential numbers is (ln n + this) times as large as one, in the mean."""


class _Ends(NamedTuple):
    """How many texts have ended, at some moment."""

    num_steps: int
    """Tokens drawn after the first ones of their texts."""
    num_stopped: int
    """Texts that have ended by themselves."""


def _part(sweep: Sweep, num_tokens: float) -> Sweep:
    """So many tokens of a phase, as if one sweep had them."""
    return replace(
        sweep, num_sweeps=1, **{name: num_tokens / sweep.num_tokens * getattr(sweep, name) for name in COUNTS}
    )


def _less(sweep: Sweep, done: Sweep) -> Sweep:
    """What is left of a phase, as if one sweep had it."""
    return replace(sweep, **{name: max(0.0, getattr(sweep, name) - getattr(done, name)) for name in COUNTS})


def _first_of_phases(sweeps: Sequence[SweepTrace]) -> tuple[list[SweepTrace], list[SweepTrace]]:
    """The first sweep of each phase that has others, which makes kernels or touches new pages; and all other sweeps."""
    num_sweeps = Counter(phase for sweep in sweeps for phase in sweep.done)
    begun = {phase for phase, num in num_sweeps.items() if num == 1}
    first: list[SweepTrace] = []
    others: list[SweepTrace] = []
    for sweep in sweeps:
        (others if sweep.done.keys() <= begun else first).append(sweep)
        begun |= sweep.done.keys()
    return first, others
