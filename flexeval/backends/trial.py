"""A trial run: how long a CPU takes for layers of this model, held against what the cost model says.

Rates are of single operations, and a machine makes more of a layer than their sum: threads that meet after each, caches
that one operation leaves to the next, memory that comes anew. So before a run is foretold two short models, of the
first layer and of some more with random weights, answer a few of its requests with as much in flight as it will have.
What a sweep of the whole model takes is on the line through both: head, reading off and planning are in its beginning.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from math import ceil

from flexeval.backends.gauging import measured_sweep
from flexeval.backends.loading import OpenModel
from flexeval.backends.placed import place_weights
from flexeval.backends.shortage import full_tier, release
from flexeval.config import Limits
from flexeval.engine.compute.anatomy import Anatomy
from flexeval.engine.executor import Executor
from flexeval.engine.family import first_layers, layers_of_every_kind
from flexeval.engine.random_checkpoint import RandomCheckpoint
from flexeval.engine.sizes import measure_workload
from flexeval.errors import FailedRequestsError
from flexeval.policy.correction import NO_CORRECTION, Correction
from flexeval.policy.cost import CostModel
from flexeval.policy.measured import MeasuredSweep, correct
from flexeval.policy.policy import Policy, Split, Tier
from flexeval.request import TokenRequest

LEAST_RUN_S = 10.0
"""A run that should be shorter is over before a trial has told anything."""
MOST_SHARE, MOST_S = 0.05, 20.0
"""Of a run's foretold seconds, a trial's, and its own: whoever asks for a plan of hours waits for it."""
LEAST_BYTES = 32 * 2**20
"""Of the layers of the longer model: more than caches keep from one sweep to the next."""
NUM_DRAWN = 4
"""Tokens that a text is continued by."""
NUM_TIMES = 3
"""The models answer so often, in turns, and a sweep counts by its shortest time: kernels are made ready at first, and
what else the machine does for a moment would be in the whole model's time many times over."""


def try_out(
    opened: OpenModel, model: CostModel, policy: Policy, requests: Sequence[TokenRequest], *, is_apart: bool
) -> Correction:
    """What the cost model's seconds of the compute device are to be multiplied by; as they are where no trial pays.

    On a GPU none is made: its rates tell more, and the host is ahead of it by more than a short model takes.

    Args:
        opened: The model.
        model: Of the run, without correction.
        policy: Under which it will run.
        requests: All of it.
        is_apart: Whether nothing is computed together.
    """
    at_home, num_layers = Split(cpu=1.0), model.shape.num_layers
    most = max(layers_of_every_kind(opened.anatomy.config), 1 + ceil(LEAST_BYTES / model.shape.layer_compute_bytes))
    run_s = model.cost(policy).total_s
    if model.hardware.home is not Tier.CPU or most >= num_layers or run_s < LEAST_RUN_S:
        return NO_CORRECTION
    policy = replace(policy, weights=at_home, kv=at_home, hidden=at_home)
    most_s = min(MOST_SHARE * run_s, MOST_S) * num_layers / (NUM_TIMES * (1 + most))
    sample = _sample(model, policy, requests, most_s=most_s)
    if not sample or not _has_room(model, policy, sample, num_layers=1 + most):
        return NO_CORRECTION
    try:
        times = _measure(opened, (1, most), policy, sample, is_apart=is_apart)
    finally:
        release(opened.device)
    if times is None:
        return NO_CORRECTION
    short, long = ([_shortest(sweep) for sweep in zip(*runs, strict=True)] for runs in zip(*times, strict=True))
    steps = (num_layers - 1) / (most - 1)
    whole = [_on_line(*pair, steps=steps) for pair in zip(short, long, strict=True)]
    return replace(correct(model, policy, whole), cutting={})


def _measure(
    opened: OpenModel,
    depths: Sequence[int],
    policy: Policy,
    requests: Sequence[TokenRequest],
    *,
    is_apart: bool,
) -> list[list[list[MeasuredSweep]]] | None:
    """Each time that requests were answered, by model: what their sweeps took. None where they cannot be."""
    with ExitStack() as stack:
        try:
            models = [stack.enter_context(_place(opened, depth, policy, is_apart=is_apart)) for depth in depths]
        except Exception:  # no room, or a family of which a layer alone is no model: the run itself may go well
            return None
        try:
            return [[_answer(model, requests) for model in models] for _ in range(NUM_TIMES)]
        except Exception as error:
            if full_tier(error, Tier.CPU) is None and not isinstance(error, FailedRequestsError):
                raise
            return None  # what does not fit will be said of the run itself


def _has_room(model: CostModel, policy: Policy, sample: Sequence[TokenRequest], *, num_layers: int) -> bool:
    """Whether two short models of so many layers together fit the memory given."""
    shape = replace(model.shape, num_layers=num_layers, resident_bytes=2 * model.shape.resident_bytes)
    both = replace(model, shape=shape, workload=measure_workload(sample))
    return bool(both.peak_bytes(policy, both.place(policy))[Tier.CPU] <= model.hardware.cpu_bytes)


def _sample(model: CostModel, policy: Policy, requests: Sequence[TokenRequest], *, most_s: float) -> list[TokenRequest]:
    """Requests from all over a run, a row of those that score and a block of those that generate, or fewer.

    The whole model should not need more than `most_s` for them; none where it does for one of each kind.
    """
    kinds = [[r for r in requests if r.max_tokens <= 1], [r for r in requests if r.max_tokens > 1]]
    mean_tokens = model.workload.num_prompt_tokens / model.workload.num_sequences
    sizes = [ceil(policy.row_tokens / mean_tokens), policy.block_sequences]
    while True:
        chosen = [_evenly(kind, size) for kind, size in zip(kinds, sizes, strict=True)]
        sample = [
            replace(request, max_tokens=min(request.max_tokens, NUM_DRAWN), eos_ids=frozenset(), is_stopped=None)
            for kind in chosen
            for request in kind
        ]
        if replace(model, workload=measure_workload(sample)).cost(policy).total_s <= most_s:
            return sample
        if max(len(kind) for kind in chosen) == 1:
            return []
        sizes = [max(1, len(kind) // 2) for kind in chosen]


def _evenly(requests: Sequence[TokenRequest], num: int) -> Sequence[TokenRequest]:
    return requests[:: max(1, len(requests) // num)][:num]


def _place(opened: OpenModel, num_layers: int, policy: Policy, *, is_apart: bool) -> Executor:
    """A model of the first layers, with random weights."""
    anatomy = Anatomy(first_layers(opened.anatomy.config, num_layers), opened.anatomy.dtype)
    short = replace(opened, anatomy=anatomy, checkpoint=RandomCheckpoint(anatomy), content=None)
    executor = place_weights(short, policy, Limits(), lambda layer, num: None, is_apart=is_apart)
    if opened.setting.has_key_channels:
        executor.find_key_channels()
    return executor


def _answer(executor: Executor, requests: Sequence[TokenRequest]) -> list[MeasuredSweep]:
    """What the sweeps take that answer requests."""
    executor.trace.begin_batch()
    executor.execute(requests)
    return [measured_sweep(sweep) for sweep in executor.trace.sweeps]


def _shortest(times: Sequence[MeasuredSweep]) -> MeasuredSweep:
    """One sweep that was made several times."""
    return replace(
        times[0],
        elapsed_s=min(sweep.elapsed_s for sweep in times),
        compute_s=min(sweep.compute_s for sweep in times),
    )


def _on_line(short: MeasuredSweep, long: MeasuredSweep, *, steps: float) -> MeasuredSweep:
    """A sweep of the whole model, so many `steps` from the short one; the long one is a step from it."""
    return replace(
        short,
        elapsed_s=short.elapsed_s + steps * max(0.0, long.elapsed_s - short.elapsed_s),
        compute_s=short.compute_s + steps * max(0.0, long.compute_s - short.compute_s),
    )
