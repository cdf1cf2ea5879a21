"""How fast the engine's own kernels are where the CPU computes everything, each measured once a process. No policy."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import linear

from flexeval.engine.codecs.codec import Codec
from flexeval.engine.codecs.coded import CodedMatrix
from flexeval.engine.codecs.kv_format import KeysValues, KVCoding, KVLog, KVShape, make_format
from flexeval.engine.compute.contexts import DecodeBatch
from flexeval.engine.compute.few_tokens import multiply_few
from flexeval.engine.compute.host_decode import can_read
from flexeval.engine.compute.host_passes import has_passes, multiply_activated, rms_norm, rotate
from flexeval.engine.compute.host_products import has_products
from flexeval.engine.compute.host_prompts import PromptKernel, attends_to_prompts
from flexeval.engine.compute.host_team import lent
from flexeval.engine.compute.log_sums import log_sums
from flexeval.engine.compute.port import AttentionOptions
from flexeval.engine.compute.row import RowMaker
from flexeval.engine.memory.host_rate import attention_work, mean_seconds
from flexeval.planning.rows import AncestorSpan, FreshSpan, RowPlan
from flexeval.policy.hardware import Hardware
from flexeval.policy.rates.attention import HEAD_SIZE, LONG_SIZES, SHORT_SIZES, line
from flexeval.policy.rates.machine import ELEMENTWISE_SIZES, LOGITS_SIZES
from flexeval.policy.rates.products import ReadingRates, reading_rates
from flexeval.policy.rates.timing import best_seconds
from flexeval.policy.work import ModelShape

LOG_BYTES = 32 * 2**20
"""Of the log that single tokens attend to: more than a core's own caches."""
UNPACKED = 2**22
"""Numbers, as of a layer of a small model."""
BUDGET_S = 0.02
"""Of the timed calls of a kernel; they are two at least."""


def with_our_kernels(
    hardware: Hardware,
    shape: ModelShape,
    kv: tuple[KVShape, torch.dtype, KVCoding | None],
    codec: Codec | None,
) -> Hardware:
    """A machine whose CPU computes everything, with the rates of what the engine's own kernels do there.

    Args:
        hardware: The machine, as measured with torch.
        shape: The model; where it chooses keys, torch attends.
        kv: Its keys and values, the type of the arithmetic, and what the setting does to them.
        codec: How weights are packed, if they are.
    """
    kv_shape, dtype, coding = kv
    num_heads = shape.num_query_heads
    if shape.sparsity is None:
        if tokens_per_s := cpu_attention_rate(kv_shape, dtype, coding, num_heads):
            flops_per_s = 4 * shape.head_size * num_heads * tokens_per_s
            hardware = replace(hardware, single_attention_flops_per_s=flops_per_s)
        if prompts := cpu_prompt_rate(kv_shape, dtype, num_heads):
            hardware = replace(hardware, attention_flops_per_s=prompts.flops_per_s, attention_part_s=prompts.part_s)
    if elementwise_per_s := cpu_elementwise_rate(dtype):
        hardware = replace(hardware, elementwise_per_s=elementwise_per_s)
    if softmax_per_s := cpu_softmax_rate(dtype):
        hardware = replace(hardware, softmax_per_s=softmax_per_s)
    if reading := cpu_reading_rates(codec, dtype):
        hardware = replace(
            hardware,
            single_product_bytes_per_s=reading.single_bytes_per_s,
            few_product_bytes_per_s=reading.few_bytes_per_s,
            product_s=reading.product_s,
        )
    if codec is not None:
        hardware = replace(hardware, unpacked_per_s=cpu_unpack_rate(codec, dtype))
    return hardware


@cache
def cpu_attention_rate(
    shape: KVShape, dtype: torch.dtype, coding: KVCoding | None, num_query_heads: int
) -> float | None:
    """Tokens a second, as the engine attends to them where the CPU computes everything; measured once a process.

    None where it gathers them for torch: `policy/rates/` measures that.
    """
    form = make_format(shape, dtype, coding)
    if not can_read(form):
        return None
    work = attention_work(form, num_query_heads, torch.get_num_threads(), LOG_BYTES, borrows=True)
    return work.num_bytes / mean_seconds(work, BUDGET_S) / form.token_bytes


class PromptRate(NamedTuple):
    """What prompts take of a CPU's attention, as in `Hardware`."""

    flops_per_s: float
    part_s: float


@cache
def cpu_prompt_rate(shape: KVShape, dtype: torch.dtype, num_query_heads: int) -> PromptRate | None:
    """How fast the engine attends in prompts where the CPU computes everything; measured once a process.

    None where torch does it: `policy/rates/` measures that.
    """
    if not attends_to_prompts(shape, dtype, num_query_heads):
        return None
    team = lent(torch.get_num_threads())
    assert team is not None
    seconds = [
        _prompt_seconds(PromptKernel(team), shape, dtype, num_query_heads, *sizes)
        for sizes in (SHORT_SIZES, LONG_SIZES)
    ]
    pair_s, part_s = line(*seconds)
    return PromptRate(2 * (shape.key_size + shape.value_size) / pair_s, part_s)


@cache
def cpu_elementwise_rate(dtype: torch.dtype) -> float | None:
    """Numbers a second that our passes, and torch's sums, make of tokens as a layer has them; measured once a process.

    None where torch does it all: `policy/rates/` measures that.
    """
    if not has_passes():
        return None
    x_TD = torch.randn(ELEMENTWISE_SIZES["cpu"]).to(dtype)
    angles_1TH = torch.randn(1, len(x_TD), HEAD_SIZE["cpu"]).to(dtype)

    def run() -> object:
        normed_TD = rms_norm(x_TD, x_TD[0], 1e-6)
        heads_1NTH = normed_TD.unflatten(1, (-1, HEAD_SIZE["cpu"])).transpose(0, 1)[None]
        turned_1NTH = rotate(heads_1NTH, angles_1TH, angles_1TH)
        return x_TD + multiply_activated(normed_TD, turned_1NTH.transpose(1, 2).flatten(-2)[0], "silu")

    return 4 * x_TD.numel() / best_seconds(run, "cpu", budget_s=BUDGET_S)


@cache
def cpu_softmax_rate(dtype: torch.dtype) -> float | None:
    """Logits a second that are read where the CPU computes everything; measured once a process.

    None where torch does it: `policy/rates/` measures that.
    """
    if log_sums(torch.zeros(1, 1, dtype=dtype)) is None:
        return None
    logits_RV = torch.randn(*LOGITS_SIZES).to(dtype)
    return logits_RV.numel() / best_seconds(partial(log_sums, logits_RV), "cpu", budget_s=BUDGET_S)


def cpu_reading_rates(codec: Codec | None, dtype: torch.dtype) -> ReadingRates | None:
    """How few tokens are multiplied where the CPU computes everything and our code does it; measured once a process.

    Of matrices in codes, bytes are those of their numbers. None where torch does it all: `policy/rates/` measures that.
    """
    if dtype != torch.bfloat16 or not has_products():
        return None
    coded = codec if codec is not None and codec.few_tokens(torch.device("cpu"), dtype) else None
    key = coded.name if coded is not None else None
    if key not in _reading_rates:
        multiply = partial(_multiply_coded, coded, {}) if coded is not None else _multiply
        _reading_rates[key] = reading_rates("cpu", dtype, multiply, budget_s=BUDGET_S)
    return _reading_rates[key]


_reading_rates: dict[str | None, ReadingRates] = {}  # by the codec's name; None for matrices as they are


def _multiply(x_TI: torch.Tensor, matrix_OI: torch.Tensor) -> torch.Tensor:
    out_TO = multiply_few(x_TI, matrix_OI, None)
    return linear(x_TI, matrix_OI) if out_TO is None else out_TO


def _multiply_coded(
    codec: Codec, made: dict[int, CodedMatrix], x_TI: torch.Tensor, matrix_OI: torch.Tensor
) -> torch.Tensor:
    """By a coded matrix of that size, made in its place when it first comes."""
    place = matrix_OI.data_ptr()
    if place not in made:
        made[place] = codec.matrix(_random_codes(codec, matrix_OI.numel()), 0, (len(matrix_OI), matrix_OI.shape[1]))
    return made[place].multiply(x_TI, None)


def cpu_unpack_rate(codec: Codec, dtype: torch.dtype) -> float:
    """Numbers a second that are unpacked where the CPU computes everything; measured once a process."""
    key = codec.name, dtype
    if key not in _unpacked_per_s:
        coded = _random_codes(codec, UNPACKED)
        out = torch.empty(UNPACKED, dtype=dtype)
        seconds = best_seconds(partial(codec.decode, coded, out), "cpu", budget_s=BUDGET_S)
        _unpacked_per_s[key] = UNPACKED / seconds
    return _unpacked_per_s[key]


def _random_codes(codec: Codec, num_values: int) -> torch.Tensor:
    """Bytes whose scales are numbers."""
    return torch.randint(60, (codec.num_bytes(num_values),), dtype=torch.uint8)


_unpacked_per_s: dict[tuple[str, torch.dtype], float] = {}  # by a codec's name, which says what its bytes are


def _prompt_seconds(
    kernel: PromptKernel, shape: KVShape, dtype: torch.dtype, num_query_heads: int, num_prompts: int, length: int
) -> float:
    """Of prompts of such a length, for each token and query head."""
    num_tokens = num_prompts * length
    spans = [FreshSpan(node=node, start=node * length, length=length) for node in range(num_prompts)]
    positions = np.tile(np.arange(length), num_prompts)
    plan = RowPlan(token_ids=np.zeros(num_tokens, dtype=np.int64), positions=positions, fresh=tuple(spans))
    row = RowMaker(torch.device("cpu")).make(0, plan)
    sizes = ((num_query_heads, shape.key_size), (shape.num_heads, shape.key_size), (shape.num_heads, shape.value_size))
    q_TNH, k_TKH, v_TKW = (torch.randn(num_tokens, *size).to(dtype) for size in sizes)
    run = partial(kernel, q_TNH, k_TKH, v_TKW, AttentionOptions(scale=shape.key_size**-0.5), row, _Nowhere())
    return best_seconds(run, "cpu", budget_s=BUDGET_S) / (num_tokens * num_query_heads)


class _Nowhere:
    def own_log(self, batch: DecodeBatch) -> KVLog:
        raise AssertionError("no row decodes")

    def ancestor(self, span: AncestorSpan) -> KeysValues:
        raise AssertionError("the row has none")
