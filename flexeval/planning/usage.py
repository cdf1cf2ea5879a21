"""Who uses the nodes of a prefix tree, and the room that their KV takes. Knows counts; not when anything runs.

A node that one prompt alone runs through is *exclusive*: if its sequence generates, its KV lies with the sequence's
own. Nodes that several prompts run through are *shared*: the KV that outlives a sweep lies in a log of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from flexeval.planning.prefix import PrefixTree

PATHS_IN_FLIGHT = 4
"""Room for the shared prefixes of generating sequences, in paths as long as the longest: sequences of an old header
may be slow to end while those of the next ones begin."""


class NodeUsage:
    """Per node of a tree, by index."""

    def __init__(self, tree: PrefixTree, *, is_generating: Sequence[bool]):
        """Count; `is_generating` says of each prompt whether it goes on after its first forward pass."""
        nodes = tree.nodes
        self.num_tokens = [len(node.token_ids) for node in nodes]
        self.num_users = [len(node.prompts) for node in nodes]
        """Prompts that run through it."""
        self.last_descendant = list(range(len(nodes)))
        """Its descendants are the nodes after it, up to this one; itself if it is a leaf."""
        for index in range(len(nodes) - 1, -1, -1):
            if (parent := nodes[index].parent) is not None:
                self.num_users[parent] += self.num_users[index]
                self.last_descendant[parent] = max(self.last_descendant[parent], self.last_descendant[index])
        self.num_left = list(self.num_tokens)
        """Its tokens, and those of its descendants if it is exclusive: a prompt that runs on without a fork."""
        for index in range(len(nodes) - 2, -1, -1):
            if self.num_users[index] == 1 and self.last_descendant[index] > index:
                self.num_left[index] += self.num_left[index + 1]
        self._tree = tree
        self._parents = [node.parent for node in nodes]
        self.is_generating = self.mark({prompt for prompt, generates in enumerate(is_generating) if generates})
        """Whether a prompt that generates runs through it."""
        self.num_own: list[int] = []
        """Tokens of the exclusive run that it is part of; 0 if it is not exclusive."""
        for index, parent in enumerate(self._parents):
            is_inside = parent is not None and self.num_users[parent] == 1
            whole = self.num_own[parent] if is_inside and parent is not None else self.num_left[index]
            self.num_own.append(whole if self.num_users[index] == 1 else 0)

    def mark(self, prompts: AbstractSet[int]) -> list[bool]:
        """Per node, whether one of some prompts runs through it."""
        marked = [not prompts.isdisjoint(node.prompts) for node in self._tree.nodes]
        for index in range(len(marked) - 1, -1, -1):
            if marked[index] and (parent := self._parents[index]) is not None:
                marked[parent] = True
        return marked

    def owner(self, node: int) -> int:
        """The only prompt that runs through an exclusive node."""
        return self._tree.nodes[self.last_descendant[node]].prompts[0]

    def is_owned(self, node: int) -> bool:
        """Whether its KV is part of one generating sequence's own."""
        return self.num_users[node] == 1 and self.is_generating[node]

    def is_shared_by_generating(self, node: int) -> bool:
        """Whether several prompts run through it, and some of them generate: its KV is needed until they end."""
        return self.num_users[node] > 1 and self.is_generating[node]

    def generating_room(self) -> int:
        """Tokens to hold at once of prefixes that generating sequences share."""
        is_held = [self.is_shared_by_generating(node) for node in range(len(self.num_tokens))]
        total, longest = self._total_and_longest(is_held)
        return min(total, PATHS_IN_FLIGHT * longest)

    def scoring_room(self, *, sweep_tokens: int | None = None) -> int:
        """Tokens to hold at once of prefixes whose descendants are all done after one forward pass.

        What lies above the first node of the next sweep stays until then; so a sweep may hold such a path from before
        it and another for after it.

        Args:
            sweep_tokens: A sweep's tokens at most: a longer exclusive run takes several. None: every run fits one.
        """
        is_held = [
            not self.is_generating[node]
            and (self.num_users[node] > 1 or (sweep_tokens is not None and self.num_own[node] > sweep_tokens))
            for node in range(len(self.num_tokens))
        ]
        total, longest = self._total_and_longest(is_held)
        return min(total, 2 * longest)

    def _total_and_longest(self, is_held: Sequence[bool]) -> tuple[int, int]:
        """Tokens of the nodes that `is_held` marks: of all, and the most on one path."""
        on_path: list[int] = []
        for node, parent in enumerate(self._parents):
            above = 0 if parent is None else on_path[parent]
            on_path.append(above + (self.num_tokens[node] if is_held[node] else 0))
        total = sum(size for size, held in zip(self.num_tokens, is_held, strict=True) if held)
        return total, max(on_path, default=0)
