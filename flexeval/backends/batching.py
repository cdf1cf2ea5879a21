"""How many sequences a peer can compute together. Knows sizes; not who computes them.

Peers keep a batch's whole KV cache, and one layer's temporaries, on the device that computes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flexeval.config import Limits
from flexeval.errors import CapacityError
from flexeval.policy.room import ATTENTION_COPIES, INTERMEDIATE_COPIES
from flexeval.policy.work import ModelShape
from flexeval.request import TokenRequest

GPU_USABLE_SHARE = 15 / 16
"""Caches that grow leave holes, and CUDA's libraries have workspaces."""
_CACHE_LAYERS = 1
"""A layer's cache grows by copying: for a moment there are two of it."""
_EVEN = 4
"""Where not all requests fit at once, their number is a multiple of it: odd ones are slow on a GPU."""
_LOGITS_BYTES = 2 * 4
"""A position's logits in 32 bits, and their log-softmax, per token of the vocabulary."""


def batch_bytes(shape: ModelShape, requests: Sequence[TokenRequest], num_sequences: int) -> int:
    """Bytes of the compute device that the largest batch of `num_sequences` takes beside weights."""
    num_tokens = max(len(request.prompt_ids) + request.max_tokens for request in requests)
    num_prompt_tokens = max(len(request.prompt_ids) for request in requests)
    num_logits = num_prompt_tokens if any(request.score_prompt for request in requests) else 1
    cache_bytes = num_tokens * (shape.num_layers + _CACHE_LAYERS) * shape.kv_compute_bytes_per_token
    widths = ATTENTION_COPIES * shape.hidden_size + INTERMEDIATE_COPIES * shape.intermediate_size
    layer_bytes = num_prompt_tokens * widths * shape.dtype_bytes
    logits_bytes = num_logits * shape.vocab_size * (shape.dtype_bytes + _LOGITS_BYTES)
    return num_sequences * (cache_bytes + max(layer_bytes, logits_bytes))


def gpu_room(limits: Limits, device: torch.device) -> int:
    """Bytes of a GPU that a peer may plan with."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(GPU_USABLE_SHARE * min(free, limits.gpu_bytes or free))


def streamed_bytes(shape: ModelShape) -> int:
    """Bytes of the compute device for weights that come and go: what is outside the layers, and two of them."""
    return shape.resident_bytes + 2 * shape.layer_compute_bytes


def largest_batch(shape: ModelShape, requests: Sequence[TokenRequest], room_bytes: int) -> int:
    """The most sequences that fit `room_bytes`, no more than there are requests. Raises `CapacityError`."""
    most = room_bytes // batch_bytes(shape, requests, 1)
    if most < 1:
        raise CapacityError("not even one sequence fits beside the weights", mend="Raise --gpu-memory or --cpu-memory")
    return len(requests) if most >= len(requests) else most - most % _EVEN or most
