"""Attention over one part of the keys, with what it takes to merge parts.

Knows batched tensors; not where keys come from.

Softmax over a set of keys splits into softmaxes over its parts: with the log-sum-exp of each part's scores, the parts'
outputs are averaged with weights exp(lse) (Milakov and Gimelshein 2018; Hydragen, Juravsky et al. 2024, section 3.1).

Shapes: B sequences, N query heads, K KV heads, Q queries, S keys, H size of a key, W size of a value.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from flexeval.engine.kernels import has_triton


class Partial(NamedTuple):
    """Attention over some of the keys."""

    out_BNQW: Tensor
    lse_BNQ: Tensor
    """Log-sum-exp of the scores, float32; -inf where a query sees none of these keys (its output is 0 then)."""


def partial_attention(
    q_BNQH: Tensor,
    k_BKSH: Tensor,
    v_BKSW: Tensor,
    *,
    scale: float,
    is_causal: bool = False,
    mask_BQS: Tensor | None = None,
    bias_BQS: Tensor | None = None,
    softcap: float | None = None,
) -> Partial:
    """Softmax attention and the log-sum-exp of its scores.

    Args:
        q_BNQH: Queries; N is a multiple of K, and query heads of one KV head are neighbours.
        k_BKSH: Keys.
        v_BKSW: Values.
        scale: Factor on the scores.
        is_causal: Query i sees keys 0..i; Q equals S then, and there is no mask.
        mask_BQS: Bool, True where a query sees a key; B and Q may be 1 to broadcast.
        bias_BQS: Instead of a mask, on a CPU, made once for many calls: float32, 0 where a query sees a key and -inf
            where it does not. Every query sees one.
        softcap: Scores become softcap * tanh(score / softcap).
    """
    assert not (is_causal and mask_BQS is not None)
    assert bias_BQS is None or (mask_BQS is None and q_BNQH.device.type == "cpu")
    if not has_kernel(q_BNQH, v_BKSW, softcap):
        if bias_BQS is not None:
            mask_BQS = bias_BQS == 0
        return reference_attention(
            q_BNQH, k_BKSH, v_BKSW, scale=scale, is_causal=is_causal, mask_BQS=mask_BQS, softcap=softcap
        )
    if q_BNQH.device.type == "cpu":
        return _cpu_flash(q_BNQH, k_BKSH, v_BKSW, scale, is_causal, mask_BQS, bias_BQS)
    size = q_BNQH.shape[-1]
    if size % 8:  # the kernels ask for a multiple; zeros add nothing to a score
        q_BNQH, k_BKSH, v_BKSW = (pad(tensor, (0, -size % 8)) for tensor in (q_BNQH, k_BKSH, v_BKSW))
    kernel = _cuda_flash if mask_BQS is None and q_BNQH.element_size() == 2 and size <= 256 else _cuda_efficient
    partial = kernel(q_BNQH, k_BKSH, v_BKSW, scale, is_causal, mask_BQS)
    return Partial(partial.out_BNQW[..., :size], partial.lse_BNQ)


def has_kernel(q_BNQH: Tensor, v_BKSW: Tensor, softcap: float | None) -> bool:
    """Whether `partial_attention` need not write out scores, nor keys and values in float32."""
    return softcap is None and q_BNQH.shape[-1] == v_BKSW.shape[-1]


def reference_attention(
    q_BNQH: Tensor,
    k_BKSH: Tensor,
    v_BKSW: Tensor,
    *,
    scale: float,
    is_causal: bool = False,
    mask_BQS: Tensor | None = None,
    softcap: float | None = None,
) -> Partial:
    """The same, written out in float32: the oracle of the fast kernels, and their stand-in where they cannot go."""
    heads_per_kv = q_BNQH.shape[1] // k_BKSH.shape[1]
    k_BNSH = k_BKSH.repeat_interleave(heads_per_kv, dim=1).float()
    v_BNSW = v_BKSW.repeat_interleave(heads_per_kv, dim=1).float()
    scores_BNQS = q_BNQH.float() @ k_BNSH.transpose(-1, -2) * scale
    if softcap is not None:
        scores_BNQS = softcap * torch.tanh(scores_BNQS / softcap)
    if is_causal:
        num = q_BNQH.shape[2]
        mask_BQS = torch.ones(1, num, num, dtype=torch.bool, device=q_BNQH.device).tril()
    if mask_BQS is not None:
        scores_BNQS = scores_BNQS.masked_fill(~mask_BQS[:, None], -torch.inf)
    lse_BNQ = scores_BNQS.logsumexp(-1)
    weights_BNQS = (scores_BNQS - lse_BNQ[..., None]).exp().nan_to_num_(0.0)
    return Partial((weights_BNQS @ v_BNSW).to(q_BNQH.dtype), lse_BNQ)


def _cpu_flash(
    q_BNQH: Tensor,
    k_BKSH: Tensor,
    v_BKSW: Tensor,
    scale: float,
    is_causal: bool,
    mask_BQS: Tensor | None,
    bias_BQS: Tensor | None,
) -> Partial:
    bias = None if bias_BQS is None else bias_BQS[:, None]
    if mask_BQS is not None:
        bias = _bias(mask_BQS[:, None], q_BNQH.dtype)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_BNQH, k_BKSH, v_BKSW, 0.0, is_causal, attn_mask=bias, scale=scale
    )
    return _blind_to_zero(out, lse, mask_BQS)


def _cuda_flash(
    q_BNQH: Tensor, k_BKSH: Tensor, v_BKSW: Tensor, scale: float, is_causal: bool, mask_BQS: Tensor | None
) -> Partial:
    assert mask_BQS is None
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        q_BNQH, k_BKSH, v_BKSW, 0.0, is_causal, False, scale=scale
    )
    return Partial(out, lse)


def _cuda_efficient(
    q_BNQH: Tensor, k_BKSH: Tensor, v_BKSW: Tensor, scale: float, is_causal: bool, mask_BQS: Tensor | None
) -> Partial:
    num_heads, num_queries, num_keys = q_BNQH.shape[1], q_BNQH.shape[2], k_BKSH.shape[2]
    heads_per_kv = num_heads // k_BKSH.shape[1]
    if heads_per_kv > 1:
        k_BKSH = k_BKSH.repeat_interleave(heads_per_kv, dim=1)
        v_BKSW = v_BKSW.repeat_interleave(heads_per_kv, dim=1)
    bias = None
    if mask_BQS is not None:  # the kernel reads a bias in runs of 8: give it rows of such a length
        padded = torch.zeros(*mask_BQS.shape[:2], -(-num_keys // 8) * 8, dtype=torch.bool, device=mask_BQS.device)
        padded[..., :num_keys] = mask_BQS
        bias = _bias(padded[:, None], q_BNQH.dtype)[..., :num_keys]
        bias = bias.expand(q_BNQH.shape[0], num_heads, num_queries, num_keys)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        q_BNQH, k_BKSH, v_BKSW, bias, True, 0.0, is_causal, scale=scale
    )
    return _blind_to_zero(out, lse[..., :num_queries], mask_BQS)


def _bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a key is seen, -inf where it is not."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)


def _blind_to_zero(out_BNQW: Tensor, lse_BNQ: Tensor, mask_BQS: Tensor | None) -> Partial:
    """Kernels disagree about queries that see no key: give them output 0 and weight exp(-inf)."""
    if mask_BQS is None:
        return Partial(out_BNQW, lse_BNQ)
    is_blind_B1Q = ~mask_BQS.any(-1)[:, None]
    return Partial(
        out_BNQW.masked_fill(is_blind_B1Q[..., None], 0.0), lse_BNQ.float().masked_fill(is_blind_B1Q, -torch.inf)
    )


def merge_into(out_TNW: Tensor, lse_TN: Tensor, other_out_TNW: Tensor, other_lse_TN: Tensor) -> None:
    """Merge attention over further keys into `out` and `lse`, in place."""
    if has_triton(out_TNW.device):
        from flexeval.engine.compute import merge_kernel

        return merge_kernel.merge_into(out_TNW, lse_TN, other_out_TNW, other_lse_TN)
    weight_TN = torch.sigmoid(other_lse_TN - lse_TN)  # exp(b) / (exp(a) + exp(b))
    weight_TN.masked_fill_(other_lse_TN == -torch.inf, 0.0)  # also where neither sees a key
    out_TNW.lerp_(other_out_TNW, weight_TN[..., None].to(out_TNW.dtype))
    torch.logaddexp(lse_TN, other_lse_TN, out=lse_TN)
