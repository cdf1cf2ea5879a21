"""A run from the command line's options to the report: the one place that joins the text half to the tensor half.

Knows the order of the steps; every step is somebody else's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from flexeval.answering import Answers, answer_all
from flexeval.asked import ASKED_FILE, JOURNALS, RunOptions, directory_of, engine_options, remember
from flexeval.backends.native import Engine
from flexeval.benchmark.helm import HelmSuite, ModelCard, Scored
from flexeval.benchmark.suites import Suite, load_suite
from flexeval.config import Setting
from flexeval.distributions import Answered, gather, request_key
from flexeval.environment import describe_machine, describe_versions
from flexeval.errors import ConfigError
from flexeval.models import ModelSource, fingerprint, resolve
from flexeval.outcomes import Outcome, collect, failed_requests, failed_tasks
from flexeval.output import output_directory
from flexeval.parquet import save
from flexeval.progress import LiveProgress, Progress
from flexeval.report.merge import distribution_path
from flexeval.report.write import write_report
from flexeval.request import Completion, Request
from flexeval.results import RunResults
from flexeval.status import STATUS_FILE, Reporter
from flexeval.tokenizer import has_chat_template, num_chat_tokens, open_tokenizer


class Done(NamedTuple):
    """A run that is complete."""

    results: RunResults
    """What it found."""
    page: Path
    """The report."""
    failed: dict[str, str]
    """Tasks that were answered but not scored, and why: they are not in it."""
    failed_requests: list[str]
    """A line for each setting under which requests failed: their questions are not in it."""


def run_suite(options: RunOptions, shown: LiveProgress) -> Done:
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
    Engine.check_options(**engine_options(options))
    out = directory_of(options)
    names = [setting.name for setting in settings]
    with (
        output_directory(out, kept=f"{JOURNALS}/*", notes=(ASKED_FILE, STATUS_FILE)),
        Reporter(shown, out, names) as progress,
    ):
        remember(options, out)
        with progress.activity(f"preparing {options.model}"):
            source = resolve(options.model)
        outcomes = [_run_setting(options, suite, source, setting, out, progress) for setting in settings]
        results = collect(
            suite.name,
            source,
            out,
            outcomes,
            is_chat=is_asked_in_chat(suite, source, options.chat_template),
            apart=names if options.deterministic else (),
            command=options.command,
            machine=describe_machine(),
            versions=describe_versions(),
            fingerprint=fingerprint(source),
        )
        results.save(out)
        with progress.activity("writing the report"):
            return Done(results, write_report(results, out), failed_tasks(outcomes), failed_requests(outcomes))


def _run_setting(
    options: RunOptions, suite: Suite, source: ModelSource, setting: Setting, out: Path, progress: Reporter
) -> Outcome:
    """Collect all requests, answer them in one call of the engine, and score the answers."""
    with Engine.load(source, setting=setting, **engine_options(options)) as engine:
        helm, requests = ask(
            suite,
            source,
            setting.name,
            output=out / "helm",
            context_length=engine.context_length,
            max_eval_instances=options.max_eval_instances,
            skip_missing=options.skip_missing,
            is_chat=is_asked_in_chat(suite, source, options.chat_template),
            progress=progress,
        )
        answers = answer_all(
            engine,
            source,
            setting,
            requests,
            out / JOURNALS,
            keep_top=options.keep_top,
            fresh=options.fresh,
            progress=progress,
            tasks=helm.requests_of_tasks,
        )
    vocabulary = engine.text.vocabulary if options.keep_top else 0
    done = score(helm, requests, answers, out, keep_top=options.keep_top, vocabulary=vocabulary, progress=progress)
    progress.end_setting()
    return done


def ask(
    suite: Suite,
    source: ModelSource,
    setting: str,
    *,
    output: Path,
    context_length: int,
    max_eval_instances: int | None,
    skip_missing: bool,
    is_chat: bool,
    progress: Progress,
) -> tuple[HelmSuite, list[Request]]:
    """A suite for a model under a setting, and every different request of it. Raises as `HelmSuite.collect` does."""
    card = ModelCard(
        name=f"flexeval/{source.name}",
        model=source.ref,
        setting=setting,
        tokenizer_dir=source.tokenizer_dir,
        max_sequence_length=context_length,
        note=source.note,
        num_template_tokens=num_chat_tokens(open_tokenizer(source.tokenizer_dir)) if is_chat else 0,
        is_instruct=is_chat,  # as HELM tags the models that it asks in their templates
    )
    with progress.activity(f"{setting}: reading the questions") as update:
        helm = HelmSuite(suite, card, output=output, max_eval_instances=max_eval_instances, skip_missing=skip_missing)
        return helm, helm.collect(on_task=update)


def is_asked_in_chat(suite: Suite, source: ModelSource, wanted: bool | None) -> bool:
    """Whether a chat template is applied: where it is wanted, or the suite says so and the model has one.

    Raises `ConfigError` where one is wanted that the model does not have.
    """
    if wanted is False or (wanted is None and not suite.chat_template):
        return False
    has_one = has_chat_template(open_tokenizer(source.tokenizer_dir))
    if wanted and not has_one:
        mend = "Leave it out, or choose a model that follows instructions"
        raise ConfigError(f"{source.ref!r} has no chat template", where="--chat-template", mend=mend)
    return has_one


def score(
    helm: HelmSuite,
    requests: Sequence[Request],
    answers: Answers,
    out: Path,
    *,
    keep_top: int,
    vocabulary: int,
    progress: Progress,
) -> Outcome:
    """Have HELM score the answers to what was asked, and write what they hold probable."""
    setting = answers.cost.setting
    with progress.activity(f"{setting}: scoring") as update:
        scored = helm.score(answers.completions, on_task=update)
        if keep_top:
            answered = list(_answered(requests, answers.completions, scored))
            save(gather(answered, answers.rows, vocabulary=vocabulary), distribution_path(out, setting))
        else:
            distribution_path(out, setting).unlink(missing_ok=True)  # an earlier run's
    return Outcome(
        scored=scored,
        cost=answers.cost,
        skipped=helm.skipped,
        failed=helm.failed,
        failed_requests=answers.failed,
    )


def _answered(
    requests: Sequence[Request], completions: Sequence[Completion | None], scored: Scored
) -> Iterator[Answered]:
    """Every answer with what it holds probable, and whether its prompt is known to be right."""
    right = {name for instance in scored.instances for name, is_right in instance.requests.items() if is_right}
    for request, completion in zip(requests, completions, strict=True):
        if completion is None:
            continue
        name = request.short_hash()
        prompt_ids = completion.token_ids[: completion.num_prompt_tokens] if request.echo else ()
        for one in (completion, *completion.alternatives):
            assert one.distributions is not None, request
            yield Answered(request_key(name), prompt_ids, name in right, one.distributions)
