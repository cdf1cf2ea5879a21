"""What has been read off so far, and who is answered by it. Knows requests and their streams; not what runs when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flexeval.engine.compute.readout import Drawn, Readout, Scored
from flexeval.planning.prefix import PrefixTree
from flexeval.planning.rows import RowPlan
from flexeval.planning.streams import Stream
from flexeval.request import FinishReason, TokenRequest, TokenResult


class Answers:
    """Tokens drawn and scored for one batch of requests, and the time that each has taken."""

    def __init__(self, requests: Sequence[TokenRequest], streams: Sequence[Stream], tree: PrefixTree):
        """Nothing is answered yet; `tree` holds the streams' prompts."""
        self._requests = requests
        self._streams = streams
        self._tree = tree
        self._leaf = {stream: node for node, entry in enumerate(tree.nodes) for stream in entry.prompts}
        self._stream_of = {request: index for index, stream in enumerate(streams) for request in stream.requests}
        self._drawn: list[list[Drawn]] = [[] for _ in streams]
        self._ids: list[list[int]] = [[] for _ in streams]
        self._open = [list(stream.requests) for stream in streams]
        self._scores: dict[int, list[Scored]] = {}
        self._elapsed_s = [0.0] * len(requests)
        self._unassigned_s = 0.0

    def is_open(self, stream: int) -> bool:
        """Whether a request waits for more of a stream."""
        return bool(self._open[stream])

    def num_left(self, stream: int) -> int:
        """Tokens of a stream that are waited for at most."""
        return max(self._requests[request].max_tokens for request in self._open[stream]) - len(self._ids[stream])

    def last_token(self, stream: int) -> int:
        """The token drawn last."""
        return self._ids[stream][-1]

    def num_drawn(self, request: int) -> int:
        """Tokens drawn so far by the stream of a request."""
        return len(self._ids[self._stream_of[request]])

    def record(self, plan: RowPlan, readout: Readout) -> None:
        """Take what was read off a row."""
        for score, scored in zip(plan.scores, readout.scored, strict=True):
            if score.node not in self._scores:
                self._scores[score.node] = [_UNSCORED] * len(self._tree.nodes[score.node].token_ids)
            self._scores[score.node][score.index] = scored
        for (_, request), drawn in zip(plan.generators, readout.drawn, strict=True):
            stream = self._stream_of[request]
            self._drawn[stream].append(drawn)
            self._ids[stream].append(drawn.token_id)

    def finish_sweep(self, weights: Mapping[int, int], elapsed_s: float) -> list[tuple[int, TokenResult]]:
        """End a sweep: share its time among the requests in it and answer those that are done.

        Args:
            weights: The streams that had a part in it, and the tokens computed for each.
            elapsed_s: Its seconds.
        """
        self._unassigned_s += elapsed_s
        total = sum(weights.values())
        for stream, weight in weights.items():
            share_s = self._unassigned_s * weight / total / len(self._open[stream])
            for request in self._open[stream]:
                self._elapsed_s[request] += share_s
        if total:
            self._unassigned_s = 0.0
        results = []
        for stream in weights:
            reasons = [(request, self._reason(request, stream)) for request in self._open[stream]]
            self._open[stream] = [request for request, reason in reasons if reason is None]
            results += [(request, self._result(request, stream, reason)) for request, reason in reasons if reason]
        return results

    def _reason(self, request: int, stream: int) -> FinishReason | None:
        """Why a request is done, or None while it is not."""
        asked, ids = self._requests[request], self._ids[stream]
        if asked.max_tokens == 0:
            return FinishReason.LENGTH
        if ids[-1] in asked.eos_ids:
            return FinishReason.ENDOFTEXT
        if asked.is_stopped is not None and asked.is_stopped(ids):
            return FinishReason.STOP
        return FinishReason.LENGTH if len(ids) == asked.max_tokens else None

    def _result(self, request: int, stream: int, reason: FinishReason) -> TokenResult:
        asked = self._requests[request]
        drawn = self._drawn[stream] if asked.max_tokens else []
        wants_top, cut = asked.num_top_logprobs > 0, asked.num_top_logprobs
        prompt = self._prompt_scores(stream) if asked.score_prompt else []
        return TokenResult(
            token_ids=tuple(token.token_id for token in drawn),
            logprobs=tuple(token.logprob for token in drawn),
            finish_reason=reason,
            top_logprobs=tuple(token.top_logprobs[:cut] for token in drawn) if wants_top else (),
            prompt_logprobs=tuple(scored.logprob for scored in prompt),
            prompt_top_logprobs=tuple(scored.top_logprobs[:cut] for scored in prompt) if wants_top else (),
            elapsed_s=self._elapsed_s[request],
        )

    def _prompt_scores(self, stream: int) -> list[Scored]:
        """Of every prompt token; the very first is 0."""
        prompt: list[Scored] = []
        for node in self._tree.path(self._leaf[stream]):
            prompt += self._scores.get(node) or [_UNSCORED] * len(self._tree.nodes[node].token_ids)
        return prompt


_UNSCORED = Scored(0.0, ())
