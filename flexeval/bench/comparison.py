"""A peer held against the engine: how many times as fast, and how long a peer that answered a part takes for the whole.

Plain arithmetic on what was measured; runs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from flexeval.bench.figures import SpeedupFigures, SystemFigures, WholeFigures
from flexeval.bench.timing import Measured
from flexeval.errors import ConfigError
from flexeval.request import Request


def hold_against(
    peer: Measured,
    ours: Sequence[Measured],
    requests: Sequence[Request],
    *,
    asked: Sequence[int],
    max_tokens: int | None,
) -> SystemFigures:
    """The peer's figures beside the engine's.

    Args:
        peer: What was measured of the peer.
        ours: Of the engine, under each setting.
        requests: All of the work, which the engine has answered.
        asked: Which of it the peer has answered.
        max_tokens: Tokens that the peer generated for each at most; None is as many as the engine.

    Raises:
        ConfigError: The part does not say how long the whole would take.
    """
    figures = peer.figures
    if len(asked) < len(requests) or max_tokens is not None:
        figures = replace(figures, whole=_whole(figures, ours[0].figures, requests))
    num_same = sum(
        ours[0].answers[index][:max_tokens] == answer for index, answer in zip(asked, peer.answers, strict=True)
    )
    speedups = {one.figures.setting: _speedup(one.figures, figures) for one in ours}
    return replace(
        figures,
        batch_size=min(figures.batch_size, len(asked)),
        speedups=speedups,
        same_answers=num_same / len(asked),
    )


def _whole(part: SystemFigures, ours: SystemFigures, requests: Sequence[Request]) -> WholeFigures:
    """What all requests would take the peer. A sequence's first token comes with its prompt."""
    num_decode = max(0, ours.tokens.num_generated - sum(request.max_tokens > 0 for request in requests))
    prefill, decode = part.phases["prefill"], part.phases.get("decode")
    if num_decode and decode is None:
        raise ConfigError(
            f"none of the {part.num_requests} requests asked generates a second token: what one takes is not known",
            where="--peer-requests",
            mend="Ask more of them",
        )
    decode_s = num_decode * decode.elapsed_s / decode.num_decode_tokens if decode else 0.0
    return WholeFigures(
        num_requests=len(requests),
        num_generated=ours.tokens.num_generated,
        elapsed_s=ours.tokens.num_asked * prefill.elapsed_s / prefill.num_fresh_tokens + decode_s,
        batch_size=part.batch_size,
    )


def _speedup(ours: SystemFigures, peer: SystemFigures) -> SpeedupFigures:
    our_decode, decode = ours.phases.get("decode"), peer.phases.get("decode")
    prompt_tokens_per_s = ours.tokens.num_asked / ours.phases["prefill"].elapsed_s
    return SpeedupFigures(
        requests=ours.requests_per_s / peer.requests_per_s,
        prompt_tokens=prompt_tokens_per_s / peer.prefill_tokens_per_s,
        decode_tokens=our_decode.decode_tokens_per_s / decode.decode_tokens_per_s if our_decode and decode else None,
    )
