"""What has been read off prompt tokens, for each node of a prefix tree once. Knows places of tokens; not requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, islice

import numpy as np

from flexeval.engine.compute.readout import Tokens
from flexeval.planning.prefix import PrefixTree
from flexeval.planning.rows import Scores
from flexeval.planning.scores import Ending
from flexeval.request import Kept, TopLogprobs

Path = Sequence[int | Ending]
"""A prompt: the nodes that it runs through, and its ending where it has one."""


class PromptScores:
    """Arrays over the tokens of all nodes, and then of all endings.

    What results hold of a node is made of them once, for all of its prompts.
    """

    def __init__(self, tree: PrefixTree, endings: Mapping[Ending, int]):
        """Nothing is scored yet; `endings` are numbered."""
        self._bounds = tree.bounds().tolist()
        self._endings = endings
        self._tokens: Tokens | None = None
        self._finite: dict[int | Ending, bool] = {}
        self._logprobs: dict[int | Ending, list[float]] = {}
        self._tops: dict[int | Ending, list[TopLogprobs]] = {}

    def record(self, scores: Scores, scored: Tokens) -> None:
        """Take what was read off a row."""
        if not len(scores):
            return
        if self._tokens is None:
            num_tokens = self._bounds[-1] + len(self._endings)
            self._tokens = Tokens.zeros(num_tokens, scored.top_ids_NK.shape[1], scored.kept_ids_NC.shape[1])
        for values, new in zip(self._tokens, scored, strict=True):
            values[scores.places] = new

    def are_finite(self, path: Path) -> bool:
        """Whether all log-probabilities on a path are finite numbers."""
        for part in path:
            if part not in self._finite:
                self._finite[part] = bool(self._of(part).are_finite().all())
        return all(self._finite[part] for part in path)

    def logprobs(self, path: Path) -> tuple[float, ...]:
        """Of all tokens on a path; 0 for the very first."""
        for part in path:
            if part not in self._logprobs:
                self._logprobs[part] = self._of(part).logprobs_N.tolist()
        return tuple(chain.from_iterable(self._logprobs[part] for part in path))

    def tops(self, path: Path) -> list[TopLogprobs]:
        """The most probable tokens in the place of each on a path; none for the very first."""
        for part in path:
            if part not in self._tops:
                self._tops[part] = self._of(part).tops()
        return [(), *islice(chain.from_iterable(self._tops[part] for part in path), 1, None)]

    def kept(self, path: Path) -> Kept:
        """What is kept in the place of each token on a path but the very first."""
        parts = [self._of(part) for part in path]
        ids_NC = np.concatenate([part.kept_ids_NC for part in parts])
        return Kept(ids_NC[1:], np.concatenate([part.kept_logprobs_NC for part in parts])[1:])

    def _of(self, part: int | Ending) -> Tokens:
        if isinstance(part, Ending):
            first = self._bounds[-1] + self._endings[part]
            stop = first + 1
        else:
            first, stop = self._bounds[part], self._bounds[part + 1]
        return Tokens.zeros(stop - first, 0) if self._tokens is None else self._tokens.part(slice(first, stop))
