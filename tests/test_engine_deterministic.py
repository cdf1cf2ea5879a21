"""What an answer owes to the others of its batch: roundings, within stated bounds; and nothing where they are apart."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import tiny_config

from flexeval.engine.codecs.codec import IntegerCodec
from flexeval.engine.codecs.kv_format import KVCoding
from flexeval.engine.compute.anatomy import Anatomy
from flexeval.engine.executor import Executor
from flexeval.engine.memory.disk import DiskTier
from flexeval.engine.random_checkpoint import RandomCheckpoint
from flexeval.policy.policy import APART_ROW_TOKENS, Policy, Split, apart
from flexeval.request import TokenRequest, TokenResult

CPU = torch.device("cpu")
HEADER = tuple(range(20, 84))
LARGE = Policy(row_tokens=300, sweep_tokens=700, group_sequences=5, num_groups=2)
SMALL = Policy(row_tokens=40, sweep_tokens=80, group_sequences=1, num_groups=1, weights=Split(cpu=0.5, disk=0.5))
BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 0.1}
"""The most by which a log-probability may differ from the one alone; those of these models are about -4."""


def requests() -> list[TokenRequest]:
    """Scored, drawn, both, sampled; with and without a shared header; one prompt twice, one longer than a row."""
    chance = random.Random(0)
    found = []
    for index in range(14):
        tail = tuple(chance.randrange(200) for _ in range(chance.choice((3, 17, 40, 90))))
        ids = (*HEADER, *tail) if index % 3 else tail
        max_tokens, scored = ((0, True), (6, False), (4, True), (1, False))[index % 4]
        found.append(
            TokenRequest(
                prompt_ids=ids,
                max_tokens=max_tokens,
                score_prompt=scored,
                temperature=0.8 if index == 5 else 0.0,
                seed=index,
                num_top_logprobs=2 if index == 9 else 0,
                keep_top=3 if index % 2 else 0,
            )
        )
    long = tuple(chance.randrange(200) for _ in range(2 * APART_ROW_TOKENS + 100))
    again = TokenRequest(prompt_ids=found[0].prompt_ids, max_tokens=3)
    return [*found, again, TokenRequest(prompt_ids=long, max_tokens=2, score_prompt=True)]


@contextmanager
def executor(
    policy: Policy,
    dtype: torch.dtype,
    tmp_path: Path,
    *,
    is_apart: bool,
    setting: str = "none",
    device: torch.device = CPU,
) -> Iterator[Executor]:
    anatomy = Anatomy(tiny_config("llama", max_position_embeddings=4096), dtype)
    with Executor(
        anatomy,
        RandomCheckpoint(anatomy),
        apart(policy) if is_apart else policy,
        codec=IntegerCodec(4, 64) if setting == "w4" else None,
        kv_coding=KVCoding(bits=8, group_size=64) if setting == "kv8" else None,
        device=device,
        disk_tier=DiskTier(tmp_path),
        is_apart=is_apart,
    ) as made:
        yield made


def numbers(result: TokenResult) -> list[float]:
    return [*result.prompt_logprobs, *result.logprobs]


def check_apart(large: Executor, small: Executor, asked: Sequence[TokenRequest]) -> None:
    """In any company, in any order, under any policy, an answer is the same to the bit."""
    together = large.execute(asked)
    backwards = small.execute(asked[::-1])[::-1]
    for index, request in enumerate(asked):
        (alone,) = (small if index % 2 else large).execute([request])
        for other in (together[index], backwards[index]):
            assert other.token_ids == alone.token_ids, index
            assert numbers(other) == numbers(alone), index
            assert other.top_logprobs == alone.top_logprobs
            if alone.kept is not None:
                assert other.kept is not None
                np.testing.assert_array_equal(other.kept.token_ids_NC, alone.kept.token_ids_NC)
                np.testing.assert_array_equal(other.kept.logprobs_NC, alone.kept.logprobs_NC)


@pytest.mark.parametrize("setting", ["none", pytest.param("kv8", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)])
def test_apart_an_answer_is_the_same_to_the_bit_whoever_else_asks(
    dtype: torch.dtype, setting: str, tmp_path: Path
) -> None:
    with (
        executor(LARGE, dtype, tmp_path, is_apart=True, setting=setting) as large,
        executor(SMALL, dtype, tmp_path, is_apart=True, setting=setting) as small,
    ):
        check_apart(large, small, requests())


@pytest.mark.gpu
@pytest.mark.parametrize("setting", ["none", "kv8", "w4"])
def test_apart_on_a_gpu(setting: str, tmp_path: Path) -> None:
    device, dtype = torch.device("cuda"), torch.bfloat16
    on_gpu = replace(LARGE, weights=Split(gpu=1), kv=Split(gpu=1), hidden=Split(gpu=1))
    mixed = replace(SMALL, weights=Split(gpu=0.5, cpu=0.5))
    with (
        executor(on_gpu, dtype, tmp_path, is_apart=True, setting=setting, device=device) as large,
        executor(mixed, dtype, tmp_path, is_apart=True, setting=setting, device=device) as small,
    ):
        check_apart(large, small, requests())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_together_answers_differ_by_roundings_alone(dtype: torch.dtype, tmp_path: Path) -> None:
    largest = 0.0
    with executor(LARGE, dtype, tmp_path, is_apart=False) as made:
        asked = requests()
        for request, other in zip(asked, made.execute(asked), strict=True):
            (alone,) = made.execute([request])
            if dtype == torch.float32:
                assert alone.token_ids == other.token_ids
            num = len(request.prompt_ids) if request.score_prompt else min(1, request.max_tokens)  # of the same tokens
            pairs = zip(numbers(alone)[:num], numbers(other)[:num], strict=True)
            largest = max(largest, *(abs(a - b) for a, b in pairs))
    assert largest <= BOUNDS[dtype], largest
    if dtype == torch.bfloat16:
        assert largest > 0, "company shows, or there would be nothing to pay for"
