"""Which rows the next sweep computes: lets prompts in, follows sequences, forgets what is done.

Knows the plan and the state of each sequence in plain integers; never touches a tensor.

Prompts enter depth first, node by node of the prefix tree, as soon as there is room: a seat in a group for each
sequence that generates, room for shared prefixes, tokens of the sweep. A sequence whose prompt is its own takes its
seat when its prompt begins; one that shares its whole prompt draws its first token and then waits for a seat.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np

from flexeval.engine.answers import Answers
from flexeval.engine.compute.readout import Readout
from flexeval.planning.block import Block
from flexeval.planning.kept import KeptNodes
from flexeval.planning.logs import EVERYWHERE, Crossing, Step
from flexeval.planning.prefix import build_tree
from flexeval.planning.rowplans import RowBuilder
from flexeval.planning.rows import SHARED, Compaction, RowPlan
from flexeval.planning.scores import ScoreTable, find_endings
from flexeval.planning.streams import make_streams
from flexeval.planning.summary import PlanSummary
from flexeval.planning.usage import NodeUsage
from flexeval.policy.policy import Policy
from flexeval.request import TokenRequest, TokenResult


class Scheduler:
    """The state of one batch of requests."""

    def __init__(
        self,
        requests: Sequence[TokenRequest],
        policy: Policy,
        *,
        is_apart: bool = False,
        crossing: Crossing = EVERYWHERE,
    ):
        """Plan the whole batch; nothing is admitted yet.

        Args:
            requests: What is asked.
            policy: How much is in flight.
            is_apart: Nothing is computed together: a row is of one request, and cut as if there were no other.
            crossing: Where logs of KV are not read in place.
        """
        assert not is_apart or policy.group_sequences == 1, policy
        self._requests = requests
        self._policy = policy
        self._is_apart = is_apart
        self._streams = make_streams(requests, is_apart=is_apart)
        self.tree = build_tree(
            [stream.prompt_ids for stream in self._streams],
            max_node_tokens=policy.row_tokens,
            # The longest first: what is short fills the seats at the end, and what only scores the sweeps.
            ranks=[stream.max_tokens for stream in self._streams],
            is_apart=is_apart,
        )
        self._usage = NodeUsage(self.tree, is_generating=[stream.is_generating for stream in self._streams])
        self.summary = PlanSummary.of(requests, self.tree)
        self._leaf = {stream: node for node, entry in enumerate(self.tree.nodes) for stream in entry.prompts}
        endings = find_endings(self._streams, self._leaf)
        self._answers = Answers(requests, self._streams, self.tree, endings)
        self._block = Block(
            self._streams,
            self.tree,
            self._usage,
            group_sequences=policy.group_sequences,
            num_groups=policy.num_groups,
            group_tokens=policy.group_tokens,
            crossing=crossing,
        )
        self._kept = KeptNodes(self.tree, self._usage, self._block, sweep_tokens=policy.sweep_tokens)
        self._num_open = list(self._usage.num_users)  # unfinished streams that run through each node
        self._num_unfinished = len(self._streams)
        self._waiting: deque[int] = deque()  # streams that have drawn their first token and have no seat
        self._next_node, self._stop_node = 0, len(self.tree.nodes)
        self._num_left_out = 0  # streams that will not begin
        self._weights: dict[int, int] = {}
        wants_scores = {
            index
            for index, stream in enumerate(self._streams)
            if any(requests[request].score_prompt for request in stream.requests)
        }
        self._rows = RowBuilder(
            self.tree,
            last_descendant=self._usage.last_descendant,
            scores=ScoreTable(self.tree, is_scored=self._usage.mark(wants_scores), endings=endings),
            generators_of=self._generators_of,
            place_of=self._kept.place,
        )

    @property
    def has_work(self) -> bool:
        """Whether any request is unanswered that is not left out."""
        return self._num_unfinished > self._num_left_out

    @property
    def expects_more(self) -> bool:
        """Whether there is work for a sweep after the planned one, unless sequences in it stop by themselves."""
        num_ending = sum(self._answers.num_left(stream) <= 1 for stream in self._weights)
        return self._num_unfinished - self._num_left_out > num_ending

    @property
    def is_closed(self) -> bool:
        """Whether requests are left out."""
        return self._num_left_out > 0

    def find_waiting(self) -> list[int]:
        """Requests whose prompts have not begun; what they share with others may have."""
        stop = self._begun_stop()
        waiting = (self._streams[stream] for stream, leaf in self._leaf.items() if leaf >= stop)
        return sorted(request for stream in waiting for request in stream.requests)

    def close(self) -> None:
        """Leave out what waits, between two sweeps: what has begun is finished."""
        self._stop_node = self._begun_stop()
        self._num_left_out = sum(leaf >= self._stop_node for leaf in self._leaf.values())

    def _begun_stop(self) -> int:
        """The first node that belongs to no prompt that has begun: one that takes several sweeps may be half done."""
        node = self._next_node
        if node == self._stop_node or (parent := self.tree.nodes[node].parent) is None:
            return node
        return self._usage.last_descendant[node] + 1 if self._usage.num_users[parent] == 1 else node

    @property
    def log_capacities(self) -> dict[int, int]:
        """Tokens that the log of each group, and of shared nodes, can come to hold at most."""
        return self._kept.log_capacities

    def plan_sweep(self) -> list[RowPlan]:
        """The rows of the next sweep: one step of every sequence in flight, and the nodes that may enter."""
        self._seat_waiting()
        entering = self._admit()
        compactions = self._kept.begin_sweep(entering)
        rows = [*self._decode_rows(compactions), *self._fresh_rows(entering, compactions)]
        assert rows and not compactions, (rows, compactions)
        return rows

    @property
    def failed(self) -> dict[int, tuple[int, ...]]:
        """Requests that ended without an answer: see `Answers.failed`."""
        return self._answers.failed

    def num_drawn(self, request: int) -> int:
        """Tokens that a request has drawn so far."""
        return self._answers.num_drawn(request)

    def record(self, plan: RowPlan, readout: Readout) -> None:
        """Take what was read off a row."""
        self._answers.record(plan, readout)

    def finish_sweep(self, elapsed_s: float) -> list[tuple[int, TokenResult]]:
        """End the sweep: share its time among the requests in it, answer those that are done and free their seats."""
        results = self._answers.finish_sweep(self._weights, elapsed_s)
        for stream in self._weights:
            if not self._answers.is_open(stream):
                self._finish(stream)
            elif stream not in self._block:
                self._waiting.append(stream)
        self._weights = {}
        return results

    # -- who enters -------------------------------------------------------------------------------------------------

    def _admit(self) -> range:
        """The nodes that enter now: in order, while there is room; always one if nothing else is to be done.

        A run of nodes that belong to one prompt enters as a whole where a sweep can take it at all. Sequences that go
        on take no room from them, lest every block take a sweep more than its prompts fill.
        """
        first, usage, limit = self._next_node, self._usage, self._policy.sweep_tokens
        num_new = 0
        while self._next_node < self._stop_node and self._has_room(self._next_node):
            node = self._next_node
            is_exclusive = usage.num_users[node] == 1
            stop = usage.last_descendant[node] + 1 if is_exclusive else node + 1
            if num_new + usage.num_left[node] > limit and node > first:
                break
            if is_exclusive and usage.num_left[node] > limit:  # longer than any sweep: as much of it as fits
                sizes = np.cumsum(usage.num_tokens[node:stop])
                stop = node + max(1, int(np.searchsorted(sizes, limit - num_new, side="right")))
            self._enter(node)
            num_new += sum(usage.num_tokens[node:stop])
            self._next_node = stop
        return range(first, self._next_node)

    def _seat_waiting(self) -> None:
        """Seat who has drawn a first token: whoever has a seat kept, and of the others as many as there is room for."""
        waiting, self._waiting = self._waiting, deque()
        for stream in waiting:
            if self._has_seat(stream):
                self._block.enter(stream)
            else:
                self._waiting.append(stream)

    def _has_room(self, node: int) -> bool:
        """Whether there is room for the KV that a node leaves, and for a sequence that begins with it."""
        if self._usage.is_owned(node):
            return self._has_seat(self._usage.owner(node))
        if not self._usage.is_shared_by_generating(node):
            return True
        first = next(self._beginning(node), None)
        return (first is None or self._has_seat(first)) and self._kept.has_room(node)

    def _has_seat(self, stream: int) -> bool:
        """Whether there is a seat for a stream; those who wait come first."""
        return self._block.keeps_seat(stream) or (not self._waiting and self._block.has_room(stream))

    def _enter(self, node: int) -> None:
        if self._usage.is_owned(node) and (stream := self._usage.owner(node)) not in self._block:
            self._block.enter(stream)
        self._kept.hold(node)
        for stream in self._beginning(node):
            if self._block.has_room(stream):  # the others wait
                self._block.keep_seat(stream)

    def _beginning(self, node: int) -> Iterator[int]:
        """The streams that draw their first token at the end of a node, and go on."""
        return (stream for stream in self.tree.nodes[node].prompts if self._streams[stream].is_generating)

    def _finish(self, stream: int) -> None:
        """A stream has answered all of its requests: nobody reads its KV again."""
        self._num_unfinished -= 1
        self._block.leave(stream)
        for node in self.tree.path(self._leaf[stream]):
            self._num_open[node] -= 1
            if not self._num_open[node]:
                self._kept.forget(node)

    # -- rows -------------------------------------------------------------------------------------------------------

    def _decode_rows(self, compactions: dict[int, Compaction]) -> Iterator[RowPlan]:
        """One step of every sequence in flight; groups share a row while their sequences fit in it."""
        batches: list[list[Step]] = []
        num_sequences = 0
        for group in self._block.groups:
            step = group.step()
            if not step.seats:
                continue
            if not batches or num_sequences + len(step.seats) > self._policy.group_sequences:
                batches.append([])
                num_sequences = 0
            batches[-1].append(step)
            num_sequences += len(step.seats)
        for batch in batches:
            streams = [seat.stream for step in batch for seat in step.seats]
            self._weights.update(dict.fromkeys(streams, 1))
            first = [compactions.pop(log) for log in (SHARED, *(s.group for s in batch)) if log in compactions]
            drawn = [(self._streams[stream].requests[0], self._answers.last_token(stream)) for stream in streams]
            yield self._rows.decode(batch, drawn, first)

    def _fresh_rows(self, entering: range, compactions: dict[int, Compaction]) -> Iterator[RowPlan]:
        """The nodes that enter, packed in their order."""
        for node in entering:
            self._kept.keep(node)
            for stream in self.tree.nodes[node].prompts:
                self._weights[stream] = self._usage.num_tokens[node]
        start, num_tokens = entering.start, 0
        for node in entering:
            num_tokens += self._usage.num_tokens[node]
            is_last = self._is_apart or node + 1 == entering.stop
            if is_last or num_tokens + self._usage.num_tokens[node + 1] > self._policy.row_tokens:
                first = [compactions.pop(log) for log in list(compactions)]
                yield self._rows.fresh(range(start, node + 1), entering, first)
                start, num_tokens = node + 1, 0

    def _generators_of(self, node: int) -> list[int]:
        """A request of each stream that draws its first token at the end of a node."""
        streams = [self._streams[stream] for stream in self.tree.nodes[node].prompts]
        return [stream.requests[0] for stream in streams if stream.max_tokens]
