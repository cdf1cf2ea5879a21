"""Which log-probabilities of a prefix tree are wanted, and after which token each is read. Knows places of tokens only.

A token's *place* counts the tokens of all nodes, back to back. Its log-probability is read off the logits after the
token before it: the one at the place before, or for the first of a node the last of its parent.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np

from flexeval.planning.prefix import PrefixTree
from flexeval.planning.rows import Scores


class ScoreTable:
    """Everything that is to be scored in one batch of prompts, in the order in which it is read."""

    def __init__(self, tree: PrefixTree, *, is_scored: Sequence[bool]):
        """List all tokens of the nodes that `is_scored` marks, but those that begin a prompt."""
        self._bounds = bounds = tree.bounds()
        scored = np.flatnonzero(is_scored)
        nodes = [tree.nodes[node] for node in scored]
        places = np.flatnonzero(np.repeat(np.array(is_scored, dtype=np.bool_), np.diff(bounds)))
        token_ids = np.fromiter(chain.from_iterable(node.token_ids for node in nodes), np.int64, count=len(places))
        above = np.array([-1 if node.parent is None else node.parent for node in nodes], dtype=np.int64)
        before = places - 1
        before[np.searchsorted(places, bounds[scored])] = bounds[above + 1] - 1  # -1 where a prompt begins
        order = np.argsort(before, kind="stable")[np.count_nonzero(before < 0) :]
        self._before, self._places, self._token_ids = before[order], places[order], token_ids[order]

    def of(self, row: range) -> Scores:
        """What is read off a row of nodes: in them, and at the start of their children wherever those are."""
        first, stop = self._bounds[[row.start, row.stop]]
        own = slice(*np.searchsorted(self._before, (first, stop)))
        return Scores(offsets=self._before[own] - first, token_ids=self._token_ids[own], places=self._places[own])
