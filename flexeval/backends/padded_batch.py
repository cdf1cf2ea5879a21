"""One padded batch through a transformers model and its own cache: what every peer does. Knows no offloading.

Prompts are padded on the left to the longest, and the batch goes on until its last sequence is done, as with
transformers' `generate`.

Shapes: B sequences of a batch, T tokens of the longest prompt, V vocabulary.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from flexeval.engine.compute import keeping
from flexeval.engine.compute.keeping import Keeper
from flexeval.engine.compute.sampling import sample
from flexeval.request import FinishReason, Kept, TokenRequest, TokenResult, TopLogprobs

_PAD = 0
"""Any token: masked."""


class BatchTrace(NamedTuple):
    """What a batch took, and for how much."""

    prefill_s: float
    """Seconds of the prompts' forward pass."""
    decode_s: float
    """Seconds of those after it."""
    num_steps: int
    """Forward passes after the prompts'."""
    num_prompt_tokens: int
    """Tokens of its prompts, padding apart."""
    num_generated_tokens: int
    """Tokens generated."""
    num_decode_tokens: int
    """Of these, all but each sequence's first one, which the prompt's pass gives."""


class BatchAnswer(NamedTuple):
    """A batch's results and what they took."""

    results: list[TokenResult]
    trace: BatchTrace


@dataclass(slots=True)
class _Sequence:
    """One request on its way."""

    request: TokenRequest
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    tops: list[TopLogprobs] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)
    prompt_tops: list[TopLogprobs] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    keeper: Keeper | None = None
    reason: FinishReason | None = None

    def score(self, logits_TV: Tensor) -> None:
        """Take the logits of the prompt's positions."""
        if self.request.score_prompt:
            logprobs_TV = logits_TV[:-1].float().log_softmax(-1)
            targets_T = torch.tensor(self.request.prompt_ids[1:], device=logits_TV.device)
            self.prompt_logprobs = [0.0, *logprobs_TV.gather(1, targets_T[:, None])[:, 0].tolist()]
            self.prompt_tops = [(), *top_logprobs(logprobs_TV, self.request.num_top_logprobs)]
            self._keep(logprobs_TV, self.request.prompt_ids[:-1], 0)
        if self.request.max_tokens == 0:
            self.reason = FinishReason.LENGTH

    def draw(self, logits_V: Tensor, greedy: tuple[int, float], logprobs_V: Tensor) -> None:
        """Take the next token, unless the sequence is done: then it only waits for the others.

        Args:
            logits_V: What it is drawn from.
            greedy: The most probable token and its log-probability.
            logprobs_V: All of them.
        """
        if self.reason is not None:
            return
        asked = self.request
        token, logprob = greedy
        self._keep(
            logprobs_V[None], [*asked.prompt_ids, *self.tokens][-1:], len(asked.prompt_ids) + len(self.tokens) - 1
        )
        if asked.temperature > 0:
            token = sample(logits_V, asked, len(self.tokens))
            logprob = float(logprobs_V[token])
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.tops += top_logprobs(logprobs_V[None], asked.num_top_logprobs)
        if token in asked.eos_ids:
            self.reason = FinishReason.ENDOFTEXT
        elif asked.is_stopped is not None and asked.is_stopped(self.tokens):
            self.reason = FinishReason.STOP
        elif len(self.tokens) == asked.max_tokens:
            self.reason = FinishReason.LENGTH

    def _keep(self, logprobs_TV: Tensor, token_ids: Sequence[int], first: int) -> None:
        """Keep the distributions after some tokens, of which `first` is the first one's position."""
        if self.keeper is not None and self.request.keep_top:
            shifts = keeping.shifts(token_ids, range(first, first + len(token_ids)))
            kept = self.keeper.keep(logprobs_TV, torch.from_numpy(shifts).to(logprobs_TV.device))
            self.kept.append(Kept(*(values.cpu().numpy() for values in kept)))

    def result(self, elapsed_s: float) -> TokenResult:
        """The answer."""
        assert self.reason is not None
        wants_top = self.request.num_top_logprobs > 0
        return TokenResult(
            token_ids=tuple(self.tokens),
            logprobs=tuple(self.logprobs),
            finish_reason=self.reason,
            top_logprobs=tuple(self.tops) if wants_top else (),
            prompt_logprobs=tuple(self.prompt_logprobs),
            prompt_top_logprobs=tuple(self.prompt_tops) if wants_top else (),
            kept=Kept(*map(np.concatenate, zip(*self.kept, strict=True))) if self.kept else None,
            elapsed_s=elapsed_s,
        )


@torch.no_grad()  # not inference_mode: what ZeRO gathers outlives the call
def answer_batch(model: PreTrainedModel, requests: Sequence[TokenRequest], *, device: torch.device) -> BatchAnswer:
    """Score and continue sequences together."""
    start = time.perf_counter()
    keeper = keeping.make_keeper(requests, model.config.get_text_config().vocab_size, device)
    sequences = [_Sequence(request, keeper=keeper) for request in requests]
    lengths = [len(request.prompt_ids) for request in requests]
    padded = [[_PAD] * (max(lengths) - len(r.prompt_ids)) + list(r.prompt_ids) for r in requests]
    takes = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"use_cache": True}
    if "logits_to_keep" in takes and not any(request.score_prompt for request in requests):
        options["logits_to_keep"] = 1
    mask_BT = torch.tensor([[0] * (max(lengths) - n) + [1] * n for n in lengths], device=device)
    is_ragged = len(set(lengths)) > 1
    kept = "cache" if "cache" in takes else "past_key_values"  # its newer name, and its older one
    output = model(torch.tensor(padded, device=device), **options, **_padding(mask_BT, 0, is_ragged, takes))
    for sequence, length, logits_TV in zip(sequences, lengths, output.logits, strict=True):
        sequence.score(logits_TV[-length:])
    ids_B = _draw(sequences, output.logits[:, -1])
    prefill_end = time.perf_counter()
    num_steps = 0
    while any(sequence.reason is None for sequence in sequences):
        num_steps += 1
        mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(requests), 1)], dim=1)
        inputs = _padding(mask_BT, mask_BT.shape[1] - 1, is_ragged, takes)
        ids_B1 = torch.tensor(ids_B, device=device)[:, None]
        output = model(ids_B1, **{kept: output[kept]}, use_cache=True, **inputs)
        ids_B = _draw(sequences, output.logits[:, -1])
    end = time.perf_counter()
    results = [sequence.result((end - start) / len(requests)) for sequence in sequences]
    num_generated = [len(sequence.tokens) for sequence in sequences]
    trace = BatchTrace(
        prefill_s=prefill_end - start,
        decode_s=end - prefill_end,
        num_steps=num_steps,
        num_prompt_tokens=sum(lengths),
        num_generated_tokens=sum(num_generated),
        num_decode_tokens=sum(max(0, count - 1) for count in num_generated),
    )
    return BatchAnswer(results, trace)


def _padding(mask_BT: Tensor, first: int, is_ragged: bool, takes: Any) -> dict[str, Tensor]:
    """What a model must be told of padding: which tokens there are, and at which positions those from `first` on lie.

    Without padding it is told nothing, so that it may choose its fastest attention.
    """
    if not is_ragged:
        return {}
    positions_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)[:, first:]
    return {"attention_mask": mask_BT} | ({"position_ids": positions_BT} if "position_ids" in takes else {})


def _draw(sequences: Sequence[_Sequence], logits_BV: Tensor) -> list[int]:
    """Draw each sequence's next token; the ids to feed next."""
    logits_BV = logits_BV.float()
    logprobs_BV = logits_BV.log_softmax(-1)
    best = logprobs_BV.gather(1, greedy_B1 := logits_BV.argmax(-1, keepdim=True))[:, 0].tolist()
    greedy = zip(greedy_B1[:, 0].tolist(), best, strict=True)
    for sequence, token_and_logprob, logits_V, logprobs_V in zip(
        sequences, greedy, logits_BV, logprobs_BV, strict=True
    ):
        sequence.draw(logits_V, token_and_logprob, logprobs_V)
    return [sequence.tokens[-1] if sequence.tokens else _PAD for sequence in sequences]


def top_logprobs(logprobs_TV: Tensor, num_top: int) -> list[TopLogprobs]:
    """The `num_top` most probable tokens at each position."""
    values_TK, token_ids_TK = logprobs_TV.topk(min(num_top, logprobs_TV.shape[-1]))
    return [tuple(zip(t, v, strict=True)) for t, v in zip(token_ids_TK.tolist(), values_TK.tolist(), strict=True)]
