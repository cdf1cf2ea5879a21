"""How fast the CPU attends to KV in host memory, also while copies to a GPU read the same memory. Knows no policy."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from statistics import fmean
from threading import Event

import numpy as np
import torch

from flexeval.engine.codecs.kv_format import (
    CodedFormat,
    KeysValues,
    KVCoding,
    KVLog,
    KVShape,
    PlainFormat,
    make_format,
)
from flexeval.engine.compute.contexts import DecodeBatch
from flexeval.engine.compute.host_attention import HostAttention
from flexeval.engine.compute.host_kernel import build, can_read
from flexeval.engine.compute.port import AttentionOptions
from flexeval.engine.compute.row import Row, RowMaker
from flexeval.engine.memory.tier import page_aligned
from flexeval.planning.rows import AncestorSpan, DecodeSpan, RowPlan
from flexeval.policy.memory import free_host_bytes
from flexeval.team import give_spare_cores, num_spare_cores

CONTEXT_TOKENS = 512
"""Tokens that each query attends to."""
LOG_BYTES, LOG_PART = 2 * 2**30, 8
"""About, of the log that is attended to, and which part of free memory it may be at most: more than caches hold. With
300 MB of cache, one of 512 MiB was attended to at 68 GiB/s, and a run's logs, 30 GiB in turn, at 45."""
PRODUCTS_PER_THREAD = 2**29
"""Multiplications of a timed call at most: with few threads, or many queries to a key, memory is not what counts."""
SMALL_LOG_BYTES = 32 * 2**20
"""The same where the CPU computes everything: more than its cores' own caches."""
COPY_BYTES = 128 * 2**20
"""Of each copy beside it."""
BUDGET_S, SMALL_BUDGET_S = 0.2, 0.02
"""Of the timed calls; they are two at least."""


def host_attention_rate(form: PlainFormat | CodedFormat, num_query_heads: int, *, is_link_busy: bool) -> float:
    """Bytes of keys and values a second, as the engine has the CPU attend beside a GPU.

    Args:
        form: Of the KV, as it rests.
        num_query_heads: To all KV heads together.
        is_link_busy: Whether copies to the GPU run all the while.
    """
    with ThreadPoolExecutor(1) as lane:
        give_spare_cores(lambda take: lane.submit(take).result())
        with _copies(is_link_busy):
            log_bytes = min(LOG_BYTES, free_host_bytes() // LOG_PART)
            return lane.submit(_rate, form, num_query_heads, num_spare_cores(), log_bytes, BUDGET_S).result()


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
    return _rate(form, num_query_heads, torch.get_num_threads(), SMALL_LOG_BYTES, SMALL_BUDGET_S) / form.token_bytes


def _rate(
    form: PlainFormat | CodedFormat, num_query_heads: int, num_threads: int, log_bytes: int, budget_s: float
) -> float:
    num_heads, key_size, value_size = form.shape
    num_products = CONTEXT_TOKENS * num_query_heads * (key_size + value_size)
    most = min(log_bytes // (CONTEXT_TOKENS * form.token_bytes), PRODUCTS_PER_THREAD * num_threads // num_products)
    row, num_tokens = _row(max(1, most))
    numbers_CKX = torch.randn(CONTEXT_TOKENS, num_heads, key_size + value_size).to(form.dtype)
    tokens_CB = torch.empty(CONTEXT_TOKENS, form.token_bytes, dtype=torch.uint8)
    form.write(numbers_CKX[..., :key_size], numbers_CKX[..., key_size:], tokens_CB)
    log_CB = page_aligned(num_tokens * form.token_bytes).view(-1, *tokens_CB.shape)
    context = _OneLog(KVLog(form, log_CB.copy_(tokens_CB).flatten(0, 1)))
    q_TNH = torch.randn(row.plan.num_tokens, num_query_heads, key_size).to(form.dtype)
    options = AttentionOptions(scale=key_size**-0.5)
    attend = HostAttention(build(num_threads), num_threads)
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds[1:]) < budget_s:  # the first plans and warms up
        start = time.perf_counter()
        attend(q_TNH, options, row, context)
        seconds.append(time.perf_counter() - start)
    return num_tokens * form.token_bytes / fmean(seconds[1:])


class _OneLog:
    def __init__(self, log: KVLog):
        self._log = log

    def own_log(self, batch: DecodeBatch) -> KVLog:
        return self._log

    def ancestor(self, span: AncestorSpan) -> KeysValues:
        raise AssertionError("the row has none")


def _row(num_sequences: int) -> tuple[Row, int]:
    """A step of sequences that lie in one log one after the other, and the tokens they have together."""
    starts = range(0, num_sequences * CONTEXT_TOKENS, CONTEXT_TOKENS)
    span = DecodeSpan(
        group=0,
        start=0,
        log_length=num_sequences * (CONTEXT_TOKENS - 1),
        own_tokens=[np.arange(start, start + CONTEXT_TOKENS) for start in starts],
        first_own_positions=[0] * num_sequences,
        version=0,
    )
    positions = np.full(num_sequences, CONTEXT_TOKENS - 1)
    plan = RowPlan(token_ids=np.zeros(num_sequences, dtype=np.int64), positions=positions, decode=(span,))
    return RowMaker(torch.device("cpu")).make(0, plan), num_sequences * CONTEXT_TOKENS


@contextmanager
def _copies(are_made: bool) -> Iterator[None]:
    """Copies from page-locked memory to the GPU without a gap between them, for as long as the block takes."""
    if not are_made:
        yield
        return
    host = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    gpu = torch.empty_like(host, device="cuda")
    is_over = Event()

    def copy() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            before = torch.cuda.Event()
            while not is_over.is_set():
                gpu.copy_(host, non_blocking=True)
                before.synchronize()  # another one is in the queue
                before = torch.cuda.Event()
                before.record()

    with ThreadPoolExecutor(1) as copier:
        copying = copier.submit(copy)
        try:
            yield
        finally:
            is_over.set()
        copying.result()
