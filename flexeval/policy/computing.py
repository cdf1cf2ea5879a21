"""How long the compute device is busy in a sweep, by what its layers multiply, attend to, make and read.

Knows sizes and rates; neither where data rest nor what moves meanwhile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flexeval.policy.experts import fetched_part, met_part
from flexeval.policy.policy import Tier
from flexeval.policy.profile import FEW_TOKENS
from flexeval.policy.sparse import SHEET_BYTES
from flexeval.policy.sweeps import Sweep
from flexeval.policy.work import ModelShape, Workload

if TYPE_CHECKING:  # hardware.py measures with torch; predicting must not need it
    from flexeval.policy.hardware import Hardware

KERNELS_PER_CALL = 24
"""Kernels a decoder layer launches: 7 matrix products, 2 norms, rotary, attention, activation, residuals, KV append."""
OPERATIONS_PER_STEP, OPERATIONS_PER_RECORDED_STEP = 200, 100
"""Small operations that take as long as Python for a row that decodes at a layer, beside a GPU's lanes: about 1 ms, and
0.5 where what comes before and after its attention is recorded. Where weights and KV stay on the GPU, a step is one
recording instead. On a CPU any layer call takes as long as the first."""
OPERATIONS_TO_RECORD = 140
"""The same for a layer that goes into that recording, and for the steps before it (NVIDIA H200, two dense models: 60 to
80, and 4 steps of up to 20 more than a recorded one)."""
OPERATIONS_PER_SWEEP = 100
"""The same from one sweep to the next: about 1 ms."""
RECORDED_KERNEL_S = 1.5e-6
"""Seconds from one kernel of a recording to the next, beside what it computes (NVIDIA H200: OPT-6.7B's steps)."""
KEEPING_RANKINGS, KEEPING_PASSES = 2, 3
"""Searches for the most probable, and operations on all of the vocabulary, with which a distribution is kept."""
PACKED_RATE, PACKED_EXPERTS_RATE = 0.55, 0.33
"""Part of the device's memory bandwidth at which products of few tokens read matrices as they rest, and experts'."""

OTHERS_POWER = 0.25
"""Power that a GPU takes for what is no product, of what products take (NVIDIA H200, five runs: 0 to 0.5)."""


def compute_seconds(shape: ModelShape, workload: Workload, hardware: Hardware, sweep: Sweep) -> float:
    """Seconds the compute device is busy in one sweep.

    A layer call of t tokens takes as long as products of few tokens, 2 P / peak for each further one, launches
    (see `product_seconds`), what any product takes on a CPU, its attention, and what its other operations make; where
    keys are chosen, every score is written out. A packed slab is unpacked once a layer, or read as it rests by every
    call of few tokens. Of experts, only those that tokens chose are read, and unpacked where the sweep is short.

    A GPU at its limit of power takes as long as the energy of all that comes in: all else takes a part of what products
    do, and lets them be faster.
    """
    call_tokens = sweep.num_tokens / sweep.num_calls
    is_on_cpu = hardware.home is Tier.CPU
    num_results = sweep.num_tokens * shape.results_per_token
    if is_on_cpu and shape.gathers_prompts:  # and attention's output is twice put in its place, ...
        num_results += sweep.num_tokens * (3 * shape.num_query_heads + 2 * shape.num_kv_heads) * shape.head_size
        # ... and that over further parts merged into it
        num_results += 2 * (sweep.num_parts - sweep.num_tokens) * shape.num_query_heads * shape.head_size
    # On a CPU the attention's own rate has the reading; copies are written and read again.
    num_read = 2 * shape.decode_copies if is_on_cpu else 1
    device_bytes = num_read * sweep.num_kv_read * shape.kv_bytes_per_token
    if shape.is_kv_coded and not sweep.num_kv_read:  # prompts are coded, and attended to as they come back
        device_bytes += 2 * sweep.num_tokens * (shape.kv_bytes_per_token + shape.kv_compute_bytes_per_token)
    if shape.sparsity is not None:
        device_bytes += SHEET_BYTES * shape.num_query_heads * sweep.num_pairs
    unpack_s = 0.0
    is_unpacked = _is_unpacked(shape, sweep)
    if shape.is_packed and not is_unpacked and not is_on_cpu:  # a CPU's rate of few tokens has the unpacking
        packed_rate = PACKED_EXPERTS_RATE if shape.num_experts > 1 else PACKED_RATE
        device_bytes += sweep.num_calls * shape.layer_bytes * met_part(shape, call_tokens) / packed_rate
        products_s = product_seconds(hardware, call_tokens, shape.layer_params, num_bytes=0)
    else:
        matrix_bytes = shape.layer_compute_bytes * met_part(shape, call_tokens)
        products_s = product_seconds(hardware, call_tokens, shape.layer_params, num_bytes=matrix_bytes)
        unpacked_share = sweep.weights_share * fetched_part(shape, sweep.num_tokens) if is_unpacked else 0.0
        if hardware.unpacked_per_s:
            unpack_s = unpacked_share * shape.layer_compute_bytes / shape.dtype_bytes / hardware.unpacked_per_s
        else:
            device_bytes += unpacked_share * (shape.layer_bytes + shape.layer_compute_bytes)
    launches_s = (OPERATIONS_PER_STEP if is_on_cpu else KERNELS_PER_CALL) * hardware.launch_s
    if not is_on_cpu and sweep.num_kv_read and is_recorded(shape, sweep):
        launches_s = min(launches_s, KERNELS_PER_CALL * RECORDED_KERNEL_S)
    layer_s = (
        sweep.num_calls * (products_s + shape.num_matrices * hardware.product_s + launches_s)
        + attention_seconds(shape, hardware, sweep)
        + unpack_s
        + num_results / hardware.elementwise_per_s
        + device_bytes / hardware.memory_bytes_per_s
    )
    sweep_s = shape.num_layers * layer_s + _head_seconds(shape, workload, hardware, sweep)
    sweep_s += OPERATIONS_PER_SWEEP * hardware.launch_s
    num_operations = 2 * shape.num_layers * shape.layer_params * sweep.num_calls * max(0, call_tokens - FEW_TOKENS)
    others_s = sweep_s - num_operations / hardware.cold_flops_per_s
    return max(sweep_s, num_operations / hardware.flops_per_s + OTHERS_POWER * others_s)


def is_recorded(shape: ModelShape, sweep: Sweep) -> bool:
    """Whether what a layer launches for a row that decodes is recorded, beside a GPU's lanes or as a part of one step.

    Not where its matrices are unpacked over others', nor where requests are computed apart.
    """
    return shape.is_recordable and not _is_unpacked(shape, sweep)


def _is_unpacked(shape: ModelShape, sweep: Sweep) -> bool:
    """Whether calls have more tokens than are multiplied by packed matrices as they rest."""
    return shape.is_packed and sweep.num_tokens > shape.few_tokens * sweep.num_calls


def product_seconds(hardware: Hardware, num_tokens: float, num_params: float, *, num_bytes: float) -> float:
    """Seconds of the products of a call with matrices of so many numbers, of which it reads so many bytes.

    Measured with one token and with few, and between them on a line: on a CPU kernels differ, on a GPU reading rules.
    Further tokens are multiplied at the peak rate, a GPU's below its limit of power. That is a roofline (Williams et
    al., 2009) summed rather than maximized: peak * t / (t + t_half).
    """
    single_s = num_bytes / hardware.single_product_bytes_per_s
    few_s = num_bytes / hardware.few_product_bytes_per_s
    if num_tokens <= FEW_TOKENS:
        return single_s + (few_s - single_s) * max(0.0, num_tokens - 1) / (FEW_TOKENS - 1)
    return few_s + 2 * num_params * (num_tokens - FEW_TOKENS) / hardware.cold_flops_per_s


def attention_seconds(shape: ModelShape, hardware: Hardware, sweep: Sweep) -> float:
    """Seconds of attention at one layer: 4 H D operations a pair (FlexGen, appendix A.3).

    On a CPU a token also takes a while with each part of its context, and a key that is read for one token takes
    longer than each further token with it.
    """
    num_heads = shape.num_query_heads
    num_hidden = sweep.num_hidden_pairs if hardware.home is Tier.CPU else 0  # as the rates are measured
    num_shared = max(0.0, sweep.num_pairs - num_hidden - sweep.num_kv_read)
    pairs_s = sweep.num_kv_read / hardware.single_attention_flops_per_s + num_shared / hardware.attention_flops_per_s
    return num_heads * (4 * shape.head_size * pairs_s + sweep.num_parts * hardware.attention_part_s)


def _head_seconds(shape: ModelShape, workload: Workload, hardware: Hardware, sweep: Sweep) -> float:
    """Seconds of the head where logits are wanted, and of what is read off them."""
    num_params, call_rows = shape.vocab_size * shape.hidden_size, sweep.num_logits_rows / sweep.num_calls
    head_s = product_seconds(hardware, call_rows, num_params, num_bytes=num_params * shape.dtype_bytes)
    head_s += hardware.product_s
    num_rankings = workload.has_top + KEEPING_RANKINGS * workload.is_kept
    logit_s = 1 / hardware.softmax_per_s + num_rankings / hardware.ranking_per_s
    logit_s += KEEPING_PASSES * workload.is_kept / hardware.elementwise_per_s
    return sweep.num_calls * head_s + sweep.num_logits_rows * shape.vocab_size * logit_s
