"""Requests through a transformers model, a batch at a time: what every peer does. Knows no offloading."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from flexeval.backends.backend import OnCompletions, Usage
from flexeval.backends.padded_batch import BatchAnswer, BatchTrace, answer_batch
from flexeval.backends.text import TextHalf
from flexeval.errors import CapacityError
from flexeval.request import Completion, Request, TokenRequest, TokenResult


class Generator:
    """A loaded model that answers requests, some at a time.

    Args:
        model: On its device, or dispatched over several; inputs go to `device`.
        text: Its tokenizer.
        device: Where it takes its input.
        batch_size: Sequences of a batch at most. Where memory runs out, it is halved for good.
    """

    def __init__(self, model: PreTrainedModel, text: TextHalf, *, device: torch.device, batch_size: int):
        self.batch_size = batch_size
        self.batches: list[BatchTrace] = []
        """What was computed so far."""
        self._model = model
        self._text = text
        self._device = device

    def generate(self, requests: Sequence[Request], *, on_completions: OnCompletions) -> list[Completion]:
        """Answer the requests, those of like length together.

        Raises:
            RequestError: A request cannot be answered as asked; nothing was computed.
            CapacityError: Not even one sequence fits.
        """
        parts = [
            self._text.to_token_requests(request, where=f"request {index}") for index, request in enumerate(requests)
        ]
        waiting = [(index, part) for index, token_requests in enumerate(parts) for part in token_requests]
        waiting.sort(key=lambda entry: len(entry[1].prompt_ids))
        results: list[list[TokenResult]] = [[] for _ in requests]
        completions: dict[int, Completion] = {}
        while waiting:
            chosen = waiting[: self.batch_size]
            answered = self._answer([request for _, request in chosen])
            if answered is None:
                continue
            del waiting[: len(chosen)]
            self.batches.append(answered.trace)
            for (index, _), result in zip(chosen, answered.results, strict=True):
                results[index].append(result)
            finished = [
                (index, self._text.to_completion(requests[index], parts[index][0].prompt_ids, results[index]))
                for index in dict.fromkeys(index for index, _ in chosen)
                if len(results[index]) == len(parts[index])
            ]
            completions.update(finished)
            on_completions(finished)
        return [completions[index] for index in range(len(requests))]

    def usage(self, load_s: float, peak_bytes: dict[str, int] | None = None) -> Usage:
        """What was used so far. Every token asked is computed."""
        num_prompt_tokens = sum(batch.num_prompt_tokens for batch in self.batches)
        return Usage(
            load_s=load_s,
            num_prompt_tokens=num_prompt_tokens,
            num_computed_prompt_tokens=num_prompt_tokens,
            num_generated_tokens=sum(batch.num_generated_tokens for batch in self.batches),
            peak_bytes=peak_bytes or {},
            phases={
                "prefill": sum(batch.prefill_s for batch in self.batches),
                "decode": sum(batch.decode_s for batch in self.batches),
            },
        )

    def _answer(self, requests: Sequence[TokenRequest]) -> BatchAnswer | None:
        """The answers; None where memory ran out and the batch became smaller."""
        try:
            return answer_batch(self._model, requests, device=self._device)
        except torch.OutOfMemoryError as error:
            if self.batch_size == 1:
                raise CapacityError(
                    "one sequence does not fit beside the weights", mend="Raise --gpu-memory"
                ) from error
            self.batch_size = max(1, min(self.batch_size, len(requests)) // 2)
        torch.cuda.empty_cache()  # out of the `except`, whose traceback holds the tensors
        return None
