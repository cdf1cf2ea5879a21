"""Where the KV of nodes is kept beyond a layer: in their sequence's log, in the one of shared nodes, or nowhere.

Knows logs and the prefix tree; not when anything is computed.
"""

from __future__ import annotations

from flexeval.planning.block import Block
from flexeval.planning.logs import SharedLog
from flexeval.planning.prefix import PrefixTree
from flexeval.planning.rowplans import Place
from flexeval.planning.rows import SHARED, Compaction
from flexeval.planning.usage import NodeUsage


class KeptNodes:
    """The nodes of one batch whose KV outlives their sweep."""

    def __init__(self, tree: PrefixTree, usage: NodeUsage, block: Block, *, sweep_tokens: int):
        """Nothing is kept yet. A sweep has `sweep_tokens` new tokens at most."""
        self._tree = tree
        self._usage = usage
        self._block = block
        self._shared_room = usage.generating_room()
        self._shared = SharedLog(self._shared_room + usage.scoring_room(sweep_tokens=sweep_tokens))
        self._num_held = 0  # tokens of shared nodes that wait for the end of sequences
        self._next_node = 0  # the first that does not enter in this sweep

    @property
    def log_capacities(self) -> dict[int, int]:
        """Tokens that the log of each group, and of shared nodes, can come to hold at most."""
        return {SHARED: self._shared.capacity, **{group.group: group.capacity for group in self._block.groups}}

    def has_room(self, node: int) -> bool:
        """Whether there is room for what a node leaves that generating sequences share."""
        return self._num_held + self._usage.num_tokens[node] <= self._shared_room

    def hold(self, node: int) -> None:
        """A node enters: if generating sequences share it, it takes room until `forget`."""
        if self._usage.is_shared_by_generating(node):
            self._num_held += self._usage.num_tokens[node]

    def forget(self, node: int) -> None:
        """Nobody reads a node again."""
        self._shared.forget(node)
        if self._usage.is_shared_by_generating(node):
            self._num_held -= self._usage.num_tokens[node]

    def begin_sweep(self, entering: range) -> dict[int, Compaction]:
        """Compact the logs that would overflow in a sweep with these nodes, or hold too much that nobody reads."""
        self._next_node = entering.stop
        num_tokens = dict.fromkeys(self.log_capacities, 0)
        for node in entering:
            if (log := self._log_of(node)) is not None:
                num_tokens[log] += self._usage.num_tokens[node]
        compactions = [group.begin_sweep(num_tokens[group.group]) for group in self._block.groups]
        compactions.append(self._shared.begin_sweep(num_tokens[SHARED]))
        return {compaction.group: compaction for compaction in compactions if compaction is not None}

    def keep(self, node: int) -> None:
        """Assign the KV of a node its place."""
        log = self._log_of(node)
        if log == SHARED:
            self._shared.append(node, self._usage.num_tokens[node])
        elif log is not None:
            group, seat = self._block.seat(self._usage.owner(node))
            group.append(seat, self._usage.num_tokens[node])

    def place(self, node: int) -> Place | None:
        """Where the KV of a node is kept."""
        if self._usage.is_owned(node):
            group, seat = self._block.seat(self._usage.owner(node))
            offset = self._tree.nodes[node].first_position - seat.first_position
            return Place(group=group.group, start=int(seat.places[offset]))
        start = self._shared.starts.get(node)
        return None if start is None else Place(group=SHARED, start=start)

    def _log_of(self, node: int) -> int | None:
        """The log that a node of this sweep goes to, if its KV outlives the sweep."""
        if self._usage.is_owned(node):
            return self._block.seat(self._usage.owner(node))[0].group
        has_later_descendants = self._usage.last_descendant[node] >= self._next_node
        return SHARED if has_later_descendants or self._usage.is_generating[node] else None
