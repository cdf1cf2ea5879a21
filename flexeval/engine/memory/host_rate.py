"""How fast the CPU attends to KV in host memory, and copies to a GPU get on that read the same memory. No policy."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from statistics import fmean
from threading import Event
from typing import NamedTuple

import numpy as np
import torch

from flexeval.engine.codecs.kv_format import CodedFormat, KeysValues, KVLog, PlainFormat
from flexeval.engine.compute.contexts import DecodeBatch
from flexeval.engine.compute.host_attention import HostAttention
from flexeval.engine.compute.host_team import build
from flexeval.engine.compute.port import AttentionOptions
from flexeval.engine.compute.row import Row, RowMaker
from flexeval.engine.memory.page_lock import page_aligned, pin, unpin
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
COPY_BYTES, NUM_COPIED = 128 * 2**20, 8
"""Of each copy beside it, and how many places they read in turn, if memory allows: what lies in a cache takes nothing
of the memory's rate, and 104 GB/s were foretold of attention that came to 68 beside a link that read weights."""
BUDGET_S = 0.2
"""Of the timed calls; they are two at least. The link alone is timed for as long as the larger one."""


class HostRate(NamedTuple):
    """What the CPU does beside a GPU, and what that does to the link."""

    bytes_per_s: float
    """Keys and values that it attends to."""
    link_share: float
    """Of the bytes that otherwise cross the link to the GPU in the same time, those that still do, in (0, 1]."""


def host_attention_rate(form: PlainFormat | CodedFormat, num_query_heads: int, *, is_link_busy: bool) -> HostRate:
    """How fast the engine has the CPU attend beside a GPU.

    Args:
        form: Of the KV, as it rests.
        num_query_heads: To all KV heads together.
        is_link_busy: Whether copies to the GPU run all the while.
    """
    with ThreadPoolExecutor(1) as lane:
        give_spare_cores(lambda take: lane.submit(take).result())
        log_bytes = min(LOG_BYTES, free_host_bytes() // LOG_PART)
        work = lane.submit(attention_work, form, num_query_heads, num_spare_cores(), log_bytes).result()
        if not is_link_busy:
            return HostRate(work.num_bytes / lane.submit(mean_seconds, work, BUDGET_S).result(), 1.0)
        with _copies() as copied_bytes_per_s:
            alone = copied_bytes_per_s(lambda: time.sleep(BUDGET_S))
            attending = lane.submit(mean_seconds, work, BUDGET_S)
            beside = copied_bytes_per_s(attending.result)
        return HostRate(work.num_bytes / attending.result(), min(1.0, beside / alone))


class AttentionWork(NamedTuple):
    """Attention that was planned and has been run once."""

    run: Callable[[], None]
    num_bytes: int


def attention_work(
    form: PlainFormat | CodedFormat, num_query_heads: int, num_threads: int, log_bytes: int, *, borrows: bool = False
) -> AttentionWork:
    """Single tokens' attention over a log of so many bytes at most, by a team of so many threads."""
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
    attention = HostAttention(build(num_threads, borrows=borrows), num_threads)
    begin = partial(attention.begin, q_TNH, AttentionOptions(scale=key_size**-0.5), row, context)

    def run() -> None:
        begin().wait()

    run()
    return AttentionWork(run, num_tokens * form.token_bytes)


def mean_seconds(work: AttentionWork, budget_s: float) -> float:
    """Of one run: the mean of two at least, and of no more than the budget asks for."""
    seconds: list[float] = []
    while len(seconds) < 2 or sum(seconds) < budget_s:
        start = time.perf_counter()
        work.run()
        seconds.append(time.perf_counter() - start)
    return fmean(seconds)


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
def _copies() -> Iterator[Callable[[Callable[[], object]], float]]:
    """Copies from page-locked memory to the GPU without a gap between them, for as long as the block takes.

    Yields:
        What tells the bytes a second that they came to while something else ran.
    """
    num_places = max(1, min(NUM_COPIED, free_host_bytes() // (LOG_PART * COPY_BYTES)))
    room = page_aligned(num_places * COPY_BYTES)
    pin(room)
    places, gpu = room.view(num_places, COPY_BYTES), torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    num_copied, is_over = 0, Event()

    def copy() -> None:
        nonlocal num_copied
        with torch.cuda.stream(torch.cuda.Stream()):
            before = torch.cuda.Event()
            while not is_over.is_set():
                gpu.copy_(places[num_copied % num_places], non_blocking=True)
                before.synchronize()  # another one is in the queue
                before = torch.cuda.Event()
                before.record()
                num_copied += 1

    def bytes_per_s(run: Callable[[], object]) -> float:
        before, start = num_copied, time.perf_counter()
        run()
        return (num_copied - before) * COPY_BYTES / (time.perf_counter() - start)

    with ThreadPoolExecutor(1) as copier:
        copying = copier.submit(copy)
        try:
            yield bytes_per_s
        finally:
            is_over.set()
            copying.result()
            unpin(room)
