"""Builds row plans from nodes and sequences. Knows the prefix tree and where kept KV lies; not when a row runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flexeval.planning.prefix import PrefixTree
from flexeval.planning.rows import AncestorSpan, DecodeSpan, FreshSpan, Keep, KeySource, RowPlan, Score


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceStep:
    """The next token of one sequence."""

    request: int
    """Whose."""
    node: int
    """Where its prompt ends."""
    token_id: int
    """The token drawn last, which is computed now."""
    position: int
    """Its position in the sequence."""
    own_log_tokens: tuple[int, ...]
    """Where in its group's log its own context lies, the new token last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogStep:
    """The next token of all live sequences of a group."""

    group: int
    """The group."""
    log_length: int
    """Tokens in its log before this step."""
    sequences: tuple[SequenceStep, ...]
    """In the order of their nodes."""


Row = tuple[int, ...]
"""Nodes computed together for the first time."""


class RowBuilder:
    """Makes the rows of one batch of requests."""

    def __init__(
        self,
        tree: PrefixTree,
        *,
        children: Sequence[Sequence[int]],
        group_of: Mapping[int, int],
        is_scored: Sequence[bool],
        is_generating: Sequence[bool],
        kept_at: Mapping[int, int],
    ):
        """Take what holds for the whole batch.

        Args:
            tree: All prompts.
            children: Of each node.
            group_of: The group of each node.
            is_scored: Per node, whether the log-probabilities of its tokens are wanted.
            is_generating: Per request, whether a token follows its prompt.
            kept_at: For nodes whose KV is kept, where in their group's log it begins; grows as groups are admitted.
        """
        self._tree = tree
        self._children = children
        self._group_of = group_of
        self._is_scored = is_scored
        self._is_generating = is_generating
        self._kept_at = kept_at

    def fresh(self, group: int, row: Row, *, place: Mapping[int, Row]) -> RowPlan:
        """A row of nodes on their first pass.

        Args:
            group: Their group.
            row: The nodes, depth first.
            place: The row of every node that this sweep computes for the first time.
        """
        nodes = self._tree.nodes
        spans: list[FreshSpan] = []
        for node in row:
            start = spans[-1].start + spans[-1].length if spans else 0
            spans.append(FreshSpan(node=node, start=start, length=len(nodes[node].token_ids)))
        starts = {span.node: span.start for span in spans}
        return RowPlan(
            token_ids=tuple(token for node in row for token in nodes[node].token_ids),
            positions=tuple(nodes[s.node].first_position + offset for s in spans for offset in range(s.length)),
            fresh=tuple(spans),
            ancestors=self._ancestors([(s.start, s.length, s.node) for s in spans], starts, place),
            keeps=self._keeps(group, [span for span in spans if span.node in self._kept_at]),
            scratch=tuple(span for span in spans if self._is_needed_elsewhere(span.node, row, place)),
            scores=tuple(score for span in spans for score in self._scores(span)),
            generators=tuple(
                (span.start + span.length - 1, request)
                for span in spans
                for request in nodes[span.node].prompts
                if self._is_generating[request]
            ),
        )

    def decode(self, steps: Sequence[LogStep]) -> RowPlan:
        """A row of one new token for each sequence of some groups."""
        spans: list[DecodeSpan] = []
        order: list[SequenceStep] = []
        for step in steps:
            spans.append(
                DecodeSpan(
                    group=step.group,
                    start=len(order),
                    log_length=step.log_length,
                    own_tokens=tuple(sequence.own_log_tokens for sequence in step.sequences),
                    first_own_positions=tuple(
                        self._tree.nodes[sequence.node].first_position for sequence in step.sequences
                    ),
                )
            )
            order += step.sequences
        return RowPlan(
            token_ids=tuple(sequence.token_id for sequence in order),
            positions=tuple(sequence.position for sequence in order),
            decode=tuple(spans),
            ancestors=self._ancestors([(index, 1, sequence.node) for index, sequence in enumerate(order)], {}, {}),
            keeps=tuple(
                Keep(group=span.group, log_start=span.log_length, spans=((span.start, len(span.own_tokens)),))
                for span in spans
            ),
            generators=tuple((index, sequence.request) for index, sequence in enumerate(order)),
        )

    def _keeps(self, group: int, spans: Sequence[FreshSpan]) -> tuple[Keep, ...]:
        """Nodes of one group are kept in their order, so a row's part of the log has no gaps."""
        if not spans:
            return ()
        return (
            Keep(
                group=group,
                log_start=self._kept_at[spans[0].node],
                spans=tuple((span.start, span.length) for span in spans),
            ),
        )

    def _scores(self, span: FreshSpan) -> list[Score]:
        """What is read off a node: the log-probability of each next token, in it and at the start of its children."""
        ids = self._tree.nodes[span.node].token_ids
        scores = []
        if self._is_scored[span.node]:
            scores = [
                Score(offset=span.start + index - 1, token_id=ids[index], node=span.node, index=index)
                for index in range(1, span.length)
            ]
        last = span.start + span.length - 1
        return scores + [
            Score(offset=last, token_id=self._tree.nodes[child].token_ids[0], node=child, index=0)
            for child in self._children[span.node]
            if self._is_scored[child]
        ]

    def _is_needed_elsewhere(self, node: int, row: Row, place: Mapping[int, Row]) -> bool:
        """Whether a later row of the sweep holds a descendant."""
        pending = list(self._children[node])
        while pending:
            child = pending.pop()
            if place.get(child, row) is not row:
                return True
            pending += self._children[child]
        return False

    def _ancestors(
        self, members: Sequence[tuple[int, int, int]], starts: Mapping[int, int], place: Mapping[int, Row]
    ) -> tuple[AncestorSpan, ...]:
        """For each ancestor of the row's members (start, length, node), the span of tokens that see it."""
        ranges: dict[int, tuple[int, int]] = {}
        for start, length, node in members:
            for ancestor in self._tree.path(node)[:-1]:
                first, stop = ranges.get(ancestor, (start, start))
                assert stop == start, (ancestor, first, stop, start, "descendants lie depth first, without a gap")
                ranges[ancestor] = (first, start + length)
        return tuple(
            AncestorSpan(
                start=first,
                length=stop - first,
                num_keys=len(self._tree.nodes[ancestor].token_ids),
                first_key_position=self._tree.nodes[ancestor].first_position,
                source=self._source(ancestor, starts, place),
            )
            for ancestor, (first, stop) in ranges.items()
        )

    def _source(self, node: int, starts: Mapping[int, int], place: Mapping[int, Row]) -> KeySource:
        """Where an ancestor's KV is: in the row, left by an earlier row of the sweep, or in a log."""
        if node in starts:
            return KeySource(row_start=starts[node])
        if node in place:
            return KeySource(scratch_node=node)
        return KeySource(group=self._group_of[node], log_start=self._kept_at[node])
