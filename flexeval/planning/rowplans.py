"""Builds row plans from nodes and sequences. Knows the prefix tree and where kept KV lies; not when a row runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from flexeval.planning.logs import Step
from flexeval.planning.prefix import PrefixTree
from flexeval.planning.rows import (
    AncestorSpan,
    Compaction,
    DecodeSpan,
    FreshSpan,
    Integers,
    Keep,
    KeySource,
    RowPlan,
)
from flexeval.planning.scores import ScoreTable


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where the KV of a node is kept."""

    group: int
    """In whose log; `SHARED` for the log of shared nodes."""
    start: int
    """From which token on."""


class RowBuilder:
    """Makes the rows of one batch of requests."""

    def __init__(
        self,
        tree: PrefixTree,
        *,
        last_descendant: Sequence[int],
        scores: ScoreTable,
        generators_of: Callable[[int], Sequence[int]],
        place_of: Callable[[int], Place | None],
    ):
        """Take what holds for the whole batch.

        Args:
            tree: All prompts.
            last_descendant: Of each node, as `NodeUsage` has it.
            scores: Which log-probabilities of prompt tokens are wanted.
            generators_of: The requests for which a token is drawn at the end of a node.
            place_of: Where the KV of a node is kept, or None where it is not.
        """
        self._tree = tree
        self._last_descendant = last_descendant
        self._scores = scores
        self._generators_of = generators_of
        self._place_of = place_of

    def fresh(self, row: range, sweep: range, compactions: Sequence[Compaction] = ()) -> RowPlan:
        """A row of nodes on their first pass, out of those of a sweep."""
        nodes = self._tree.nodes
        spans: list[FreshSpan] = []
        for node in row:
            start = spans[-1].start + spans[-1].length if spans else 0
            spans.append(FreshSpan(node=node, start=start, length=len(nodes[node].token_ids)))
        starts = {span.node: span.start for span in spans}
        positions = np.concatenate([np.arange(span.length) + nodes[span.node].first_position for span in spans])
        return RowPlan(
            token_ids=np.concatenate([nodes[node].token_ids for node in row]),
            positions=positions,
            fresh=tuple(spans),
            ancestors=self._ancestors(
                [(span.start, span.length, nodes[span.node].parent) for span in spans], starts, sweep, positions
            ),
            compactions=tuple(compactions),
            keeps=self._keeps(spans),
            scratch=tuple(
                span for span in spans if row.stop <= self._last_descendant[span.node] and row.stop < sweep.stop
            ),
            scores=self._scores.of(row),
            generators=tuple(
                (span.start + span.length - 1, request) for span in spans for request in self._generators_of(span.node)
            ),
        )

    def decode(
        self, steps: Sequence[Step], drawn: Sequence[tuple[int, int]], compactions: Sequence[Compaction] = ()
    ) -> RowPlan:
        """A row of one new token for each sequence of some groups; `drawn` has each one's (request, last token)."""
        positions = np.array([seat.first_position + seat.length - 1 for step in steps for seat in step.seats])
        spans: list[DecodeSpan] = []
        ancestors: list[AncestorSpan] = []
        start = 0
        for step in steps:
            spans.append(
                DecodeSpan(
                    group=step.group,
                    start=start,
                    log_length=step.log_length,
                    own_tokens=[seat.own_places for seat in step.seats],
                    first_own_positions=[seat.first_position for seat in step.seats],
                    version=step.version,
                )
            )
            members: list[tuple[int, int, int | None]] = []
            for above, seats in groupby(step.seats, key=lambda seat: seat.above):
                count = sum(1 for _ in seats)
                members.append((start, count, above))
                start += count
            ancestors += self._ancestors(members, {}, range(0), positions)
        return RowPlan(
            token_ids=np.array([token for _, token in drawn]),
            positions=positions,
            decode=tuple(spans),
            ancestors=tuple(ancestors),
            compactions=tuple(compactions),
            keeps=tuple(
                Keep(group=span.group, log_start=span.log_length, spans=((span.start, len(span.own_tokens)),))
                for span in spans
            ),
            generators=tuple((index, request) for index, (request, _) in enumerate(drawn)),
        )

    def _keeps(self, spans: Sequence[FreshSpan]) -> tuple[Keep, ...]:
        """Nodes go into a log in the order in which they are computed, so a row's part of a log has no gaps."""
        kept: dict[int, list[tuple[Place, FreshSpan]]] = {}
        for span in spans:
            if (place := self._place_of(span.node)) is not None:
                kept.setdefault(place.group, []).append((place, span))
        return tuple(
            Keep(group=group, log_start=own[0][0].start, spans=tuple((span.start, span.length) for _, span in own))
            for group, own in kept.items()
        )

    def _ancestors(
        self,
        members: Sequence[tuple[int, int, int | None]],
        starts: Mapping[int, int],
        sweep: range,
        positions: Integers,
    ) -> tuple[AncestorSpan, ...]:
        """For each ancestor of the row's members (start, length, node above), the span of tokens that see it."""
        ranges: dict[int, tuple[int, int]] = {}
        for start, length, above in members:
            for ancestor in self._tree.path(above) if above is not None else ():
                first, stop = ranges.get(ancestor, (start, start))
                assert stop == start, (ancestor, first, stop, start, "descendants lie depth first, without a gap")
                ranges[ancestor] = (first, start + length)
        return tuple(
            AncestorSpan(
                start=first,
                length=stop - first,
                num_keys=len(self._tree.nodes[ancestor].token_ids),
                first_key_position=self._tree.nodes[ancestor].first_position,
                last_position=int(positions[first:stop].max()),
                source=self._source(ancestor, starts, sweep),
            )
            for ancestor, (first, stop) in ranges.items()
        )

    def _source(self, node: int, starts: Mapping[int, int], sweep: range) -> KeySource:
        """Where an ancestor's KV is: in the row, left by an earlier row of the sweep, or in a log."""
        if node in starts:
            return KeySource(row_start=starts[node])
        if node in sweep:
            return KeySource(scratch_node=node)
        place = self._place_of(node)
        assert place is not None, (node, "an ancestor's KV is gone")
        return KeySource(group=place.group, log_start=place.start)
