"""What tests keep of made-up distributions, in the way the engine does."""

import numpy as np
import torch

from flexeval.distributions import row_type
from flexeval.engine.compute.keeping import Keeper, shifts
from flexeval.request import Kept


def kept_of(logprobs, num_top, tokens=None, first=0):
    """Of log-probabilities `[positions, vocabulary]`; `tokens` stand before them, from position `first` on."""
    num = len(logprobs)
    before = np.zeros(num, int) if tokens is None else tokens
    places = torch.from_numpy(shifts(before, np.arange(first, first + num)))
    keeper = Keeper(num_top, logprobs.shape[1], torch.device("cpu"))
    return Kept(*(one.numpy() for one in keeper.keep(torch.from_numpy(np.ascontiguousarray(logprobs)).float(), places)))


def put(rows, kept):
    """Put what was kept into rows."""
    num_top = rows["top_tokens"].shape[1]
    for name, columns in (("top", slice(num_top)), ("sampled", slice(num_top, 2 * num_top))):
        rows[f"{name}_tokens"], rows[f"{name}_logprobs"] = kept.token_ids_NC[:, columns], kept.logprobs_NC[:, columns]
    rows["threshold"] = kept.logprobs_NC[:, -1]
    return rows


def make_rows(logprobs, num_top, tokens=None, first=0):
    """Rows that keep some distributions, whose own token is `tokens`, or none."""
    rows = put(np.zeros(len(logprobs), row_type(num_top)), kept_of(logprobs, num_top, first=first))
    rows["token"] = -1 if tokens is None else tokens
    if tokens is not None:
        rows["logprob"] = np.take_along_axis(logprobs, np.asarray(tokens)[:, None], 1)[:, 0]
    return rows
