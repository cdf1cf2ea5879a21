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
from flexeval.bench.figures import PhaseFigures, SystemFigures, TokenFigures
from flexeval.bench.timing import Measured, answer, median, num_generated, resident_peak_bytes, tokens
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
    """What to answer."""
    num_repeats: int
    """Measured runs."""
    is_warmed_up: bool
    """Whether a short run comes before them."""


def measure_peer(job: PeerJob, progress: Progress) -> Measured:
    """Run a peer. Raises `FlexevalError`."""
    for logger in ("accelerate", "DeepSpeed"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    cap_gpu_memory(job.limits, pick_device(job.device))
    with progress.activity(f"{job.peer}: loading weights"):
        try:
            backend, generator = _load_peer(job)
        except torch.OutOfMemoryError as error:
            raise CapacityError(f"{job.peer} does not fit on the GPU", mend="Raise --gpu-memory") from error
    try:
        if job.is_warmed_up:
            few = [
                replace(request, max_tokens=min(request.max_tokens, _WARM_UP_TOKENS))
                for request in job.requests[: generator.batch_size]
            ]
            answer(backend, few, progress, f"{job.peer}: warming up")
        runs = []
        for repeat in range(job.num_repeats):
            before = (generator.prefill_s, generator.decode_s, generator.num_batches, generator.num_steps)
            title = f"{job.peer}: answering" + (f", run {repeat + 1}" if job.num_repeats > 1 else "")
            answered = answer(backend, job.requests, progress, title)
            after = (generator.prefill_s, generator.decode_s, generator.num_batches, generator.num_steps)
            runs.append((answered, [late - early for late, early in zip(after, before, strict=True)]))
        usage = backend.usage()
    finally:
        backend.close()
    answered, (prefill_s, decode_s, num_batches, num_steps) = median(runs, key=lambda run: run[0].elapsed_s)
    num_prompt = sum(completion.num_prompt_tokens for completion in answered.completions)
    num_drawn = num_generated(answered.completions)
    prefill = PhaseFigures(
        elapsed_s=prefill_s, num_sweeps=int(num_batches), num_fresh_tokens=num_prompt, num_decode_tokens=0
    )
    decode = PhaseFigures(
        elapsed_s=decode_s,
        num_sweeps=int(num_steps),
        num_fresh_tokens=0,
        num_decode_tokens=max(0, num_drawn - len(job.requests)),
    )
    figures = SystemFigures(
        system=job.peer,
        setting="none",
        num_requests=len(job.requests),
        batch_size=generator.batch_size,
        load_s=usage.load_s,
        elapsed_s=answered.elapsed_s,
        all_elapsed_s=[run.elapsed_s for run, _ in runs],
        tokens=TokenFigures(
            num_asked=num_prompt, num_duplicate=0, num_shared=0, num_computed=num_prompt, num_generated=num_drawn
        ),
        phases={"prefill": prefill} | ({"decode": decode} if num_steps else {}),
        peak_bytes=usage.peak_bytes | {"process": resident_peak_bytes()},
    )
    return Measured(figures, tokens(answered.completions), {})


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
