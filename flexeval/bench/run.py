"""A benchmark from the command line's options to its figures: the order of the steps; every step is somebody else's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from flexeval.backends.loading import open_model
from flexeval.backends.native import Engine
from flexeval.backends.options import read_limits
from flexeval.bench.child import ChildFailure, run_in_child
from flexeval.bench.comparison import hold_against
from flexeval.bench.engine import EngineJob, measure_engine
from flexeval.bench.figures import BenchResults, SystemFigures
from flexeval.bench.peers import PeerJob, check_peers, measure_peer
from flexeval.bench.sizing import Chosen, SizingJob, choose_num_requests
from flexeval.bench.timing import Measured
from flexeval.bench.work import SyntheticWork, check_peer_gen_len, pick_evenly, suite_requests
from flexeval.config import Setting
from flexeval.environment import describe_machine, describe_versions
from flexeval.errors import ConfigError, FlexevalError
from flexeval.models import ModelSource, resolve
from flexeval.progress import Progress
from flexeval.report import format as show
from flexeval.request import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What `flexeval bench` was asked for."""

    model: str
    """Model REF."""
    work: SyntheticWork | str
    """Made-up requests, or the name or file of a suite."""
    num_requests: int | None = None
    """Requests; None lets the cost model choose (synthetic work), or takes all (a suite)."""
    scale: Sequence[int] = ()
    """Multiples of that number to measure as well; synthetic work only."""
    max_eval_instances: int | None = None
    """Of a suite: questions per task at most."""
    skip_missing: bool = False
    """Of a suite: go on without tasks whose data cannot be had."""
    settings: Sequence[str] = ("none",)
    """Settings of the engine."""
    policy: str = "auto"
    """As for `Engine.load`."""
    device: str = "auto"
    """As for `Engine.load`."""
    dtype: str = "auto"
    """As for `Engine.load`."""
    gpu_memory: str | None = None
    """As for `Engine.load`."""
    cpu_memory: str | None = None
    """As for `Engine.load`."""
    disk: str | None = None
    """As for `Engine.load`."""
    num_repeats: int = 1
    """Measured runs of each system; the median one is reported."""
    num_warm_up: int | None = None
    """Requests that the engine answers before it is measured; None is all, 0 none. Peers answer a short batch then."""
    peers: Sequence[str] = ()
    """Peers to measure."""
    peer_batch_size: int | None = None
    """Sequences that a peer computes together; None is one for transformers, the most that fit for the others."""
    peer_requests: int | None = None
    """Requests that peers answer, spread evenly over all; None is all."""
    peer_gen_len: int | None = None
    """Tokens that peers generate for each; synthetic work only. None is as many as the engine."""
    command: str = ""
    """The command line, for the results."""


def run_bench(options: BenchOptions, progress: Progress) -> BenchResults:
    """Measure the engine under each setting, then each peer, on the same requests.

    Raises:
        FlexevalError: Something that the user can mend. A peer that fails once the engine is measured is left out.
    """
    _check(options)
    with progress.activity(f"preparing {options.model}"):
        source = resolve(options.model)
        opened = open_model(source, setting=options.settings[0], device="cpu", dtype=options.dtype)
    work = options.work
    if isinstance(work, SyntheticWork):
        vocab_size = opened.anatomy.config.get_text_config().vocab_size
        chosen = _choose(options, work, source, vocab_size, progress)
        most = work.requests(chosen.num_requests * max(options.scale, default=1), vocab_size=vocab_size)
        requests = most[: chosen.num_requests]
        more = [most[: chosen.num_requests * factor] for factor in sorted(set(options.scale)) if factor > 1]
        words = work.describe(len(requests))
    else:
        with progress.activity("reading the questions") as update:
            asked = suite_requests(
                work,
                source,
                context_length=opened.anatomy.context_length,
                max_eval_instances=options.max_eval_instances,
                skip_missing=options.skip_missing,
                on_task=update,
            )
        requests, more, chosen = asked[: options.num_requests], [], Chosen(len(asked), "")
        words = f"{len(requests):,} requests of the suite {work}"
    measured = [_measure_engine(options, source, setting, requests, more, progress) for setting in options.settings]
    skipped: dict[str, str] = {}
    for peer in options.peers:
        try:
            measured.append(_measure_peer(options, source, peer, requests, measured, progress))
        except FlexevalError as error:
            skipped[peer] = str(error)
        except ChildFailure as error:  # a peer's, as likely as ours: what the engine's figures took must not be lost
            progress.say(str(error))
            skipped[peer] = f"it failed: {str(error).splitlines()[-1]}"
    return BenchResults(
        model=options.model,
        work=words,
        chosen=chosen.why,
        command=options.command,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=describe_machine(),
        versions=describe_versions(),
        hardware=measured[0].hardware,
        systems=[one.figures for one in measured],
        skipped=skipped,
    )


def _check(options: BenchOptions) -> None:
    """Raise `ConfigError` for what can be seen before anything is loaded."""
    for setting in options.settings:
        Setting.parse(setting)
    if len(set(options.settings)) < len(options.settings):
        raise ConfigError("a setting is named twice", where="--setting", mend="Name each once")
    if options.scale and not isinstance(options.work, SyntheticWork):
        raise ConfigError("a suite has only so many questions", where="--scale", mend="Leave out --suite")
    Engine.check_options(**_engine_options(options))
    check_peers(options.peers, options.device)
    check_peer_gen_len(options.work, options.peer_gen_len)


def _choose(
    options: BenchOptions, work: SyntheticWork, source: ModelSource, vocab_size: int, progress: Progress
) -> Chosen:
    if options.num_requests is not None:
        return Chosen(options.num_requests, "")
    job = SizingJob(
        source=source,
        setting=options.settings[0],
        options=_engine_options(options),
        work=work,
        vocab_size=vocab_size,
    )
    return run_in_child(choose_num_requests, job, progress, what="the cost model")


def _measure_engine(
    options: BenchOptions,
    source: ModelSource,
    setting: str,
    requests: Sequence[Request],
    more: Sequence[Sequence[Request]],
    progress: Progress,
) -> Measured:
    job = EngineJob(
        source=source,
        setting=setting,
        options=_engine_options(options),
        requests=requests,
        num_repeats=options.num_repeats,
        num_warm_up=len(requests) if options.num_warm_up is None else options.num_warm_up,
        more_requests=more,
    )
    measured = run_in_child(measure_engine, job, progress, what=f"flexeval {setting}")
    _tell(f"flexeval {setting}", measured.figures, progress)
    return measured


def _measure_peer(
    options: BenchOptions,
    source: ModelSource,
    peer: str,
    requests: Sequence[Request],
    ours: Sequence[Measured],
    progress: Progress,
) -> Measured:
    """A peer's figures, held against the engine's."""
    asked = pick_evenly(len(requests), options.peer_requests)
    job = PeerJob(
        source=source,
        peer=peer,
        device=options.device,
        dtype=options.dtype,
        limits=read_limits(options.gpu_memory, options.cpu_memory, options.disk),
        batch_size=options.peer_batch_size,
        requests=requests,
        asked=asked,
        max_tokens=options.peer_gen_len,
        num_repeats=options.num_repeats,
        is_warmed_up=options.num_warm_up != 0,
    )
    measured = run_in_child(measure_peer, job, progress, what=peer)
    ours = [one for one in ours if one.figures.system == Engine.name]
    figures = hold_against(measured, ours, requests, asked=asked, max_tokens=options.peer_gen_len)
    _tell(peer, figures, progress)
    return measured._replace(figures=figures)


def _tell(system: str, figures: SystemFigures, progress: Progress) -> None:
    """Say at once what was measured: what comes after it may take long, or be stopped."""
    words = [f"prefill {show.digits(figures.prefill_tokens_per_s)} tok/s"]
    if figures.decode_s_per_sweep is not None:
        words.append(f"decode {show.digits(figures.decode_s_per_sweep)} s a sweep")
    words.append(f"{show.digits(figures.requests_per_s)} requests/s")
    progress.say(f"{system}: {', '.join(words)}")


def _engine_options(options: BenchOptions) -> dict[str, Any]:
    names = ("policy", "device", "dtype", "gpu_memory", "cpu_memory", "disk")
    return {name: getattr(options, name) for name in names}
