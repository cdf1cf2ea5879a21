"""The scheduler, driven by a model that is a hash of what it is shown: a key too few or too many changes the answer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexeval.engine.compute.readout import Readout, Tokens
from flexeval.engine.scheduler import Scheduler
from flexeval.engine.sizes import measure_workload
from flexeval.planning.rows import SHARED, AncestorSpan, RowPlan
from flexeval.planning.streams import computed_lengths
from flexeval.planning.summary import PlanSummary
from flexeval.planning.usage import PATHS_IN_FLIGHT
from flexeval.policy.policy import Policy
from flexeval.policy.sweeps import plan_sweeps
from flexeval.request import FinishReason, TokenRequest, TokenResult, TopLogprobs

Prefix = tuple[int, ...]
"""A token with all that came before it: what its keys and values depend on."""
EOS, STOP = 5, 6
NUM_TOKENS = 7
NUM_TOP = 3


class Read(NamedTuple):
    """What the hash says of one token."""

    token_id: int
    logprob: float
    top_logprobs: TopLogprobs


def draw(seen: Prefix) -> Read:
    rng = random.Random(str(seen))
    token = rng.randrange(NUM_TOKENS)
    return Read(token, -rng.randrange(999) / 1024, tuple((rank, -float(rank)) for rank in range(NUM_TOP)))


def score(seen: Prefix, token: int) -> Read:
    logprob = -random.Random(str((seen, token))).randrange(999) / 1024
    return Read(token, logprob, ((token, -1.0), (0, -2.0), (1, -3.0)))


def tokens_of(reads: Sequence[Read]) -> Tokens:
    tokens = Tokens.zeros(len(reads), NUM_TOP)
    for place, (token_id, logprob, top) in enumerate(reads):
        tokens.token_ids_N[place], tokens.logprobs_N[place] = token_id, logprob
        tokens.top_ids_NK[place], tokens.top_logprobs_NK[place] = np.transpose(top)
    return tokens


def zeros(plan: RowPlan) -> Readout:
    """Of a plan that scores nothing: every token drawn is 0."""
    return Readout(Tokens.zeros(0, 0), Tokens.zeros(len(plan.generators), 0))


def answer(request: TokenRequest) -> TokenResult:
    """What the hash says, one request alone."""
    prompt, drawn, reason = request.prompt_ids, list[Read](), FinishReason.LENGTH
    while len(drawn) < request.max_tokens and reason is FinishReason.LENGTH:
        drawn.append(draw((*prompt, *(one.token_id for one in drawn))))
        ids = [one.token_id for one in drawn]
        if ids[-1] in request.eos_ids:
            reason = FinishReason.ENDOFTEXT
        elif request.is_stopped is not None and request.is_stopped(ids):
            reason = FinishReason.STOP
    scored = [Read(prompt[0], 0.0, ()), *(score(prompt[:place], prompt[place]) for place in range(1, len(prompt)))]
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
    """The most tokens that each log came to hold."""
    unread: set[Prefix] = field(default_factory=set)
    """Tokens that were kept and never read."""

    def run(self) -> Machine:
        self.scheduler = Scheduler(self.requests, self.policy)
        self.room = self.scheduler.log_capacities
        self.logs: dict[int, list[Prefix]] = {group: [] for group in self.room}
        while self.scheduler.has_work:
            self.scratch: dict[int, list[Prefix]] = {}
            self.unread_scratch: set[int] = set()
            plans = self.scheduler.plan_sweep()
            expects_more = self.scheduler.expects_more
            for plan in plans:
                self.scheduler.record(plan, self._compute(plan))
            self.most_in_flight = max(self.most_in_flight, sum(plan.num_tokens for plan in plans if plan.decode))
            assert not self.unread_scratch, "only what later rows of the sweep need is left for them"
            self.most_fresh = max(self.most_fresh, sum(plan.num_tokens for plan in plans if plan.fresh))
            self.num_sweeps += 1
            self.elapsed_s += self.num_sweeps
            finished = self.scheduler.finish_sweep(self.num_sweeps)
            for request, result in finished:
                assert request not in self.results, "a request is answered once"
                self.results[request] = result
            has_stopped = any(result.finish_reason != "length" for _, result in finished)
            assert expects_more or not self.scheduler.has_work, "nobody is surprised by more work"
            assert self.scheduler.has_work or has_stopped or not expects_more, "only a stop ends the work early"
        return self

    def _compute(self, plan: RowPlan) -> Readout:
        row: list[Prefix] = [()] * plan.num_tokens
        for compaction in plan.compactions:
            log, places = self.logs[compaction.group], compaction.places.tolist()
            assert len(log) >= compaction.log_length and places == sorted(set(places)), "tokens move up, in order"
            self.logs[compaction.group] = [log[place] for place in places]
        for span in plan.fresh:
            for token in range(span.start, span.start + span.length):
                row[token] = self._attend(plan, row, token, row[span.start : token])
        for batch in plan.decode:
            log = self.logs[batch.group] = self.logs[batch.group][: batch.log_length]
            assert len(log) == batch.log_length
            for token, own, first in zip(
                range(batch.start, plan.num_tokens), batch.own_tokens, batch.first_own_positions, strict=False
            ):
                row[token] = self._attend(plan, row, token, [log[place] for place in own[:-1]])
                self.unread -= set(log[place] for place in own[:-1])
                assert plan.positions[token] - len(own) + 1 == first
        for span in plan.scratch:
            self.unread_scratch.add(span.node)
            self.scratch[span.node] = row[span.start : span.start + span.length]
        for keep in plan.keeps:
            log = self.logs[keep.group]
            assert keep.log_start <= len(log), "a log grows without gaps"
            del log[keep.log_start :]  # nobody is there any more
            new = [prefix for start, length in keep.spans for prefix in row[start : start + length]]
            log += new
            assert len(log) <= self.room[keep.group]
            self.used[keep.group] = max(self.used.get(keep.group, 0), len(log))
            if not plan.decode:  # a generated token's keys are read at once, by itself
                self.unread |= set(new)
        for offset, request in plan.generators:
            length = computed_lengths(self.requests)[self.requests[request].prompt_ids]  # its last may be only scored
            assert len(row[offset]) == length + self.scheduler.num_drawn(request)
        scores = zip(plan.scores.offsets.tolist(), plan.scores.token_ids.tolist(), strict=True)
        return Readout(
            tokens_of([score(row[offset], token_id) for offset, token_id in scores]),
            tokens_of([draw(row[offset]) for offset, _ in plan.generators]),
        )

    def _attend(self, plan: RowPlan, row: list[Prefix], token: int, own: list[Prefix]) -> Prefix:
        """The new token's own prefix, which must be what the keys it sees spell out, each of them once and in order."""
        spans = [span for span in plan.ancestors if span.start <= token < span.start + span.length]
        keys = list[Prefix]()
        for span in sorted(spans, key=lambda span: span.first_key_position):
            assert span.first_key_position == len(keys)
            assert span.last_position == max(plan.positions[span.start : span.start + span.length])
            keys += self._keys(span, row)
            assert span.first_key_position + span.num_keys == len(keys)
        keys += own
        assert plan.positions[token] == len(keys)
        prefix = (*(key[-1] for key in keys), int(plan.token_ids[token]))
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
        keys = self.logs[source.group][source.log_start : source.log_start + span.num_keys]
        self.unread -= set(keys)
        return keys


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
    group_tokens=st.just(0) | st.integers(1, 400),
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
def test_what_is_kept_is_read(requests: list[TokenRequest], policy: Policy) -> None:
    assert not Machine(requests, policy).run().unread


@settings(deadline=None, max_examples=60)
@given(st.lists(ENDING | ENDLESS, min_size=1, max_size=24), POLICIES)
def test_rows_and_blocks_keep_to_the_policy(requests: list[TokenRequest], policy: Policy) -> None:
    class Watched(Machine):
        def _compute(self, plan: RowPlan) -> Readout:
            assert plan.num_tokens <= (policy.group_sequences if plan.decode else policy.row_tokens)
            return super()._compute(plan)

    machine = Watched(requests, policy).run()
    assert machine.most_in_flight <= policy.block_sequences
    assert machine.most_fresh <= max(policy.sweep_tokens, policy.row_tokens), "one node always fits"


@settings(deadline=None, max_examples=60)
@given(st.lists(ENDING | ENDLESS, min_size=1, max_size=24), POLICIES)
def test_the_room_is_what_the_workload_promises(requests: list[TokenRequest], policy: Policy) -> None:
    """The cost model counts on these sums; where a prompt alone is longer than a sweep, it must be kept as well."""
    room = dict(Scheduler(requests, policy).log_capacities)
    work = measure_workload(requests)
    shared = room.pop(SHARED)
    if policy.sweep_tokens >= max(len(request.prompt_ids) for request in requests):
        assert shared <= work.num_shared_tokens
    num_seats = min(policy.block_sequences, work.num_generating_sequences)
    assert sum(room.values()) <= num_seats * work.max_own_tokens
    if policy.group_tokens:
        assert all(tokens <= max(policy.group_tokens, work.max_own_tokens) for tokens in room.values())


@pytest.mark.parametrize("num_groups", [1, 3])
def test_as_many_sweeps_as_were_planned_where_logs_have_not_room_for_the_largest(num_groups: int) -> None:
    """One in ten sequences is ten times as large as the others: they sit at once as far as they have room."""
    rng = random.Random(7)
    sizes = [600 if index % 10 == 0 else rng.randint(20, 60) for index in range(400)]
    requests = [
        TokenRequest(prompt_ids=(rng.randrange(NUM_TOKENS), *range(size)), max_tokens=rng.randint(10, 20))
        for size in sizes
    ]
    tight = Policy(group_sequences=24 // num_groups, num_groups=num_groups, group_tokens=3000 // num_groups)
    few = Policy(group_sequences=6 // num_groups, num_groups=num_groups)
    work = measure_workload(requests)
    counts = {}
    for policy in (tight, few):
        planned = sum(sweep.num_sweeps for sweep in plan_sweeps(policy, work).values())
        scheduler = Scheduler(requests, policy)
        room, num_sweeps = sum(scheduler.log_capacities.values()), 0
        while scheduler.has_work:
            for plan in scheduler.plan_sweep():
                scheduler.record(plan, zeros(plan))
            scheduler.finish_sweep(1.0)
            num_sweeps += 1
        assert num_sweeps <= 1.1 * planned, (policy, num_sweeps, planned)
        counts[policy] = num_sweeps, room
    assert counts[tight][0] < 0.6 * counts[few][0], counts
    assert counts[tight][1] < counts[few][1], counts


def test_prompts_that_end_in_one_node_wait_for_a_seat_each() -> None:
    requests = [TokenRequest(prompt_ids=(1, 2), max_tokens=3, temperature=1.0, seed=seed) for seed in range(5)]
    machine = Machine(requests, Policy(group_sequences=2, num_groups=1)).run()
    assert (machine.most_in_flight, machine.num_sweeps) == (2, 1 + 3 * 2)


def test_equal_requests_are_computed_once_and_end_each_for_itself() -> None:
    base = TokenRequest(prompt_ids=PIECES[0], max_tokens=12)
    third = answer(base).token_ids[2]
    requests = [
        base,
        replace(base, max_tokens=0, score_prompt=True),
        replace(base, max_tokens=2, num_top_logprobs=2),
        replace(base, eos_ids=frozenset({third})),
        replace(base, is_stopped=lambda ids: third in ids),
    ]
    machine = Machine(requests, Policy()).run()
    assert without_time(machine) == [answer(request) for request in requests]
    assert (machine.most_in_flight, machine.num_sweeps) == (1, 12)
    assert sum(result.elapsed_s for result in machine.results.values()) == pytest.approx(machine.elapsed_s)


def test_scoring_keeps_nothing_and_takes_one_sweep() -> None:
    requests = [TokenRequest(prompt_ids=(*PIECES[0], token), max_tokens=token % 2) for token in range(6)]
    machine = Machine(requests, Policy()).run()
    assert (machine.num_sweeps, machine.used) == (1, {})


class Traffic(NamedTuple):
    """Tokens of groups' logs that go to and from a device that does not hold them."""

    num_sweeps: int
    num_read: int
    num_needed: int
    """The tokens that sequences attend to."""
    num_rewritten: int
    """By compactions."""


def measure(requests: Sequence[TokenRequest], policy: Policy) -> Traffic:
    """Run the plans alone; every token drawn is 0."""
    scheduler = Scheduler(requests, policy)
    num_sweeps = num_read = num_needed = num_rewritten = 0
    while scheduler.has_work:
        for plan in scheduler.plan_sweep():
            groups = {batch.group for batch in plan.decode}
            num_read += sum(batch.log_length for batch in plan.decode)
            num_needed += sum(len(own) - 1 for batch in plan.decode for own in batch.own_tokens)
            for compaction in plan.compactions:
                num_rewritten += len(compaction.places)
                num_read += compaction.log_length - len(compaction.places) if compaction.group in groups else 0
            scheduler.record(plan, zeros(plan))
        num_sweeps += 1
        scheduler.finish_sweep(1.0)
    return Traffic(num_sweeps, num_read, num_needed, num_rewritten)


def helm_like(num_requests: int, *, limits: Sequence[int]) -> tuple[list[TokenRequest], list[int]]:
    """Requests of several tasks, and how far each goes: most stop after a few tokens, some go on to the limit."""
    rng = random.Random(2)
    requests, lengths = [], []
    for index in range(num_requests):
        task = index % len(limits)
        long = rng.randint(1, limits[task]) if rng.random() < 0.2 else limits[task]
        lengths.append(min(long, 2 + int(rng.expovariate(1 / 8)) if long == limits[task] else long))
        requests.append(
            TokenRequest(
                prompt_ids=(task, *range(100, 160), index, *range(rng.randint(1, 60))),
                max_tokens=limits[task],
                is_stopped=lambda ids, length=lengths[-1]: len(ids) == length,
            )
        )
    return requests, lengths


@pytest.mark.parametrize("limits", [(100,), (300, 30, 100, 300)], ids=["one-limit", "many-limits"])
@pytest.mark.parametrize("num_groups", [1, 4])
def test_a_block_stays_full_and_little_is_read_for_nothing(num_groups: int, limits: tuple[int, ...]) -> None:
    """Hardly more sweeps than there must be, and hardly more KV read and written than sequences attend to."""
    requests, lengths = helm_like(1600, limits=limits)
    policy = Policy(group_sequences=32 // num_groups, num_groups=num_groups, sweep_tokens=1500)
    traffic = measure(requests, policy)
    ideal = max(max(lengths), ceil((sum(lengths) - len(lengths)) / policy.block_sequences))
    assert traffic.num_sweeps <= 1.15 * ideal, (traffic, ideal)
    assert traffic.num_read <= 1.15 * traffic.num_needed, traffic
    assert traffic.num_rewritten <= 0.25 * traffic.num_needed, traffic


def test_equal_lengths_fill_their_room_to_the_last_token() -> None:
    policy = Policy(group_sequences=4, num_groups=2)
    requests = [TokenRequest(prompt_ids=(index, 0, 0), max_tokens=8) for index in range(64)]
    machine = Machine(requests, policy).run()
    assert machine.num_sweeps == 8 * 8, "eight blocks of 8, eight tokens each"
    assert machine.used == {group: 4 * (3 + 8 - 1) for group in range(2)}
    assert measure(requests, policy) == (64, *[8 * sum(8 * (3 + step) for step in range(7))] * 2, 0)


@pytest.mark.parametrize("sweep_tokens", [32, 48, 64, 128])
def test_prompts_take_as_many_sweeps_as_they_fill_while_others_go_on(sweep_tokens: int) -> None:
    policy = Policy(group_sequences=16, num_groups=1, sweep_tokens=sweep_tokens, row_tokens=32)
    requests = [TokenRequest(prompt_ids=(index, *range(7)), max_tokens=12) for index in range(16)]
    machine = Machine(requests, policy).run()
    planned = plan_sweeps(policy, measure_workload(requests))
    assert machine.num_sweeps == planned["prefill"].num_sweeps + 11 == ceil(16 * 8 / sweep_tokens) + 11
    assert without_time(machine) == [answer(request) for request in requests]


def test_shared_prefixes_give_way_to_later_ones() -> None:
    headers = [tuple((task * 7 + place) % 50 for place in range(40)) for task in range(30)]
    requests = [TokenRequest(prompt_ids=(*header, i, i), max_tokens=3) for header in headers for i in range(5)]
    machine = Machine(requests, Policy(sweep_tokens=60, row_tokens=60, group_sequences=4, num_groups=2)).run()
    assert machine.room[SHARED] == PATHS_IN_FLIGHT * 40 < sum(map(len, headers))
    assert without_time(machine) == [answer(request) for request in requests]


def test_the_plan_says_what_it_saves_and_why() -> None:
    header = tuple(range(100))
    prompts = [(*header, 1, 1), (*header, 2), (*header, 2), (9, 9, 9), (9, 9, 9), (9, 9, 9)]
    summary = Scheduler([TokenRequest(prompt_ids=prompt, max_tokens=1) for prompt in prompts], Policy()).summary
    assert summary == PlanSummary(
        num_requests=6,
        num_distinct=3,
        num_asked_tokens=102 + 101 + 101 + 9,
        num_duplicate_tokens=101 + 6,
        num_shared_tokens=100,
        num_last_tokens=0,
        num_computed_tokens=100 + 2 + 1 + 3,
        num_nodes=4,
    )


def test_the_plan_says_which_tokens_nothing_follows() -> None:
    header = tuple(range(100))
    prompts = [(*header, 1, 1), (*header, 1, 2), (*header, 1, 2), (*header, 3), (9, 9, 9)]
    requests = [TokenRequest(prompt_ids=prompt, max_tokens=0, score_prompt=True) for prompt in prompts]
    summary = Scheduler([*requests, TokenRequest(prompt_ids=(9, 9, 9), max_tokens=1)], Policy()).summary
    assert summary == PlanSummary(
        num_requests=6,
        num_distinct=4,
        num_asked_tokens=3 * 102 + 101 + 6,
        num_duplicate_tokens=102 + 3,
        num_shared_tokens=101 + 100,
        num_last_tokens=3,
        num_computed_tokens=101 + 3,
        num_nodes=3,
    )
