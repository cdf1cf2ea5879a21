"""Which keys a query attends to under a sparse setting. Knows scores, positions and pages; not where keys come from.

Every query of every head chooses for itself, among the keys it may see: n of them, those of its window. Its budget is
k = ceil(percent n / 100) keys. Equal ones are taken in the order of their positions, the earliest first.

Shapes: T queries, K KV heads, M query heads to a KV head, S positions of keys, P pages of them, H size of a key, X any
leading dimensions.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from flexeval.config import SparseMethod, Sparsity
from flexeval.policy.sparse import PAGE_TOKENS

N = TypeVar("N", int, Tensor)


class Sight(Protocol):
    """What some queries may see."""

    position_T: Tensor
    """Of each query: it sees the keys up to its own position, ..."""
    first_T: Tensor
    """... from this one on."""
    max_visible: int
    """The most keys that any of them sees."""

    def page_bounds(self, page_tokens: int) -> Tensor:
        """The most that a query's product with any key of a page can be `[T, K, M, P]`; any where it sees a part."""
        ...


class Selection(Protocol):
    """A method of choosing."""

    def keep(self, scores_TKMS: Tensor, sight: Sight) -> Tensor:
        """Bool, which keys each query attends to; scores are -inf where it may see none."""
        ...


class TopK:
    """The k keys with the highest scores, after scaling, soft cap and mask (FlexGen: Sheng et al., 2023, section 5)."""

    def __init__(self, percent: int):
        self._percent = percent

    def keep(self, scores_TKMS: Tensor, sight: Sight) -> Tensor:
        """Exactly k."""
        num_T = budget(sight.position_T + 1 - sight.first_T, self._percent)
        return keep_best(scores_TKMS, num_T[:, None, None], most=budget(sight.max_visible, self._percent))


class Quest:
    """As many pages as k keys fill, those with the highest bounds of their scores (Tang et al., ICML 2024, section 3).

    Pages are of positions in the sequence. As in Quest's own engine, the page that is still filling is always attended
    to; so is the one that a window cuts. Both count, and only pages that are seen as a whole compete.
    """

    def __init__(self, percent: int):
        self._percent = percent

    def keep(self, scores_TKMS: Tensor, sight: Sight) -> Tensor:
        """All that is seen of ceil(k / 16) pages, or of those that are always kept."""
        page_T, first_page_T = sight.position_T // PAGE_TOKENS, sight.first_T // PAGE_TOKENS
        bounds_TKMP = sight.page_bounds(PAGE_TOKENS)
        page_P = torch.arange(bounds_TKMP.shape[-1], device=scores_TKMS.device)
        is_cut_T = (sight.first_T % PAGE_TOKENS > 0) & (first_page_T < page_T)
        is_whole_TP = (page_P < page_T[:, None]) & (page_P >= (first_page_T + is_cut_T)[:, None])
        num_keys_T = budget(sight.position_T + 1 - sight.first_T, self._percent)
        num_pages_T = -(-num_keys_T // PAGE_TOKENS) - 1 - is_cut_T.long()
        competing_TKMP = bounds_TKMP.masked_fill(~is_whole_TP[:, None, None], -torch.inf)
        most = -(-budget(sight.max_visible, self._percent) // PAGE_TOKENS)
        is_kept_TKMP = keep_best(competing_TKMP, num_pages_T.clamp(min=0)[:, None, None], most=most)
        is_kept_TKMP |= (page_P == page_T[:, None])[:, None, None]
        is_kept_TKMP |= (is_cut_T[:, None] & (page_P == first_page_T[:, None]))[:, None, None]
        is_kept_TKMS = is_kept_TKMP.repeat_interleave(PAGE_TOKENS, dim=-1)[..., : scores_TKMS.shape[-1]]
        return is_kept_TKMS & (scores_TKMS > -torch.inf)


def make_selection(sparsity: Sparsity | None) -> Selection | None:
    """A setting's method; None where it attends to all keys."""
    if sparsity is None:
        return None
    return TopK(sparsity.percent) if sparsity.method is SparseMethod.TOPK else Quest(sparsity.percent)


def budget(num_visible: N, percent: int) -> N:
    """Keys to attend to of n that are visible, ceil(percent n / 100): at least 1, as n is."""
    return (num_visible * percent + 99) // 100


def keep_best(scores_XS: Tensor, num_X: Tensor, *, most: int) -> Tensor:
    """Bool, the best of each row: `num_X` of them, at most `most`; of equal ones the first.

    None but the best is kept where a row has fewer than `num_X` above -inf.
    """
    num_X1 = num_X.expand(scores_XS.shape[:-1])[..., None]
    worst_X1, next_X1 = _ranked(scores_XS, num_X1, most)
    worst_X1 = worst_X1.masked_fill(num_X1 < 1, torch.inf)
    if scores_XS.device.type == "cpu" and not ((next_X1 == worst_X1) | (worst_X1 == -torch.inf)).any():
        return scores_XS >= worst_X1  # nothing is equal to the worst: a device would be waited for to know
    is_above_XS = scores_XS > worst_X1
    is_equal_XS = (scores_XS == worst_X1) & (scores_XS > -torch.inf)
    num_left_X1 = num_X1 - is_above_XS.sum(-1, keepdim=True)
    return is_above_XS | (is_equal_XS & (is_equal_XS.cumsum(-1, dtype=torch.int32) <= num_left_X1))


class _Ranked(NamedTuple):
    """Of each row, the score of the last that is kept and of the first that is not; -inf where there is none."""

    worst_X1: Tensor
    next_X1: Tensor


def _ranked(scores_XS: Tensor, num_X1: Tensor, most: int) -> _Ranked:
    size = scores_XS.shape[-1]
    last_X1 = (num_X1 - 1).clamp(min=0)
    if scores_XS.device.type == "cpu":  # numpy sorts a row in a sixth of the time that torch selects in
        last_X1 = size - 1 - last_X1
        sorted_XS = torch.from_numpy(np.sort(scores_XS.numpy(), axis=-1))
        return _Ranked(sorted_XS.gather(-1, last_X1), _gather(sorted_XS, last_X1 - 1))
    best_XS = scores_XS.topk(min(most + 1, size)).values
    return _Ranked(best_XS.gather(-1, last_X1), _gather(best_XS, last_X1 + 1))


def _gather(sorted_XS: Tensor, place_X1: Tensor) -> Tensor:
    is_there_X1 = (place_X1 >= 0) & (place_X1 < sorted_XS.shape[-1])
    found_X1 = sorted_XS.gather(-1, place_X1.clamp(0, sorted_XS.shape[-1] - 1))
    return found_X1.masked_fill(~is_there_X1, -torch.inf)
