"""What has been read off prompt tokens, for each node of a prefix tree once. Knows places of tokens; not requests."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, islice

import numpy as np

from flexeval.engine.compute.readout import Tokens
from flexeval.planning.prefix import PrefixTree
from flexeval.planning.rows import Scores
from flexeval.request import Kept, TopLogprobs


class PromptScores:
    """Arrays over the tokens of all nodes; what results hold of a node is made of them once, for all of its prompts."""

    def __init__(self, tree: PrefixTree):
        """Nothing is scored yet."""
        self._bounds = tree.bounds().tolist()
        self._tokens: Tokens | None = None
        self._finite: dict[int, bool] = {}
        self._logprobs: dict[int, list[float]] = {}
        self._tops: dict[int, list[TopLogprobs]] = {}

    def record(self, scores: Scores, scored: Tokens) -> None:
        """Take what was read off a row."""
        if not len(scores):
            return
        if self._tokens is None:
            self._tokens = Tokens.zeros(self._bounds[-1], scored.top_ids_NK.shape[1], scored.kept_ids_NC.shape[1])
        for values, new in zip(self._tokens, scored, strict=True):
            values[scores.places] = new

    def are_finite(self, path: Sequence[int]) -> bool:
        """Whether all log-probabilities on a path are finite numbers."""
        for node in path:
            if node not in self._finite:
                self._finite[node] = bool(self._of(node).are_finite().all())
        return all(self._finite[node] for node in path)

    def logprobs(self, path: Sequence[int]) -> tuple[float, ...]:
        """Of all tokens on a path; 0 for the very first."""
        for node in path:
            if node not in self._logprobs:
                self._logprobs[node] = self._of(node).logprobs_N.tolist()
        return tuple(chain.from_iterable(self._logprobs[node] for node in path))

    def tops(self, path: Sequence[int]) -> list[TopLogprobs]:
        """The most probable tokens in the place of each on a path; none for the very first."""
        for node in path:
            if node not in self._tops:
                self._tops[node] = self._of(node).tops()
        return [(), *islice(chain.from_iterable(self._tops[node] for node in path), 1, None)]

    def kept(self, path: Sequence[int]) -> Kept:
        """What is kept in the place of each token on a path but the very first."""
        parts = [self._of(node) for node in path]
        ids_NC = np.concatenate([part.kept_ids_NC for part in parts])
        return Kept(ids_NC[1:], np.concatenate([part.kept_logprobs_NC for part in parts])[1:])

    def _of(self, node: int) -> Tokens:
        first, stop = self._bounds[node], self._bounds[node + 1]
        return Tokens.zeros(stop - first, 0) if self._tokens is None else self._tokens.part(slice(first, stop))
