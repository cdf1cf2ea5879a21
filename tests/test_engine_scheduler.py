"""The scheduler, driven by a model that is a hash of what it is shown: a key too few or too many changes the answer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexeval.engine.compute.readout import Drawn, Readout, Scored
from flexeval.engine.scheduler import Scheduler
from flexeval.planning.rows import AncestorSpan, RowPlan
from flexeval.policy.policy import Policy
from flexeval.request import FinishReason, TokenRequest, TokenResult

Prefix = tuple[int, ...]
"""A token with all that came before it: what its keys and values depend on."""
EOS, STOP = 5, 6
NUM_TOKENS = 7


def draw(seen: Prefix) -> Drawn:
    rng = random.Random(str(seen))
    token = rng.randrange(NUM_TOKENS)
    return Drawn(token, -rng.random(), tuple((rank, -float(rank)) for rank in range(3)))


def score(seen: Prefix, token: int) -> Scored:
    return Scored(-random.Random(str((seen, token))).random(), ((token, -1.0), (0, -2.0), (1, -3.0)))


def answer(request: TokenRequest) -> TokenResult:
    """What the hash says, one request alone."""
    prompt, drawn, reason = request.prompt_ids, list[Drawn](), FinishReason.LENGTH
    while len(drawn) < request.max_tokens and reason is FinishReason.LENGTH:
        drawn.append(draw((*prompt, *(one.token_id for one in drawn))))
        ids = [one.token_id for one in drawn]
        if ids[-1] in request.eos_ids:
            reason = FinishReason.ENDOFTEXT
        elif request.is_stopped is not None and request.is_stopped(ids):
            reason = FinishReason.STOP
    scored = [Scored(0.0, ()), *(score(prompt[:place], prompt[place]) for place in range(1, len(prompt)))]
    top = request.num_top_logprobs
    return TokenResult(
        token_ids=tuple(one.token_id for one in drawn),
        logprobs=tuple(one.logprob for one in drawn),
        finish_reason=reason,
        top_logprobs=tuple(one.top_logprobs[:top] for one in drawn) if top else (),
        prompt_logprobs=tuple(one.logprob for one in scored) if request.score_prompt else (),
        prompt_top_logprobs=tuple(one.top_logprobs[:top] for one in scored) if request.score_prompt and top else (),
    )


@dataclass
class Machine:
    """Runs a scheduler's rows at one layer, with a KV cache of prefixes, and watches over every rule."""

    requests: Sequence[TokenRequest]
    policy: Policy
    results: dict[int, TokenResult] = field(default_factory=dict)
    num_sweeps: int = 0
    elapsed_s: float = 0.0
    most_in_flight: int = 0
    most_fresh: int = 0
    """Prompt tokens of one sweep."""
    used: dict[int, int] = field(default_factory=dict)
    """Tokens that each log came to hold."""
    unread: set[tuple[int, int]] = field(default_factory=set)
    """Places of logs that were written and never read."""

    def run(self) -> Machine:
        self.scheduler = Scheduler(self.requests, self.policy)
        self.logs: dict[int, list[Prefix]] = {}
        self.room: dict[int, int] = {}
        while self.scheduler.has_work:
            self.scratch: dict[int, list[Prefix]] = {}
            self.unread_scratch: set[int] = set()
            plans = self.scheduler.plan_sweep()
            for group, num_tokens in self.scheduler.opened_groups():
                assert group not in self.room, "a log is opened once"
                self.logs[group], self.room[group] = [], num_tokens
            for plan in plans:
                self.scheduler.record(plan, self._compute(plan))
            self.most_in_flight = max(self.most_in_flight, sum(plan.num_tokens for plan in plans if plan.decode))
            assert not self.unread_scratch, "only what later rows of the sweep need is left for them"
            self.most_fresh = max(self.most_fresh, sum(plan.num_tokens for plan in plans if plan.fresh))
            self.num_sweeps += 1
            self.elapsed_s += self.num_sweeps
            for request, result in self.scheduler.finish_sweep(self.num_sweeps):
                assert request not in self.results, "a request is answered once"
                self.results[request] = result
            for group in self.scheduler.retired_groups():
                self.used[group] = len(self.logs.pop(group))
                assert self.used[group] <= self.room[group]
        assert not self.logs, "every log is given back"
        return self

    def _compute(self, plan: RowPlan) -> Readout:
        row: list[Prefix] = [()] * plan.num_tokens
        for span in plan.fresh:
            for token in range(span.start, span.start + span.length):
                row[token] = self._attend(plan, row, token, row[span.start : token])
        for batch in plan.decode:
            log = self.logs[batch.group]
            assert len(log) == batch.log_length
            for token, own, first in zip(
                range(batch.start, plan.num_tokens), batch.own_tokens, batch.first_own_positions, strict=False
            ):
                self.unread -= {(batch.group, place) for place in own}
                row[token] = self._attend(plan, row, token, [log[place] for place in own[:-1]])
                assert plan.positions[token] - len(own) + 1 == first
        for span in plan.scratch:
            self.unread_scratch.add(span.node)
            self.scratch[span.node] = row[span.start : span.start + span.length]
        for keep in plan.keeps:
            assert keep.log_start == len(self.logs[keep.group]), "a log grows without gaps"
            self.logs[keep.group] += [prefix for start, length in keep.spans for prefix in row[start : start + length]]
            if not plan.decode:  # a generated token's keys are read at once, by itself
                self.unread |= {(keep.group, place) for place in range(keep.log_start, len(self.logs[keep.group]))}
        num_drawn = self.scheduler.num_drawn(plan)
        for offset, request in plan.generators:
            assert len(row[offset]) == len(self.requests[request].prompt_ids) + num_drawn[request]
        return Readout(
            [score(row[wanted.offset], wanted.token_id) for wanted in plan.scores],
            [draw(row[offset]) for offset, _ in plan.generators],
        )

    def _attend(self, plan: RowPlan, row: list[Prefix], token: int, own: list[Prefix]) -> Prefix:
        """The new token's own prefix, which must be what the keys it sees spell out, each of them once and in order."""
        spans = [span for span in plan.ancestors if span.start <= token < span.start + span.length]
        keys = list[Prefix]()
        for span in sorted(spans, key=lambda span: span.first_key_position):
            assert span.first_key_position == len(keys)
            keys += self._keys(span, row)
            assert span.first_key_position + span.num_keys == len(keys)
        keys += own
        assert plan.positions[token] == len(keys)
        prefix = (*(key[-1] for key in keys), plan.token_ids[token])
        assert keys == [prefix[:length] for length in range(1, len(prefix))]
        return prefix

    def _keys(self, span: AncestorSpan, row: list[Prefix]) -> list[Prefix]:
        source = span.source
        if source.row_start is not None:
            return row[source.row_start : source.row_start + span.num_keys]
        if source.scratch_node is not None:
            self.unread_scratch.discard(source.scratch_node)
            return self.scratch[source.scratch_node]
        assert source.group is not None
        places = range(source.log_start, source.log_start + span.num_keys)
        self.unread -= {(source.group, place) for place in places}
        return [self.logs[source.group][place] for place in places]


_rng = random.Random(0)
PIECES = [tuple(_rng.randrange(NUM_TOKENS) for _ in range(length)) for length in (40, 36, 3, 1, 1)]
PROMPTS = st.lists(st.sampled_from(PIECES), min_size=1, max_size=4).map(lambda parts: sum(parts, ()))
ENDLESS = st.builds(
    TokenRequest,
    prompt_ids=PROMPTS,
    max_tokens=st.integers(0, 5),
    score_prompt=st.booleans(),
    num_top_logprobs=st.integers(0, 2),
)
ENDING = st.builds(
    TokenRequest,
    prompt_ids=PROMPTS,
    max_tokens=st.integers(0, 9),
    eos_ids=st.sampled_from([frozenset[int](), frozenset({EOS})]),
    is_stopped=st.sampled_from([None, lambda ids: ids[-1] == STOP]),
)
POLICIES = st.builds(
    Policy,
    row_tokens=st.integers(1, 60),
    sweep_tokens=st.integers(1, 200),
    group_sequences=st.integers(1, 5),
    num_groups=st.integers(1, 4),
)


def without_time(machine: Machine) -> list[TokenResult]:
    return [replace(machine.results[index], elapsed_s=0.0) for index in range(len(machine.requests))]


@settings(deadline=None, max_examples=60)
@given(st.lists(ENDING | ENDLESS, min_size=1, max_size=16), POLICIES)
def test_every_request_gets_its_own_answer_under_any_policy(requests: list[TokenRequest], policy: Policy) -> None:
    machine = Machine(requests, policy).run()
    assert without_time(machine) == [answer(request) for request in requests]
    assert sum(result.elapsed_s for result in machine.results.values()) == pytest.approx(machine.elapsed_s)


@settings(deadline=None, max_examples=60)
@given(st.lists(ENDLESS, min_size=1, max_size=16), POLICIES)
def test_what_is_kept_is_read_and_the_room_is_used(requests: list[TokenRequest], policy: Policy) -> None:
    machine = Machine(requests, policy).run()
    assert not machine.unread
    assert machine.used == machine.room


@settings(deadline=None, max_examples=60)
@given(st.lists(ENDING, min_size=1, max_size=24, unique_by=lambda request: request.prompt_ids), POLICIES)
def test_rows_and_blocks_keep_to_the_policy(requests: list[TokenRequest], policy: Policy) -> None:
    class Watched(Machine):
        def _compute(self, plan: RowPlan) -> Readout:
            assert plan.num_tokens <= (policy.group_sequences if plan.decode else policy.row_tokens)
            return super()._compute(plan)

    machine = Watched(requests, policy).run()
    assert machine.most_in_flight <= policy.block_sequences
    assert machine.most_fresh <= max(policy.sweep_tokens, policy.row_tokens), "one node always fits"


def test_prompts_that_end_in_one_node_decode_together_whatever_the_limit() -> None:
    requests = [TokenRequest(prompt_ids=(1, 2), max_tokens=3)] * 5
    machine = Machine(requests, Policy(group_sequences=2, num_groups=1)).run()
    assert (machine.most_in_flight, machine.num_sweeps) == (5, 3)


def test_scoring_keeps_nothing_and_takes_one_sweep() -> None:
    requests = [TokenRequest(prompt_ids=(*PIECES[0], token), max_tokens=token % 2) for token in range(6)]
    machine = Machine(requests, Policy()).run()
    assert (machine.num_sweeps, machine.room) == (1, {})


def test_a_block_stays_full() -> None:
    policy = Policy(group_sequences=2, num_groups=8)
    requests = [TokenRequest(prompt_ids=(index, 0), max_tokens=8) for index in range(64)]
    assert Machine(requests, policy).run().num_sweeps == 4 * 8, "four blocks of 16, eight tokens each"
    rng = random.Random(1)
    ragged = [TokenRequest(prompt_ids=(index, 0), max_tokens=rng.randint(1, 32)) for index in range(200)]
    num_sweeps = Machine(ragged, policy).run().num_sweeps
    ideal = ceil(sum(request.max_tokens for request in ragged) / policy.block_sequences)
    assert num_sweeps <= 1.2 * ideal, (num_sweeps, ideal)


def test_a_log_goes_when_the_last_reader_is_done() -> None:
    """Groups that straddle two headers must not keep the first header's log alive to the end."""
    headers = [tuple((task * 7 + place) % 50 for place in range(40)) for task in range(8)]
    requests = [TokenRequest(prompt_ids=(*header, i, i), max_tokens=3) for header in headers for i in range(5)]

    class Watched(Machine):
        most_logs = 0

        def _compute(self, plan: RowPlan) -> Readout:
            self.most_logs = max(self.most_logs, len(self.logs))
            return super()._compute(plan)

    machine = Watched(requests, Policy(sweep_tokens=60, row_tokens=60, group_sequences=4, num_groups=2)).run()
    assert len(machine.room) >= 10
    assert machine.most_logs <= 6
