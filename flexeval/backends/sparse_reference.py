"""Which keys each query attends to under a sparse setting, written down a second time: plainly, query by query.

What the engine's `compute/selection.py` is held against, sharing nothing with it. Knows whole sequences; no engine.

Shapes: B sequences, N query heads, K KV heads, Q queries, S keys, P pages, H size of a key.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from flexeval.config import SparseMethod, Sparsity

_PAGE = 16


def chosen_keys(
    q_BNQH: Tensor,
    k_BKSH: Tensor,
    is_seen_BNQS: Tensor | None,
    sparsity: Sparsity,
    *,
    first_position: int,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Bool `[B, N, Q, S]`.

    Args:
        q_BNQH: Queries; the last one's position is the last key's.
        k_BKSH: Keys at consecutive positions.
        is_seen_BNQS: Which of them a query may see, all without gaps; sizes may be 1. None where it sees all.
        sparsity: The method.
        first_position: Of the first key.
        scale: Factor on products.
        softcap: Scores become softcap * tanh(score / softcap).
    """
    k_BNSH = k_BKSH.repeat_interleave(q_BNQH.shape[1] // k_BKSH.shape[1], dim=1)
    shape = (*q_BNQH.shape[:3], k_BKSH.shape[2])
    is_seen_BNQS = q_BNQH.new_ones(shape, dtype=torch.bool) if is_seen_BNQS is None else is_seen_BNQS.expand(shape)
    chosen = []
    for query in range(shape[2]):
        q_BN1H, is_seen_BNS = q_BNQH[:, :, query, None], is_seen_BNQS[:, :, query]
        if sparsity.method is SparseMethod.TOPK:
            chosen.append(_highest(q_BN1H, k_BNSH, is_seen_BNS, sparsity.percent, scale, softcap))
        else:
            chosen.append(_pages(q_BN1H, k_BNSH, is_seen_BNS, sparsity.percent, first_position))
    return torch.stack(chosen, dim=2)


def _highest(
    q_BN1H: Tensor, k_BNSH: Tensor, is_seen_BNS: Tensor, percent: int, scale: float, softcap: float | None
) -> Tensor:
    scores_BNS = (q_BN1H @ k_BNSH.transpose(-1, -2))[:, :, 0] * scale
    if softcap is not None:
        scores_BNS = softcap * torch.tanh(scores_BNS / softcap)
    return _first(scores_BNS.masked_fill(~is_seen_BNS, -torch.inf), _budget(is_seen_BNS, percent))


def _pages(q_BN1H: Tensor, k_BNSH: Tensor, is_seen_BNS: Tensor, percent: int, first_position: int) -> Tensor:
    before = first_position % _PAGE
    behind = -(before + k_BNSH.shape[2]) % _PAGE
    products_BNPEH = pad(q_BN1H * k_BNSH, (0, 0, before, behind), value=-torch.inf).unflatten(2, (-1, _PAGE))
    is_seen_BNPE = pad(is_seen_BNS, (before, behind)).unflatten(2, (-1, _PAGE))
    is_touched_BNP = is_seen_BNPE.any(-1)
    is_last_BNP = is_touched_BNP & (is_touched_BNP.long().cumsum(-1) == is_touched_BNP.sum(-1, keepdim=True))
    is_always_BNP = is_touched_BNP & (is_last_BNP | ~is_seen_BNPE.all(-1))
    bounds_BNP = products_BNPEH.amax(3).sum(-1).masked_fill(~is_touched_BNP | is_always_BNP, -torch.inf)
    num_pages_BN1 = (_budget(is_seen_BNS, percent) + _PAGE - 1) // _PAGE - is_always_BNP.sum(-1, keepdim=True)
    is_chosen_BNP = is_always_BNP | _first(bounds_BNP, num_pages_BN1)
    is_chosen_BNS: Tensor = is_chosen_BNP.repeat_interleave(_PAGE, dim=-1)[..., before : before + k_BNSH.shape[2]]
    return is_chosen_BNS & is_seen_BNS


def _budget(is_seen_BNS: Tensor, percent: int) -> Tensor:
    """Of each row, the `percent` of what is seen, rounded up."""
    num_BN1: Tensor = (is_seen_BNS.sum(-1, keepdim=True) * percent + 99) // 100
    return num_BN1


def _first(values: Tensor, num: Tensor) -> Tensor:
    """The `num` highest of each row above -inf; sorting is stable, so that of equal ones the first come first."""
    rank = values.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return (rank < num) & (values > -torch.inf)
