"""Measures a peer, in a process of its own: the same requests, the same limits, no plan and no compression.

Knows which peers there are and how each is loaded.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from flexeval.backends.backend import Backend
from flexeval.backends.deepspeed import check_gpu
from flexeval.backends.generation import Generator
from flexeval.backends.loading import cap_gpu_memory, pick_device
from flexeval.bench.figures import SystemFigures, TokenFigures
from flexeval.bench.phases import peer_phases
from flexeval.bench.timing import Measured, answer, median, resident_peak_bytes, tokens
from flexeval.config import Limits
from flexeval.errors import CapacityError, ConfigError
from flexeval.models import ModelSource
from flexeval.progress import Progress
from flexeval.request import Request

PEERS = ("transformers", "accelerate", "deepspeed")
_WARM_UP_TOKENS = 2
"""A warm-up generates so many: a prompt's pass and a step after it."""


def check_peers(names: Sequence[str], device: str) -> None:
    """Raise `ConfigError` for a peer that there is not, or that cannot run on `device` here."""
    for name in names:
        if name not in PEERS:
            raise ConfigError(f"unknown peer {name!r}", where="--peer", mend=f"Peers are: {', '.join(PEERS)}")
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"the peer {name} is not installed", where="--peer", mend=f"Run pip install {name}")
        if name == "deepspeed":
            check_gpu(pick_device(device))


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerJob:
    """A peer."""

    source: ModelSource
    """The model, uncompressed."""
    peer: str
    """One of `PEERS`."""
    device: str
    """As for `Engine.load`."""
    dtype: str
    """As for `Engine.load`."""
    limits: Limits
    """Room on each tier."""
    batch_size: int | None
    """Sequences computed together; None leaves it to the peer."""
    requests: Sequence[Request]
    """All of the work: what the peer makes room for."""
    asked: Sequence[int]
    """Which of them it answers."""
    max_tokens: int | None
    """Tokens that it generates for each at most; None is as many as requested."""
    num_repeats: int
    """Measured runs."""
    is_warmed_up: bool
    """Whether a short run comes before them."""


def measure_peer(job: PeerJob, progress: Progress) -> Measured:
    """Run a peer. Raises `FlexevalError`."""
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    cap_gpu_memory(job.limits, pick_device(job.device))
    with progress.activity(f"{job.peer}: loading weights"):
        try:
            backend, generator = _load_peer(job)
        except torch.OutOfMemoryError as error:
            raise CapacityError(f"{job.peer} does not fit on the GPU", mend="Raise --gpu-memory") from error
    asked = _cut([job.requests[index] for index in job.asked], job.max_tokens)
    try:
        if job.is_warmed_up:
            few = _cut(asked[: generator.batch_size], _WARM_UP_TOKENS)
            answer(backend, few, progress, f"{job.peer}: warming up")
        runs = []
        for repeat in range(job.num_repeats):
            first_batch = len(generator.batches)
            title = f"{job.peer}: answering" + (f", run {repeat + 1}" if job.num_repeats > 1 else "")
            answered = answer(backend, asked, progress, title)
            runs.append((answered, generator.batches[first_batch:]))
        usage = backend.usage()
    finally:
        backend.close()
    answered, batches = median(runs, key=lambda run: run[0].elapsed_s)
    phases = peer_phases(batches)
    num_prompt_tokens = phases["prefill"].num_fresh_tokens
    figures = SystemFigures(
        system=job.peer,
        setting="none",
        num_requests=len(asked),
        batch_size=generator.batch_size,
        load_s=usage.load_s,
        elapsed_s=answered.elapsed_s,
        all_elapsed_s=[run.elapsed_s for run, _ in runs],
        tokens=TokenFigures(
            num_asked=num_prompt_tokens,
            num_duplicate=0,
            num_shared=0,
            num_computed=num_prompt_tokens,
            num_generated=sum(batch.num_generated_tokens for batch in batches),
        ),
        phases=phases,
        peak_bytes=usage.peak_bytes | {"process": resident_peak_bytes()},
    )
    return Measured(figures, tokens(answered.completions), {})


def _cut(requests: Sequence[Request], max_tokens: int | None) -> list[Request]:
    """The requests, none of which generates more than so many tokens."""
    if max_tokens is None:
        return list(requests)
    return [replace(request, max_tokens=min(request.max_tokens, max_tokens)) for request in requests]


def _load_peer(job: PeerJob) -> tuple[Backend, Generator]:
    """The peer with its weights where they belong."""
    options: dict[str, Any] = {"device": job.device, "dtype": job.dtype}
    if job.peer == "transformers":
        from flexeval.backends.transformers import TransformersBackend

        whole = TransformersBackend(job.source, **options, batch_size=job.batch_size or 1, attention=None)
        return whole, whole.generator
    if job.peer == "accelerate":
        from flexeval.backends.accelerate import AccelerateBackend

        dispatched = AccelerateBackend(job.source, **options, limits=job.limits, batch_size=job.batch_size)
        return dispatched, dispatched.place(job.requests)
    assert job.peer == "deepspeed", job.peer
    from flexeval.backends.deepspeed import DeepSpeedBackend

    partitioned = DeepSpeedBackend(job.source, **options, limits=job.limits, batch_size=job.batch_size)
    return partitioned, partitioned.place(job.requests)
