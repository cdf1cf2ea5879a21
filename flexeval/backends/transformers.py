"""transformers itself as a backend: one request at a time, no offloading, nothing shared. The oracle of the engine.

Under a lossy setting it runs on the weights that the setting's codec gives back, so that the engine can be held to it.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from flexeval.backends.backend import OnCompletions, Usage
from flexeval.backends.loading import OpenModel, open_model
from flexeval.config import Setting
from flexeval.engine.compute.readout import sample, top_logprobs
from flexeval.engine.memory.slab import SlabLayout
from flexeval.models import ModelSource
from flexeval.request import Completion, FinishReason, Request, TokenRequest, TokenResult, TopLogprobs


class TransformersBackend:
    """A model that is wholly on one device, driven the plainest way."""

    name = "transformers"

    def __init__(
        self, model: str | ModelSource, *, setting: str | Setting = "none", device: str = "auto", dtype: str = "auto"
    ):
        """Load the model. Raises `FlexevalError` where it cannot be used."""
        start = time.perf_counter()
        opened = open_model(model, setting=setting, device=device, dtype=dtype)
        self.text = opened.text
        self._device = opened.device
        self._model = load_whole(opened)
        self._model.to(opened.device)  # type: ignore[arg-type]
        self._load_s = time.perf_counter() - start
        self._num_prompt_tokens = self._num_generated_tokens = 0

    def generate(
        self, requests: Sequence[Request], *, on_completions: OnCompletions = lambda completions: None
    ) -> list[Completion]:
        """Answer the requests one after the other. Raises `RequestError` before anything is computed."""
        parts = [
            self.text.to_token_requests(request, where=f"request {index}") for index, request in enumerate(requests)
        ]
        completions = []
        for index, (request, token_requests) in enumerate(zip(requests, parts, strict=True)):
            results = [answer(self._model, token_request) for token_request in token_requests]
            completion = self.text.to_completion(request, token_requests[0].prompt_ids, results)
            self._num_prompt_tokens += sum(len(part.prompt_ids) for part in token_requests)
            self._num_generated_tokens += sum(len(result.token_ids) for result in results)
            completions.append(completion)
            on_completions([(index, completion)])
        return completions

    def usage(self) -> Usage:
        """What was used so far; memory is not measured."""
        return Usage(
            load_s=self._load_s,
            num_prompt_tokens=self._num_prompt_tokens,
            num_computed_prompt_tokens=self._num_prompt_tokens,
            num_generated_tokens=self._num_generated_tokens,
        )

    def close(self) -> None:
        """Forget the model."""
        del self._model


def load_whole(opened: OpenModel) -> PreTrainedModel:
    """The model in host memory, its matrices as the setting's codec gives them back."""
    anatomy, cpu = opened.anatomy, torch.device("cpu")
    state: dict[str, Tensor] = dict(opened.checkpoint.rest())
    for layer in range(anatomy.num_layers):
        tensors: Mapping[str, Tensor] = opened.checkpoint.layer(layer)
        if opened.codec is not None:
            layout = SlabLayout(anatomy.layer_specs(layer), opened.codec)
            workspace = torch.empty(layout.num_coded_values, dtype=layout.coded_dtype)
            tensors = layout.unpack(layout.pack(tensors, device=cpu), workspace)
        state.update((f"{anatomy.layers_name}.{layer}.{name}", tensor) for name, tensor in tensors.items())
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        copy.deepcopy(anatomy.config), dtype=anatomy.dtype, attn_implementation="eager"
    )
    model.load_state_dict(state)
    return model.eval()  # type: ignore[no-any-return]


@torch.inference_mode()
def answer(model: PreTrainedModel, request: TokenRequest) -> TokenResult:
    """Score and continue one sequence with transformers' own cache."""
    start = time.perf_counter()
    prompt_logprobs, prompt_tops = [0.0], [_NO_TOP]
    output = model(torch.tensor([request.prompt_ids], device=model.device), use_cache=True)
    logits_TV = output.logits[0].float()
    if request.score_prompt:
        logprobs_TV = logits_TV[:-1].log_softmax(-1)
        targets_T = torch.tensor(request.prompt_ids[1:], device=model.device)
        prompt_logprobs += logprobs_TV.gather(1, targets_T[:, None])[:, 0].tolist()
        prompt_tops += top_logprobs(logprobs_TV, request.num_top_logprobs)
    tokens: list[int] = []
    logprobs: list[float] = []
    tops: list[TopLogprobs] = []
    reason = FinishReason.LENGTH
    while len(tokens) < request.max_tokens:
        logits_V = logits_TV[-1]
        token = int(logits_V.argmax()) if request.temperature == 0 else sample(logits_V, request, len(tokens))
        logprobs_1V = logits_V[None].log_softmax(-1)
        tokens.append(token)
        logprobs.append(float(logprobs_1V[0, token]))
        tops += top_logprobs(logprobs_1V, request.num_top_logprobs)
        if token in request.eos_ids:
            reason = FinishReason.ENDOFTEXT
            break
        if request.is_stopped is not None and request.is_stopped(tokens):
            reason = FinishReason.STOP
            break
        if len(tokens) < request.max_tokens:
            output = model(
                torch.tensor([[token]], device=model.device), past_key_values=output.past_key_values, use_cache=True
            )
            logits_TV = output.logits[0].float()
    wants_top = request.num_top_logprobs > 0
    return TokenResult(
        token_ids=tuple(tokens),
        logprobs=tuple(logprobs),
        finish_reason=reason,
        top_logprobs=tuple(tops) if wants_top else (),
        prompt_logprobs=tuple(prompt_logprobs) if request.score_prompt else (),
        prompt_top_logprobs=tuple(prompt_tops) if request.score_prompt and wants_top else (),
        elapsed_s=time.perf_counter() - start,
    )


_NO_TOP: TopLogprobs = ()
