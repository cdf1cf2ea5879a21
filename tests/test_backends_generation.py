"""Padded batches answer what each request alone would; a batch that is too large becomes smaller."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from policy_cases import OPT_30B
from tiny_directory import write_tiny_model
from tiny_models import FAMILIES, assert_equal_results, ragged_requests, tiny_case, tiny_config, tiny_model
from transformers import AutoModelForCausalLM

from flexeval.backends import generation
from flexeval.backends.batching import GPU_USABLE_SHARE, batch_bytes, largest_batch, streamed_bytes
from flexeval.backends.padded_batch import BatchAnswer, answer_batch, top_logprobs
from flexeval.backends.transformers import TransformersBackend, _fill_buffers
from flexeval.errors import CapacityError
from flexeval.request import Request, TokenRequest

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "gemma3_text", "deepseek_v3"])
def test_ragged_sequences_answer_together_as_alone(family: str) -> None:
    answered = answer_batch(tiny_model(family), ragged_requests(), device=CPU)
    assert_equal_results(answered.results, tiny_case(family).expected)
    trace = answered.trace
    assert trace.num_steps == 8, "as many as the longest needs after its first token"
    assert trace.prefill_s > 0 and trace.decode_s > 0
    assert trace.num_prompt_tokens == sum(len(request.prompt_ids) for request in ragged_requests())
    assert trace.num_generated_tokens == sum(len(result.token_ids) for result in answered.results)
    assert trace.num_decode_tokens == trace.num_generated_tokens - 6, "six of nine generate"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


REQUESTS = [
    Request(prompt="Question: Which of these?", max_tokens=5),
    Request(prompt="A. one B. two", max_tokens=3, echo=True),
    Request(prompt="A. one B. two", max_tokens=3, echo=True),
    Request(prompt="The answer is 12.", max_tokens=4, temperature=1.0, num_completions=3),
    Request(prompt="x", max_tokens=0, echo=True),
]


def backend(model: Path, batch_size: int) -> TransformersBackend:
    return TransformersBackend(str(model), device="cpu", dtype="float32", batch_size=batch_size)


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_the_size_of_a_batch_changes_no_answer(model: Path, batch_size: int) -> None:
    alone, together = backend(model, 1), backend(model, batch_size)
    seen: list[int] = []
    answers = together.generate(REQUESTS, on_completions=lambda done: seen.extend(index for index, _ in done))
    assert sorted(seen) == list(range(5)), "each told once"
    for got, want in zip(answers, alone.generate(REQUESTS), strict=True):
        assert (got.text, got.token_ids) == (want.text, want.token_ids)
        assert [one.text for one in got.alternatives] == [one.text for one in want.alternatives]
        assert got.logprobs == pytest.approx(want.logprobs, abs=1e-4)
    assert together.usage().num_prompt_tokens == alone.usage().num_prompt_tokens
    assert together.usage().num_generated_tokens == sum(
        one.num_generated_tokens for answer in answers for one in (answer, *answer.alternatives)
    )


def test_a_batch_that_runs_out_of_memory_is_halved_for_good(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = generation.answer_batch

    def limited(model: object, requests: Sequence[TokenRequest], *, device: torch.device) -> BatchAnswer:
        sizes.append(len(requests))
        if len(requests) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, requests, device=device)

    monkeypatch.setattr(generation, "answer_batch", limited)
    tight = backend(model, 16)
    expected = backend(model, 1)
    assert [a.token_ids for a in tight.generate(REQUESTS[:3])] == [a.token_ids for a in expected.generate(REQUESTS[:3])]
    assert tight.generator.batch_size == 1, "three ran out of memory: half of three"
    assert sizes[:2] == [3, 1]


@pytest.mark.parametrize("family", FAMILIES)
def test_buffers_that_no_checkpoint_holds_are_transformers_own(family: str) -> None:
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(copy.deepcopy(tiny_config(family)))
    _fill_buffers(built)
    expected = dict(tiny_model(family).named_buffers())
    for name, buffer in built.named_buffers():
        if name not in built.state_dict():
            assert torch.equal(buffer, expected[name]), name


def test_not_even_one_fits(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> BatchAnswer:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(generation, "answer_batch", full)
    with pytest.raises(CapacityError, match="--gpu-memory"):
        backend(model, 4).generate(REQUESTS)


def token_requests(count: int, num_prompt: int = 512, num_generated: int = 32) -> list[TokenRequest]:
    return [TokenRequest(prompt_ids=tuple(range(num_prompt)), max_tokens=num_generated)] * count


def test_the_largest_batch_is_what_was_found_by_hand() -> None:
    """OPT-30B, prompt 512, generate 32, in 24 GiB: 20 sequences ran under ZeRO-Inference and 32 did not."""
    room = int(GPU_USABLE_SHARE * 24 * 2**30) - streamed_bytes(OPT_30B)
    assert largest_batch(OPT_30B, token_requests(64), room) == 20
    assert largest_batch(OPT_30B, token_requests(7), room) == 7, "no larger than there are requests"
    assert largest_batch(OPT_30B, token_requests(64), 3 * batch_bytes(OPT_30B, token_requests(1), 1)) == 3


def test_scoring_prompts_takes_room_for_their_logits() -> None:
    scored = [TokenRequest(prompt_ids=tuple(range(512)), max_tokens=0, score_prompt=True)]
    plain = token_requests(1, num_generated=0)
    logits = 512 * OPT_30B.vocab_size * (2 + 8)
    assert batch_bytes(OPT_30B, scored, 2) > batch_bytes(OPT_30B, plain, 2)
    assert batch_bytes(OPT_30B, scored, 2) >= 2 * logits
    with pytest.raises(CapacityError, match="one sequence"):
        largest_batch(OPT_30B, scored, logits)


def test_top_logprobs_are_no_more_than_there_are() -> None:
    logprobs_TV = torch.tensor([[0.1, 0.7, 0.2]]).log()
    assert [token for token, _ in top_logprobs(logprobs_TV, 9)[0]] == [1, 2, 0]
    assert top_logprobs(logprobs_TV, 0) == [()]
