"""What is kept of a distribution: its most probable tokens, and a sample of the others that all runs draw alike.

The sample is a priority sample (Duffield, Lund and Thorup 2007, "Priority sampling for estimation of arbitrary subset
sums", JACM 54) whose random numbers depend on the place alone (Cohen and Kaplan 2007, "Summarizing data using bottom-k
sketches", PODC): two models asked the same keep mostly the same tokens, so that what lies in the tails can be compared.
Knows log-probabilities and places; not what they are compared for.

Shapes: R positions, V vocabulary, K most probable tokens and as many sampled, C = 2 K + 1 columns.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flexeval.errors import RequestError
from flexeval.hashing import mix
from flexeval.request import TokenRequest

_NUM_SHIFTS = 2**20
"""The random numbers of a position are a run of one table of so many, read in a circle from a place of its own."""
_NO_TOKEN = -1


class KeptTensors(NamedTuple):
    """The columns of `Kept`, on the device."""

    token_ids_RC: Tensor
    logprobs_RC: Tensor


class Keeper:
    """Keeps distributions over one vocabulary, on one device."""

    def __init__(self, num_top: int, vocab_size: int, device: torch.device):
        """Keep the `num_top` most probable tokens, and sample as many of the others."""
        self._num_top = num_top
        uniforms = ((mix(np.arange(_NUM_SHIFTS)) >> np.uint64(40)).astype(np.float64) + 0.5) / 2**24
        table = np.resize(np.log(uniforms).astype(np.float32), _NUM_SHIFTS + vocab_size)
        self._log_uniforms = torch.from_numpy(table).to(device).unfold(0, vocab_size, 1)  # a view: run by run

    @property
    def num_columns(self) -> int:
        """C."""
        return 2 * self._num_top + 1

    def keep(self, logprobs_RV: Tensor, shifts_R: Tensor) -> KeptTensors:
        """Keep some distributions.

        Token v has priority log p_v - log u_v with u_v uniform in (0, 1). Of those that are not among the K most
        probable, the K of highest priority are sampled; the next priority is the threshold t in the last column. So
        a token is sampled if u_v < p_v / exp(t), which has the probability min(1, p_v / exp(t)).

        Args:
            logprobs_RV: Natural logarithms in float32.
            shifts_R: The positions' `shifts`.
        """
        num_positions, vocab_size = logprobs_RV.shape
        num_top = min(self._num_top, vocab_size)
        top_logprobs_RK, top_ids_RK = logprobs_RV.topk(num_top)
        priorities_RV = self._log_uniforms[shifts_R].neg_().add_(logprobs_RV).scatter_(1, top_ids_RK, -torch.inf)
        num_ranked = min(self._num_top + 1, vocab_size)
        ranked_R, ranked_ids_R = priorities_RV.topk(num_ranked)
        sampled_ids_RK = ranked_ids_R[:, : self._num_top]
        sampled_logprobs_RK = logprobs_RV.gather(1, sampled_ids_RK).masked_fill_(
            ranked_R[:, : self._num_top].isneginf(), -torch.inf
        )
        ids_RC = top_ids_RK.new_full((num_positions, self.num_columns), _NO_TOKEN)
        kept_RC = logprobs_RV.new_full((num_positions, self.num_columns), -torch.inf)
        last = self._num_top + sampled_ids_RK.shape[1]
        ids_RC[:, :num_top], kept_RC[:, :num_top] = top_ids_RK, top_logprobs_RK
        ids_RC[:, self._num_top : last], kept_RC[:, self._num_top : last] = sampled_ids_RK, sampled_logprobs_RK
        if num_ranked > self._num_top:
            kept_RC[:, -1] = ranked_R[:, -1]
        return KeptTensors(ids_RC.masked_fill_(kept_RC.isneginf(), _NO_TOKEN), kept_RC)


def shifts(token_ids: npt.ArrayLike, positions: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Where in the table the random numbers of positions begin: after the same token at the same place, alike."""
    mixed = mix(mix(np.asarray(positions)) ^ np.asarray(token_ids).astype(np.uint64))
    return (mixed % np.uint64(_NUM_SHIFTS)).astype(np.int64)


def make_keeper(requests: Iterable[TokenRequest], vocab_size: int, device: torch.device) -> Keeper | None:
    """What keeps as many tokens as a batch asks for, or None. Raises `RequestError` where they differ."""
    numbers = {request.keep_top for request in requests} - {0}
    if len(numbers) > 1:
        what = f"one batch asks to keep {' and '.join(map(str, sorted(numbers)))} most probable tokens"
        raise RequestError(what, mend="Give its requests one number, or 0")
    return Keeper(numbers.pop(), vocab_size, device) if numbers else None
