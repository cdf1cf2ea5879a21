"""What has been read off so far, and who is answered by it. Knows requests and their streams; not what runs when."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from flexeval.engine.compute.readout import Readout
from flexeval.engine.prompt_scores import Path, PromptScores
from flexeval.planning.prefix import PrefixTree
from flexeval.planning.rows import RowPlan
from flexeval.planning.scores import Ending
from flexeval.planning.streams import Stream
from flexeval.request import FinishReason, Kept, TokenRequest, TokenResult, TopLogprobs


class Answers:
    """Tokens drawn and scored for one batch of requests, and the time that each has taken."""

    def __init__(
        self,
        requests: Sequence[TokenRequest],
        streams: Sequence[Stream],
        tree: PrefixTree,
        endings: Mapping[Ending, int],
    ):
        """Nothing is answered yet; `tree` holds the streams' prompts, and `endings` what is scored beyond them."""
        self._requests = requests
        self._streams = streams
        self._tree = tree
        self._leaf = {stream: node for node, entry in enumerate(tree.nodes) for stream in entry.prompts}
        self._stream_of = {request: index for index, stream in enumerate(streams) for request in stream.requests}
        self._ids: list[list[int]] = [[] for _ in streams]
        self._logprobs: list[list[float]] = [[] for _ in streams]
        self._tops: list[list[TopLogprobs]] = [[] for _ in streams]
        self._kept: list[list[Kept]] = [[] for _ in streams]
        self._open = [stream.requests for stream in streams]
        self._max_tokens = [stream.max_tokens for stream in streams]
        self._prompts = PromptScores(tree, endings)
        self._broken: set[int] = set()  # streams that have drawn from logits that are none
        self.failed: dict[int, tuple[int, ...]] = {}
        """Requests without an answer, for logits were not finite; what they read, and drew before that."""
        self._elapsed_s = [0.0] * len(streams)  # of each request that is still open
        self._unassigned_s = 0.0

    def is_open(self, stream: int) -> bool:
        """Whether a request waits for more of a stream."""
        return bool(self._open[stream])

    def num_left(self, stream: int) -> int:
        """Tokens of a stream that are waited for at most."""
        return self._max_tokens[stream] - len(self._ids[stream])

    def last_token(self, stream: int) -> int:
        """The token drawn last."""
        return self._ids[stream][-1]

    def num_drawn(self, request: int) -> int:
        """Tokens drawn so far by the stream of a request."""
        return len(self._ids[self._stream_of[request]])

    def record(self, plan: RowPlan, readout: Readout) -> None:
        """Take what was read off a row."""
        self._prompts.record(plan.scores, readout.scored)
        drawn = readout.drawn
        streams = [self._stream_of[request] for _, request in plan.generators]
        for stream, token_id, logprob in zip(
            streams, drawn.token_ids_N.tolist(), drawn.logprobs_N.tolist(), strict=True
        ):
            self._ids[stream].append(token_id)
            self._logprobs[stream].append(logprob)
        self._broken.update(
            stream for stream, is_one in zip(streams, drawn.are_finite().tolist(), strict=True) if not is_one
        )
        if drawn.top_ids_NK.size:
            for stream, top_logprobs in zip(streams, drawn.tops(), strict=True):
                self._tops[stream].append(top_logprobs)
        if drawn.kept_ids_NC.size:
            for stream, columns in zip(
                streams, zip(drawn.kept_ids_NC, drawn.kept_logprobs_NC, strict=True), strict=True
            ):
                self._kept[stream].append(Kept(*columns))

    def finish_sweep(self, weights: Mapping[int, int], elapsed_s: float) -> list[tuple[int, TokenResult]]:
        """End a sweep: share its time among the requests in it; answer those that are done, or note that they failed.

        Args:
            weights: The streams that had a part in it, and the tokens computed for each.
            elapsed_s: Its seconds.
        """
        self._unassigned_s += elapsed_s
        total = sum(weights.values())
        for stream, weight in weights.items():
            self._elapsed_s[stream] += self._unassigned_s * weight / total / len(self._open[stream])
        if total:
            self._unassigned_s = 0.0
        results = []
        for stream in weights:
            reasons = [(request, self._reason(request, stream)) for request in self._open[stream]]
            if done := [(request, reason) for request, reason in reasons if reason is not None]:
                for request, reason in done:
                    if (result := self._result(request, stream, reason)) is not None:
                        results.append((request, result))
                    else:
                        self.failed[request] = (*self._streams[stream].prompt_ids, *self._ids[stream][:-1])
                self._close(stream, {request for request, _ in done})
        return results

    def _reason(self, request: int, stream: int) -> FinishReason | None:
        """Why a request is done, or None while it is not."""
        asked, ids = self._requests[request], self._ids[stream]
        if asked.max_tokens == 0 or stream in self._broken:
            return FinishReason.LENGTH
        if ids[-1] in asked.eos_ids:
            return FinishReason.ENDOFTEXT
        if asked.is_stopped is not None and asked.is_stopped(ids):
            return FinishReason.STOP
        return FinishReason.LENGTH if len(ids) == asked.max_tokens else None

    def _close(self, stream: int, done: Collection[int]) -> None:
        """Some requests of a stream are answered; its last ones may wait for fewer tokens."""
        left = self._open[stream] = tuple(request for request in self._open[stream] if request not in done)
        self._max_tokens[stream] = max((self._requests[request].max_tokens for request in left), default=0)

    def _result(self, request: int, stream: int, reason: FinishReason) -> TokenResult | None:
        """The answer; None where a log-probability in it is none."""
        asked = self._requests[request]
        cut = asked.num_top_logprobs
        path: list[int | Ending] = []
        if asked.score_prompt:
            path += self._tree.path(leaf := self._leaf[stream])
            if (last := self._streams[stream].last_ids.get(request)) is not None:
                path.append(Ending(leaf, last))
        if (asked.max_tokens and stream in self._broken) or not self._prompts.are_finite(path):
            return None
        return TokenResult(
            token_ids=tuple(self._ids[stream]) if asked.max_tokens else (),
            logprobs=tuple(self._logprobs[stream]) if asked.max_tokens else (),
            finish_reason=reason,
            top_logprobs=tuple(top[:cut] for top in self._tops[stream]) if cut and asked.max_tokens else (),
            prompt_logprobs=self._prompts.logprobs(path),
            prompt_top_logprobs=tuple(top[:cut] for top in self._prompts.tops(path)) if cut and path else (),
            kept=self._kept_of(stream, path, is_drawn=asked.max_tokens > 0) if asked.keep_top else None,
            elapsed_s=self._elapsed_s[stream],
        )

    def _kept_of(self, stream: int, path: Path, *, is_drawn: bool) -> Kept:
        """What is kept of the distributions on a path and of those that were drawn from."""
        parts = [self._prompts.kept(path)] if path else []
        if is_drawn:
            parts.append(Kept(*map(np.stack, zip(*self._kept[stream], strict=True))))
        found = [part for part in parts if len(part.token_ids_NC)]  # a lone token has no score
        return Kept(*map(np.concatenate, zip(*found, strict=True))) if found else parts[0]
