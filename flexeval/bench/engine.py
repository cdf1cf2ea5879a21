"""Measures the engine under one setting, in a process of its own. Knows its public face; not the arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from flexeval.backends.native import Engine
from flexeval.bench.bounds import with_bounds
from flexeval.bench.figures import ScalePoint, SystemFigures, TokenFigures
from flexeval.bench.phases import fit_exponent, split_phases
from flexeval.bench.timing import Measured, answer, median, num_generated, resident_peak_bytes, tokens
from flexeval.models import ModelSource
from flexeval.planning.summary import summarize
from flexeval.policy.policy import Policy
from flexeval.policy.telling import tell_policy
from flexeval.progress import Progress
from flexeval.request import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineJob:
    """The engine under one setting."""

    source: ModelSource
    """The model."""
    setting: str
    """Its compression."""
    options: dict[str, Any]
    """What else `Engine.load` takes."""
    requests: Sequence[Request]
    """What to answer."""
    num_repeats: int
    """Measured runs."""
    num_warm_up: int
    """Requests answered before them; the first ones."""
    more_requests: Sequence[Sequence[Request]] = field(default=())
    """With `--scale`: larger and larger work, measured once each."""


def measure_engine(job: EngineJob, progress: Progress) -> Measured:
    """Run the engine. Raises `FlexevalError`."""
    label = f"flexeval {job.setting}"
    with Engine.load(job.source, setting=job.setting, **job.options) as engine:
        largest = job.more_requests[-1] if job.more_requests else job.requests
        with progress.activity(f"{label}: loading weights") as update:
            engine.place(largest, on_layer=update)
        progress.say(f"{label}: {tell_policy(Policy.from_json(engine.usage().policy))}")
        if job.num_warm_up:
            answer(engine, job.requests[: job.num_warm_up], progress, f"{label}: warming up")
        runs = []
        for repeat in range(job.num_repeats):
            title = f"{label}: answering" + (f", run {repeat + 1}" if job.num_repeats > 1 else "")
            answered = answer(engine, job.requests, progress, title)
            runs.append((answered, split_phases(engine.trace.sweeps)))
        scale = [
            ScalePoint(
                num_requests=len(requests),
                elapsed_s=answer(engine, requests, progress, f"{label}: answering {len(requests):,}").elapsed_s,
            )
            for requests in job.more_requests
        ]
        answered, phases = median(runs, key=lambda run: run[0].elapsed_s)
        usage = engine.usage()
        model, policy = engine.cost_model(job.requests), Policy.from_json(usage.policy)
        token_requests = [part for request in job.requests for part in engine.text.to_token_requests(request)]
        plan = summarize(token_requests)
        points = [ScalePoint(num_requests=len(job.requests), elapsed_s=answered.elapsed_s), *scale]
        figures = SystemFigures(
            system=engine.name,
            setting=job.setting,
            num_requests=len(job.requests),
            batch_size=min(policy.block_sequences, len(token_requests)),
            load_s=usage.load_s,
            elapsed_s=answered.elapsed_s,
            all_elapsed_s=[run.elapsed_s for run, _ in runs],
            tokens=TokenFigures(
                num_asked=plan.num_asked_tokens,
                num_duplicate=plan.num_duplicate_tokens,
                num_shared=plan.num_shared_tokens,
                num_last=plan.num_last_tokens,
                num_computed=sum(phase.num_fresh_tokens for phase in phases.values()),
                num_generated=num_generated(answered.completions),
            ),
            phases=with_bounds(phases, model, policy),
            peak_bytes=usage.peak_bytes | {"process": resident_peak_bytes()},
            policy=usage.policy,
            splits=usage.splits,
            predicted_s=model.cost(policy).total_s,
            scale=points if scale else [],
            exponent=fit_exponent(points) if scale else None,
        )
    return Measured(figures, tokens(answered.completions), asdict(model.hardware))
