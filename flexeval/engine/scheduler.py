"""Which rows the next sweep computes: admits groups, follows sequences, retires what is done.

Knows the plan and the state of each sequence in plain integers; never touches a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from flexeval.engine.compute.readout import Drawn, Readout, Scored
from flexeval.planning.groups import Group, make_groups
from flexeval.planning.prefix import PrefixTree, build_tree
from flexeval.planning.rowplans import LogStep, RowBuilder, SequenceStep
from flexeval.planning.rows import RowPlan
from flexeval.policy.policy import Policy
from flexeval.request import FinishReason, TokenRequest, TokenResult


@dataclass(slots=True)
class _Sequence:
    """A request on its way."""

    node: int
    own_log_tokens: list[int] = field(default_factory=list)
    drawn: list[Drawn] = field(default_factory=list)
    elapsed_s: float = 0.0


class Scheduler:
    """The state of one batch of requests."""

    def __init__(self, requests: Sequence[TokenRequest], policy: Policy):
        """Plan the whole batch; nothing is admitted yet."""
        self._requests = requests
        self._policy = policy
        self.tree: PrefixTree = build_tree([r.prompt_ids for r in requests], max_node_tokens=policy.row_tokens)
        self.groups: list[Group] = make_groups(
            self.tree,
            is_decoding=[request.max_tokens > 1 for request in requests],
            row_tokens=policy.row_tokens,
            group_tokens=policy.sweep_tokens,
            group_sequences=policy.group_sequences,
        )
        self._children = self.tree.children()
        self._group_of = {node: index for index, group in enumerate(self.groups) for row in group.rows for node in row}
        is_scored = self._mark(lambda request: request.score_prompt)
        self._kept_at: dict[int, int] = {}  # node -> where in its group's log its KV begins
        self._rows = RowBuilder(
            self.tree,
            children=self._children,
            group_of=self._group_of,
            is_scored=is_scored,
            is_generating=[request.max_tokens > 0 for request in requests],
            kept_at=self._kept_at,
        )
        self._decodes = self._mark(lambda request: request.max_tokens > 1)
        self._sequences = {
            request: _Sequence(node) for node, entry in enumerate(self.tree.nodes) for request in entry.prompts
        }
        self._num_admitted = 0
        self._admitted: list[int] = []  # by the sweep just planned
        self._num_unfinished = [
            sum(len(self.tree.nodes[node].prompts) for row in group.rows for node in row) for group in self.groups
        ]
        self._log_lengths: dict[int, int] = {}
        self._decoding: dict[int, list[int]] = {}  # group -> requests that go on generating
        self._scores: dict[int, list[Scored]] = {
            node: [Scored(0.0, ())] * len(entry.token_ids)
            for node, entry in enumerate(self.tree.nodes)
            if is_scored[node]
        }
        self._weights: dict[int, int] = {}
        self._unassigned_s = 0.0
        self._finished: list[int] = []

    @property
    def has_work(self) -> bool:
        """Whether any request is unanswered."""
        return any(self._num_unfinished)

    def plan_sweep(self) -> list[RowPlan]:
        """The rows of the next sweep: one step of every sequence in flight, and groups that may enter."""
        rows = self._decode_rows()
        admitted = self._admitted = self._admit()
        self._keep(admitted)
        place = {node: row for group in admitted for row in self.groups[group].rows for node in row}
        for group in admitted:
            for row in self.groups[group].rows:
                rows.append(self._rows.fresh(group, row, place=place))
                for node in row:
                    for request in self.tree.nodes[node].prompts:
                        self._weights[request] = self._length(node)
        assert rows, "a sweep without rows"
        return rows

    def num_drawn(self, plan: RowPlan) -> dict[int, int]:
        """Tokens that the requests of a row have drawn so far."""
        return {request: len(self._sequences[request].drawn) for _, request in plan.generators}

    def record(self, plan: RowPlan, readout: Readout) -> None:
        """Take what was read off a row."""
        for score, scored in zip(plan.scores, readout.scored, strict=True):
            self._scores[score.node][score.index] = scored
        for (_, request), drawn in zip(plan.generators, readout.drawn, strict=True):
            self._sequences[request].drawn.append(drawn)

    def finish_sweep(self, elapsed_s: float) -> list[tuple[int, TokenResult]]:
        """End the sweep: share its time among the requests in it and answer those that are done."""
        self._unassigned_s += elapsed_s
        total = sum(self._weights.values())
        for request, weight in self._weights.items():
            self._sequences[request].elapsed_s += self._unassigned_s * weight / total
        if total:
            self._unassigned_s = 0.0
        done = [(request, reason) for request in self._weights if (reason := self._reason(request)) is not None]
        self._weights = {}
        results = []
        for request, reason in done:
            results.append((request, self._result(request, reason)))
            group = self._group_of[self._sequences[request].node]
            self._num_unfinished[group] -= 1
            if request in self._decoding.get(group, ()):
                self._decoding[group].remove(request)
        return results

    def retired_groups(self) -> list[int]:
        """Groups whose log nobody will read again, each named once."""
        needed = {group for group in range(len(self.groups)) if self._num_unfinished[group]}
        needed |= {other for group in needed for other in self.groups[group].depends_on}
        retired = [group for group in self._log_lengths if group not in needed]
        for group in retired:
            del self._log_lengths[group]
            self._decoding.pop(group, None)
        return retired

    def opened_groups(self) -> list[tuple[int, int]]:
        """Groups that the sweep just planned opens a log for, and the tokens each can come to hold at most."""
        return [
            (
                group,
                self._log_lengths[group] + sum(self._requests[r].max_tokens - 1 for r in self.groups[group].sequences),
            )
            for group in self._admitted
            if group in self._log_lengths
        ]

    # -- what is in flight ------------------------------------------------------------------------------------------

    def _mark(self, predicate: Callable[[TokenRequest], bool]) -> list[bool]:
        """Per node, whether some request that runs through it satisfies `predicate`."""
        marked = [any(predicate(self._requests[p]) for p in node.prompts) for node in self.tree.nodes]
        for index in range(len(marked) - 1, -1, -1):
            parent = self.tree.nodes[index].parent
            if marked[index] and parent is not None:
                marked[parent] = True
        return marked

    def _nodes(self, group: int) -> list[int]:
        return [node for row in self.groups[group].rows for node in row]

    def _admit(self) -> list[int]:
        """Groups that enter now: as many as the sweep and the KV room take, and always one if nothing is in flight."""
        admitted: list[int] = []
        num_fresh = 0
        num_decoding = sum(map(len, self._decoding.values()))
        while self._num_admitted < len(self.groups):
            group = self.groups[self._num_admitted]
            if num_fresh and num_fresh + group.num_tokens > self._policy.sweep_tokens:
                break
            if num_decoding and num_decoding + len(group.sequences) > self._policy.block_sequences and group.sequences:
                break
            admitted.append(self._num_admitted)
            num_fresh += group.num_tokens
            num_decoding += len(group.sequences)
            self._num_admitted += 1
        return admitted

    def _keep(self, admitted: list[int]) -> None:
        """Decide whose KV outlives this sweep: what goes on generating, and what later groups descend from."""
        is_kept: dict[int, bool] = {}
        for group in reversed(admitted):
            for node in reversed(self._nodes(group)):
                children = self._children[node]
                is_kept[node] = self._decodes[node] or any(
                    self._group_of[child] >= self._num_admitted or is_kept[child] for child in children
                )
        for group in admitted:
            length = 0
            for node in self._nodes(group):
                if is_kept[node]:
                    self._kept_at[node] = length
                    length += len(self.tree.nodes[node].token_ids)
            if length:
                self._log_lengths[group] = length
            self._decoding[group] = list(self.groups[group].sequences)
            for request in self.groups[group].sequences:
                node = self._sequences[request].node
                start = self._kept_at[node]
                self._sequences[request].own_log_tokens = list(range(start, start + self._length(node)))

    def _length(self, node: int) -> int:
        return len(self.tree.nodes[node].token_ids)

    def _decode_rows(self) -> list[RowPlan]:
        """One step of every sequence in flight; groups share a row while their sequences fit in it."""
        batches: list[list[LogStep]] = []
        num_sequences = 0
        for group, requests in self._decoding.items():
            if not requests:
                continue
            if not batches or num_sequences + len(requests) > self._policy.group_sequences:
                batches.append([])
                num_sequences = 0
            batches[-1].append(self._log_step(group, requests))
            num_sequences += len(requests)
        return [self._rows.decode(batch) for batch in batches]

    def _log_step(self, group: int, requests: list[int]) -> LogStep:
        """The next token of a group's sequences, and where in the group's log its KV will lie."""
        log_length = self._log_lengths[group]
        self._log_lengths[group] += len(requests)
        steps = []
        for offset, request in enumerate(requests):
            sequence = self._sequences[request]
            sequence.own_log_tokens.append(log_length + offset)
            self._weights[request] = 1
            steps.append(
                SequenceStep(
                    request=request,
                    node=sequence.node,
                    token_id=sequence.drawn[-1].token_id,
                    position=len(self._requests[request].prompt_ids) + len(sequence.drawn) - 1,
                    own_log_tokens=tuple(sequence.own_log_tokens),
                )
            )
        return LogStep(group=group, log_length=log_length, sequences=tuple(steps))

    # -- answers ----------------------------------------------------------------------------------------------------

    def _reason(self, request: int) -> FinishReason | None:
        """Why a request is done, or None while it is not."""
        asked, drawn = self._requests[request], self._sequences[request].drawn
        if asked.max_tokens == 0:
            return FinishReason.LENGTH
        if drawn[-1].token_id in asked.eos_ids:
            return FinishReason.ENDOFTEXT
        if asked.is_stopped is not None and asked.is_stopped([token.token_id for token in drawn]):
            return FinishReason.STOP
        return FinishReason.LENGTH if len(drawn) == asked.max_tokens else None

    def _result(self, request: int, reason: FinishReason) -> TokenResult:
        asked, sequence = self._requests[request], self._sequences[request]
        prompt = [s for node in self.tree.path(sequence.node) for s in self._scores[node]] if asked.score_prompt else []
        wants_top = asked.num_top_logprobs > 0
        cut = asked.num_top_logprobs
        return TokenResult(
            token_ids=tuple(drawn.token_id for drawn in sequence.drawn),
            logprobs=tuple(drawn.logprob for drawn in sequence.drawn),
            finish_reason=reason,
            top_logprobs=tuple(drawn.top_logprobs[:cut] for drawn in sequence.drawn) if wants_top else (),
            prompt_logprobs=tuple(scored.logprob for scored in prompt),
            prompt_top_logprobs=tuple(scored.top_logprobs[:cut] for scored in prompt) if wants_top else (),
            elapsed_s=sequence.elapsed_s,
        )
