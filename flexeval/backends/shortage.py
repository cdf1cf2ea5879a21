"""Memory that runs out while the engine works: how it shows, and how it is given back. Knows errors; mends none."""

from __future__ import annotations

import gc

import torch

from flexeval.errors import CapacityError, FlexevalError
from flexeval.policy.policy import Policy, Tier
from flexeval.policy.search import OPTION

_ON_HOST = ("can't allocate memory", "Cannot allocate memory")
"""Of torch's allocator for host memory, which has no error of its own, and of the system."""
_ON_DEVICE = ("out of memory", "ALLOC_FAILED")
"""Of the CUDA driver, and of libraries that allocate by themselves."""


def full_tier(error: BaseException, home: Tier) -> Tier | None:
    """The memory that an error says is full; None for an error about anything else.

    Looks through what an error came from: a recording or a library says that it failed, and not always why.

    Args:
        error: What was raised.
        home: The compute device's own tier.
    """
    cause: BaseException | None = error
    while cause is not None:
        match cause:
            case FlexevalError():
                tier = cause.tier if isinstance(cause, CapacityError) else None
                return None if tier is None else Tier(tier)
            case torch.OutOfMemoryError():
                return home
            case MemoryError():
                return Tier.CPU
            case RuntimeError() if any(words in str(cause) for words in _ON_HOST):
                return Tier.CPU
            case RuntimeError() if any(words in str(cause) for words in _ON_DEVICE):
                return home
        cause = cause.__cause__ or cause.__context__
    return None


def release(device: torch.device) -> None:
    """Give back what an error that is handled still held: a failed transfer and its traceback hold each other."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def does_not_load(error: BaseException, full: Tier) -> CapacityError:
    """Memory ran out before anything could be answered."""
    return CapacityError(
        f"{full} memory ran out: {_reason(error)}", where="while weights were loaded", mend=_mend(full)
    )


def cannot_split(error: BaseException, full: Tier, policy: Policy) -> CapacityError:
    """Memory ran out with as little in flight as there can be."""
    return CapacityError(
        f"{full} memory ran out: {_reason(error)}",
        where=f"the smallest batch: rows of {policy.row_tokens} tokens, {policy.block_sequences} sequences at once",
        mend=_mend(full),
    )


def _reason(error: BaseException) -> str:
    """An error's first sentence or two: torch goes on about its settings."""
    text = error.what if isinstance(error, FlexevalError) else str(error) or type(error).__name__
    return text[:200]


def _mend(full: Tier) -> str:
    other = "free some room on it" if full is Tier.DISK else "end what else uses it"
    return f"Choose a smaller setting such as w4, plan with less by {OPTION[full]}, or {other}; then run again to go on"
