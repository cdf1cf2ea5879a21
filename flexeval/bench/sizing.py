"""How many requests make a fair benchmark: as many as it takes for more of them not to be cheaper each. Runs none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from flexeval.backends.native import Engine
from flexeval.backends.options import read_policy
from flexeval.bench.work import SyntheticWork
from flexeval.errors import CapacityError
from flexeval.models import ModelSource
from flexeval.policy.search import search
from flexeval.progress import Progress

_FEWEST, _MOST = 8, 4096
"""Requests that are tried, doubling."""
_WORTHWHILE = 0.05
"""Twice as many requests must save this share of the seconds each."""
_LONG_ENOUGH_S = 20.0
"""Less is doubled all the same: what begins and ends a run, and its noise, must not count."""
_PATIENCE_S = 300.0
"""No work that is predicted to take longer is chosen."""


class Chosen(NamedTuple):
    """A number of requests."""

    num_requests: int
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SizingJob:
    """What is to be measured."""

    source: ModelSource
    """The model."""
    setting: str
    """The first setting."""
    options: dict[str, Any]
    """What else `Engine.load` takes."""
    work: SyntheticWork
    """What each request is."""
    vocab_size: int
    """Tokens to draw from."""


def choose_num_requests(job: SizingJob, progress: Progress) -> Chosen:
    """The number of requests from which on the cost model sees no gain in more. Raises `FlexevalError`."""
    with (
        progress.activity("choosing the number of requests"),
        Engine.load(job.source, setting=job.setting, **job.options) as engine,
    ):
        fixed = read_policy(job.options["policy"])

        def predict(num_requests: int) -> float:
            model = engine.cost_model(job.work.requests(num_requests, vocab_size=job.vocab_size))
            policy = fixed or search(model.shape, model.workload, model.hardware)
            return model.cost(policy).total_s

        return largest_worthwhile(predict)


def largest_worthwhile(predict: Callable[[int], float]) -> Chosen:
    """Double while that makes each request cheaper.

    Args:
        predict: Seconds that a number of requests takes.

    Raises:
        CapacityError: Not even the fewest fit.
    """
    size, seconds = _FEWEST, predict(_FEWEST)
    while size < _MOST:
        try:
            doubled_s = predict(2 * size)
        except CapacityError:
            return Chosen(size, f"twice as many do not fit; {seconds:.0f} s are predicted")
        saved = 1 - doubled_s / (2 * seconds)
        if saved < _WORTHWHILE and seconds >= _LONG_ENOUGH_S:
            saving = f"twice as many would save {max(0.0, saved):.0%} of the time each"
            return Chosen(size, f"{saving}; {seconds:.0f} s are predicted")
        if doubled_s > _PATIENCE_S:
            return Chosen(size, f"twice as many would take {doubled_s:.0f} s; {seconds:.0f} s are predicted")
        size, seconds = 2 * size, doubled_s
    return Chosen(size, f"the most that are tried; {seconds:.0f} s are predicted")
