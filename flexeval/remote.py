"""A run in three steps, of which the middle one may be on another machine: prepare, execute, score.

Prompts are prepared and answers scored where the data and HELM are; they are answered where the model's weights are, by
a flexeval that needs neither. Knows the order of the steps; every step is somebody else's.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from flexeval.config import Setting
from flexeval.environment import describe_machine, describe_versions
from flexeval.errors import ResultsError
from flexeval.journal import fits
from flexeval.models import fingerprint, resolve
from flexeval.output import output_directory
from flexeval.portable import (
    AnswersFile,
    AnswersInfo,
    Prompts,
    PromptsInfo,
    read_answers,
    read_prompts,
    write_answers,
    write_prompts,
)
from flexeval.progress import LiveProgress, Progress
from flexeval.results import SettingResult

if TYPE_CHECKING:  # answering needs no HELM
    from flexeval.pipeline import Done


class Prepared(NamedTuple):
    """What a file of prompts holds."""

    num_requests: int
    skipped: dict[str, str]
    """Tasks without data, and why."""


def prepare(
    suite: str,
    model: str,
    out: Path,
    *,
    max_eval_instances: int | None,
    skip_missing: bool,
    chat_template: bool | None,
    progress: Progress,
) -> Prepared:
    """Write every different request of a suite to a file. Needs the model's tokenizer, not its weights.

    Raises:
        FlexevalError: Something that the user can mend; no file is left then.
    """
    from flexeval.backends.loading import read_context_length
    from flexeval.benchmark.suites import load_suite
    from flexeval.pipeline import ask, is_asked_in_chat
    from flexeval.tokenizer import open_tokenizer, vocabulary_of

    loaded = load_suite(suite)
    with progress.activity(f"preparing the tokenizer of {model}"):
        source = resolve(model, needs_weights=False)
    info = PromptsInfo(
        suite=suite,
        model=model,
        vocabulary=vocabulary_of(open_tokenizer(source.tokenizer_dir)),
        context_length=read_context_length(source),
        max_eval_instances=max_eval_instances,
        skip_missing=skip_missing,
        is_chat=is_asked_in_chat(loaded, source, chat_template),
    )
    with tempfile.TemporaryDirectory(prefix="flexeval-helm-") as helm_output:
        helm, requests = ask(
            loaded,
            source,
            "none",
            output=Path(helm_output),
            context_length=info.context_length,
            max_eval_instances=max_eval_instances,
            skip_missing=skip_missing,
            is_chat=info.is_chat,
            progress=progress,
        )
    write_prompts(out, info, requests)
    return Prepared(len(requests), helm.skipped)


def execute(
    prompts_file: Path,
    model: str,
    setting: str,
    out: Path,
    *,
    keep_top: int,
    fresh: bool,
    engine_options: dict[str, Any],
    progress: LiveProgress,
) -> SettingResult:
    """Answer a file of prompts. What is answered is durable; the same call goes on where one was stopped.

    Raises:
        FlexevalError: Something that the user can mend.
    """
    from flexeval.answering import answer_all
    from flexeval.backends.native import Engine

    prompts, chosen = read_prompts(prompts_file), Setting.parse(setting)
    with progress.activity(f"preparing {model}"):
        source = resolve(model)
    with Engine.load(source, setting=chosen, **engine_options) as engine:
        if engine.text.vocabulary != prompts.info.vocabulary:
            raise ResultsError(
                f"the prompts were cut to length with the tokenizer of {prompts.info.model!r}, {model!r} has another",
                where=str(prompts_file),
                mend=f"Run flexeval prepare --model {model}",
            )
        journals = out.with_name(f".{out.name}.journal") / prompts.digest[:16]
        with output_directory(journals, kept="*.jsonl"):
            answers = answer_all(
                engine,
                source,
                chosen,
                prompts.requests,
                journals,
                keep_top=keep_top,
                fresh=fresh,
                progress=progress,
            )
    info = AnswersInfo(
        prompts=prompts.digest,
        setting=chosen.name,
        model=model,
        fingerprint=fingerprint(source),
        keep_top=keep_top,
        cost=answers.cost,
        failed=answers.failed,
        machine=describe_machine(),
        versions=describe_versions(),
        is_deterministic=engine.is_deterministic,
    )
    answered = {
        request: completion
        for request, completion in zip(prompts.requests, answers.completions, strict=True)
        if completion is not None
    }
    write_answers(out, info, list(answered), list(answered.values()))
    return answers.cost


def score(prompts_file: Path, answers_files: Sequence[Path], out: Path, *, command: str, progress: Progress) -> Done:
    """Have HELM score answers to a file of prompts, and write the report that `run` would have written.

    Raises:
        FlexevalError: A file cannot be read or does not belong to the others, or the data has changed since.
    """
    from flexeval import pipeline
    from flexeval.answering import Answers
    from flexeval.benchmark.suites import load_suite
    from flexeval.outcomes import Outcome, collect, failed_requests, failed_tasks
    from flexeval.report.write import write_report

    prompts = read_prompts(prompts_file)
    files = [read_answers(path) for path in answers_files]
    _check(prompts, prompts_file, files, answers_files)
    suite, source = load_suite(prompts.info.suite), resolve(prompts.info.model, needs_weights=False)
    outcomes: list[Outcome] = []
    with output_directory(out, kept="results.json"):
        for file in files:
            helm, requests = pipeline.ask(
                suite,
                source,
                file.info.setting,
                output=out / "helm",
                context_length=prompts.info.context_length,
                max_eval_instances=prompts.info.max_eval_instances,
                skip_missing=prompts.info.skip_missing,
                is_chat=prompts.info.is_chat,
                progress=progress,
            )
            if requests != prompts.requests:
                raise ResultsError(
                    "the suite no longer asks what the prompts ask: its file, the data or HELM has changed",
                    where=str(prompts_file),
                    mend="Prepare and execute again",
                )
            completions = [file.completions.get(request.content_hash()) for request in requests]
            every = [one for answer in completions if answer is not None for one in (answer, *answer.alternatives)]
            rows = [one.distributions for one in every if one.distributions is not None]
            answers = Answers(completions, rows, file.info.cost, file.info.failed)
            outcomes.append(
                pipeline.score(
                    helm,
                    requests,
                    answers,
                    out,
                    keep_top=file.info.keep_top,
                    vocabulary=prompts.info.vocabulary,
                    progress=progress,
                )
            )
        first = files[0].info
        results = collect(
            suite.name,
            source,
            out,
            outcomes,
            is_chat=prompts.info.is_chat,
            apart=[file.info.setting for file in files if file.info.is_deterministic],
            command=command,
            machine=first.machine,
            versions=first.versions,
            fingerprint=first.fingerprint,
        )
        results.save(out)
        with progress.activity("writing the report"):
            page = write_report(results, out)
            return pipeline.Done(results, page, failed_tasks(outcomes), failed_requests(outcomes))


def _check(prompts: Prompts, where: Path, files: Sequence[AnswersFile], paths: Sequence[Path]) -> None:
    """Raise `ResultsError` unless all answer these prompts, wholly, by one model, each under another setting."""
    asked = {request.content_hash() for request in prompts.requests}
    for file, path in zip(files, paths, strict=True):
        answered, failed = file.completions.keys(), file.info.failed.keys()
        if file.info.prompts != prompts.digest or answered | failed != asked or answered & failed:
            what = f"these answers are not to the prompts in {where}"
            raise ResultsError(what, where=str(path), mend=f"Run flexeval execute {where}")
        for request in prompts.requests:
            answer = file.completions.get(request.content_hash())
            if answer is not None and not fits(request, answer, keep_top=file.info.keep_top):
                what = f"the answer to request {request.short_hash()} is not what was asked for"
                raise ResultsError(what, where=str(path), mend=f"Run flexeval execute {where}")
        if file.info.fingerprint != files[0].info.fingerprint:
            what = f"answered by another model than {paths[0]}: {file.info.model}, not {files[0].info.model}"
            raise ResultsError(what, where=str(path), mend="Score each model in a directory of its own, then compare")
    twice = [name for name, count in Counter(file.info.setting for file in files).items() if count > 1]
    if twice:
        raise ResultsError(f"two files hold answers under {twice[0]!r}", mend="Name each setting's answers once")
