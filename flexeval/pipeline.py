"""A run from the command line's options to the report: the one place that joins the text half to the tensor half.

Knows the order of the steps; every step is somebody else's.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from flexeval.backends.backend import Usage, add_up
from flexeval.backends.native import Engine
from flexeval.benchmark.helm import HelmSuite, ModelCard, Scored
from flexeval.benchmark.suites import Suite, load_suite
from flexeval.config import Setting
from flexeval.distributions import Answered, gather, request_key
from flexeval.environment import describe_machine, describe_versions
from flexeval.errors import ConfigError
from flexeval.journal import Journal
from flexeval.models import DEFAULT_MODEL, ModelSource, fingerprint, resolve
from flexeval.output import output_directory
from flexeval.parquet import save
from flexeval.progress import Progress
from flexeval.report.fidelity import measure
from flexeval.report.merge import distribution_files, distribution_path
from flexeval.report.write import write_report
from flexeval.request import Completion, Request
from flexeval.results import RunResults, SettingResult

_JOURNALS = "journal"
"""Folder of the journals in an output directory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """What `flexeval run` was asked for."""

    suite: str
    """Name of a suite, or path of its file."""
    model: str = DEFAULT_MODEL
    """Model REF."""
    settings: Sequence[str] = ("none",)
    """Names of the settings to compare, the baseline first."""
    out: Path | None = None
    """Directory of the report; `reports/<suite>` otherwise."""
    max_eval_instances: int | None = None
    """Questions per task at most; None leaves it to the suite."""
    skip_missing: bool = False
    """Run without the tasks whose data cannot be had."""
    keep_top: int = 32
    """Most probable tokens to keep at each position, and as many others; 0 compares answers only."""
    fresh: bool = False
    """Answer everything again, whatever an earlier run in the same directory has answered."""
    device: str = "auto"
    """`auto`, `cpu` or `cuda`."""
    dtype: str = "auto"
    """Type of the arithmetic."""
    policy: str = "auto"
    """`auto`, a policy file, or shares and sizes as text."""
    gpu_memory: str | None = None
    """GPU memory at most."""
    cpu_memory: str | None = None
    """Host memory at most."""
    disk: str | None = None
    """Folder for offloaded data, with or without a size."""
    command: str = ""
    """The command line, for the report."""


class Done(NamedTuple):
    """A run that is complete."""

    results: RunResults
    """What it found."""
    page: Path
    """The report."""


def run_suite(options: RunOptions, progress: Progress) -> Done:
    """Evaluate a model on a suite under each setting and write the report.

    Raises:
        FlexevalError: Something that the user can mend. What is answered by then is kept in the output directory; if
            nothing is, the directory is not left behind.
    """
    suite = load_suite(options.suite)
    settings = [Setting.parse(name) for name in options.settings]
    repeated = [name for name, count in Counter(options.settings).items() if count > 1]
    if repeated:
        raise ConfigError(f"setting {repeated[0]!r} is named twice", where="--setting", mend="Name each once")
    Engine.check_options(**_engine_options(options))
    out = options.out or Path("reports") / suite.name
    with output_directory(out, kept=f"{_JOURNALS}/*"):
        with progress.activity(f"preparing {options.model}"):
            source = resolve(options.model)
        outcomes = [_run_setting(options, suite, source, setting, out, progress) for setting in settings]
        results = _gather(options, suite, source, out, outcomes)
        results.save(out)
        with progress.activity("writing the report"):
            return Done(results, write_report(results, out))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outcome:
    """One setting's part of the results."""

    scored: Scored
    result: SettingResult
    skipped: dict[str, str]


def _run_setting(
    options: RunOptions, suite: Suite, source: ModelSource, setting: Setting, out: Path, progress: Progress
) -> _Outcome:
    """Collect all requests, answer them in one call of the engine, and score the answers."""
    with Engine.load(source, setting=setting, **_engine_options(options)) as engine:
        card = ModelCard(
            name=f"flexeval/{source.name}",
            model=source.ref,
            setting=setting.name,
            tokenizer_dir=source.tokenizer_dir,
            max_sequence_length=engine.context_length,
            note=source.note,
        )
        with progress.activity(f"{setting.name}: reading the questions") as update:
            helm = HelmSuite(
                suite,
                card,
                output=out / "helm",
                max_eval_instances=options.max_eval_instances,
                skip_missing=options.skip_missing,
            )
            requests = helm.collect(on_task=update)
        path = out / _JOURNALS / f"{setting.name}-{_journal_key(source, engine)}.jsonl"
        asked = [replace(request, keep_top=options.keep_top) for request in requests]
        with Journal(path, fresh=options.fresh) as journal:
            waiting = [request for request in asked if request not in journal]
            num_resumed = len(requests) - len(waiting)
            if num_resumed:
                progress.say(f"{setting.name}: {num_resumed} of {len(requests)} were answered by an earlier run")
            if waiting:
                _answer(engine, waiting, journal, setting, progress)
            completions = [journal[request] for request in asked]
            result = _cost(engine, setting, completions, journal, num_resumed)
            read = journal.rows(options.keep_top)
    with progress.activity(f"{setting.name}: scoring") as update:
        scored = helm.score(completions, on_task=update)
        if options.keep_top:
            answered = list(_answered(requests, completions, scored))
            rows = gather(answered, read, vocabulary=engine.text.vocabulary)
            save(rows, distribution_path(out, setting.name))
        else:
            distribution_path(out, setting.name).unlink(missing_ok=True)  # an earlier run's
    return _Outcome(scored=scored, result=result, skipped=helm.skipped)


def _answer(
    engine: Engine, requests: Sequence[Request], journal: Journal, setting: Setting, progress: Progress
) -> None:
    """Answer requests into the journal: each sweep's answers are durable before the next begins."""
    with progress.activity(f"{setting.name}: preparing layers") as update:
        plan = engine.place(requests, on_layer=update)
    progress.say(f"{setting.name}: {plan}")
    with progress.activity(f"{setting.name}: answering") as update:
        num_done = 0

        def keep(answers: Sequence[tuple[int, Completion]]) -> None:
            nonlocal num_done
            journal.add((requests[index], completion) for index, completion in answers)
            num_done += len(answers)
            update(num_done, len(requests))

        try:
            engine.generate(requests, on_completions=keep)
        finally:
            if num_done:
                journal.add_usage(asdict(engine.usage()))


def _answered(requests: Sequence[Request], completions: Sequence[Completion], scored: Scored) -> Iterator[Answered]:
    """Every answer with what it holds probable, and whether its prompt is known to be right."""
    right = {name for instance in scored.instances for name, is_right in instance.requests.items() if is_right}
    for request, completion in zip(requests, completions, strict=True):
        name = request.short_hash()
        prompt_ids = completion.token_ids[: completion.num_prompt_tokens] if request.echo else ()
        for one in (completion, *completion.alternatives):
            assert one.distributions is not None, request
            yield Answered(request_key(name), prompt_ids, name in right, one.distributions)


def _cost(
    engine: Engine, setting: Setting, completions: Sequence[Completion], journal: Journal, num_resumed: int
) -> SettingResult:
    """What the answers have cost, over all sessions that gave them."""
    sessions = [Usage(**usage) for usage in journal.usages]
    total = add_up(sessions)
    answers = [one for completion in completions for one in (completion, *completion.alternatives)]
    return SettingResult(
        setting=setting.name,
        backend=engine.name,
        elapsed_s=sum(completion.elapsed_s for completion in completions),
        load_s=sessions[-1].load_s if sessions else 0.0,
        num_requests=len(completions),
        num_prompt_tokens=sum(answer.num_prompt_tokens for answer in answers),
        num_computed_prompt_tokens=total.num_computed_prompt_tokens,
        num_generated_tokens=sum(answer.num_generated_tokens for answer in answers),
        peak_bytes=total.peak_bytes,
        policy=total.policy,
        lanes=total.lanes,
        num_resumed=num_resumed,
    )


def _engine_options(options: RunOptions) -> dict[str, Any]:
    names = ("policy", "device", "dtype", "gpu_memory", "cpu_memory", "disk")
    return {name: getattr(options, name) for name in names}


def _journal_key(source: ModelSource, engine: Engine) -> str:
    """Names everything beside request and setting that an answer depends on."""
    facts = [fingerprint(source), engine.dtype, describe_versions()]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _gather(
    options: RunOptions, suite: Suite, source: ModelSource, out: Path, outcomes: Sequence[_Outcome]
) -> RunResults:
    """All settings' parts as one result; HELM asks every setting the same."""
    first = outcomes[0]
    results = RunResults(
        name=out.resolve().name,
        suite=suite.name,
        model=options.model,
        model_note=source.note,
        command=options.command,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=describe_machine(),
        versions=describe_versions(),
        tasks=first.scored.tasks,
        settings=[outcome.result for outcome in outcomes],
        instances=[instance for outcome in outcomes for instance in outcome.scored.instances],
        skipped=first.skipped,
    )
    return replace(results, fidelity=measure(results, distribution_files([results], [out])))
