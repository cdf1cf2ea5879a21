"""Requests answered by our engine, each answer durable in a journal, and what they cost. Knows no benchmark."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from flexeval import typed
from flexeval.backends.backend import Usage, add_up
from flexeval.backends.native import Engine
from flexeval.config import Setting
from flexeval.distributions import Rows
from flexeval.environment import describe_versions
from flexeval.errors import FailedRequestsError
from flexeval.journal import Journal
from flexeval.live import line, picture
from flexeval.meter import Meter
from flexeval.models import ModelSource, fingerprint
from flexeval.progress import LiveProgress, View
from flexeval.request import Completion, Request
from flexeval.results import SettingResult


class Answers(NamedTuple):
    """What became of requests under one setting."""

    completions: list[Completion | None]
    """In the order of the requests; None for one that failed."""
    rows: list[Rows]
    """What they hold probable, if that was to be kept."""
    cost: SettingResult
    """Over all sessions that gave them."""
    failed: dict[str, str]
    """Why some have no answer, by `Request.content_hash` of what was asked; the next run asks them again."""


def answer_all(
    engine: Engine,
    source: ModelSource,
    setting: Setting,
    requests: Sequence[Request],
    folder: Path,
    *,
    keep_top: int,
    fresh: bool,
    progress: LiveProgress,
    tasks: Mapping[str, Sequence[Request]] = MappingProxyType({}),
) -> Answers:
    """Answer what an earlier run has not, into a journal in `folder`.

    Args:
        engine: Loaded with the model and the setting.
        source: The model.
        setting: The setting.
        requests: What is asked, each once.
        folder: Of journals, one for each model, setting and arithmetic.
        keep_top: Most probable tokens to keep at each position.
        fresh: Forget what earlier runs have answered.
        progress: Told how far it is.
        tasks: Whose requests they are, to be told apart as they are answered.
    """
    asked = [replace(request, keep_top=keep_top) for request in requests]
    with Journal(folder / f"{setting.name}-{_journal_key(source, engine)}.jsonl", fresh=fresh) as journal:
        waiting = [place for place, request in enumerate(asked) if not journal.has_answer(request)]
        num_resumed = len(asked) - len(waiting)
        if num_resumed:
            progress.say(f"{setting.name}: {num_resumed} of {len(asked)} were answered by an earlier run")
        meter = Meter(
            setting.name,
            [request.max_tokens for request in asked],
            _places_of_tasks(requests, tasks),
            resumed=set(range(len(asked))) - set(waiting),
            read_gauge=engine.gauge,
        )
        reasons = _answer(engine, asked, waiting, journal, setting, meter, progress) if waiting else {}
        completions = [None if place in reasons else journal[request] for place, request in enumerate(asked)]
        cost = _cost(engine, setting, [one for one in completions if one is not None], journal, num_resumed)
        told = {requests[place].content_hash(): reason for place, reason in reasons.items()}
        return Answers(completions, journal.rows(keep_top), replace(cost, num_failed=len(reasons)), told)


def _answer(
    engine: Engine,
    asked: Sequence[Request],
    places: Sequence[int],
    journal: Journal,
    setting: Setting,
    meter: Meter,
    progress: LiveProgress,
) -> dict[int, str]:
    """Answer the requests at some places into the journal: each sweep's answers are durable before the next begins.

    Returns:
        Why some have no answer, by their place. Raises `FailedRequestsError` where none has one, those of earlier runs
        included, or the engine has given up.
    """
    requests = [asked[place] for place in places]
    with progress.activity(f"{setting.name}: preparing layers") as update:
        plan = engine.place(requests, on_layer=update)
    progress.say(f"{setting.name}: {plan}")
    if not engine.is_offloaded:
        progress.say(f"{setting.name}: all of it fits where it is computed: nothing needs to be offloaded")
    is_any_done = False

    def keep(answers: Sequence[tuple[int, Completion]]) -> None:
        nonlocal is_any_done
        journal.add((requests[index], completion) for index, completion in answers)
        meter.finish((places[index], completion.num_generated_tokens) for index, completion in answers)
        is_any_done = True

    try:
        with progress.watch(View(meter.read, picture, line)):
            engine.generate(requests, on_completions=keep)
    except FailedRequestsError as error:
        num_answered = sum(journal.has_answer(request) for request in asked)
        if not num_answered or num_answered + len(error.reasons) < len(asked):
            raise
        progress.say(f"{setting.name}: {len(error.reasons)} of {len(requests)} requests failed: {error}")
        return {places[index]: reason for index, reason in error.reasons.items()}
    finally:
        if is_any_done:
            journal.add_usage(asdict(engine.usage()))
    return {}


def _places_of_tasks(requests: Sequence[Request], tasks: Mapping[str, Sequence[Request]]) -> dict[str, list[int]]:
    """By task, the places of its different requests."""
    places = {request: place for place, request in enumerate(requests)}
    return {name: [places[request] for request in dict.fromkeys(of_task)] for name, of_task in tasks.items()}


def _cost(
    engine: Engine, setting: Setting, completions: Sequence[Completion], journal: Journal, num_resumed: int
) -> SettingResult:
    """What the answers have cost, over all sessions that gave them."""
    sessions = [found for usage in journal.usages if (found := _usage(usage))]
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
        predicted_s=total.predicted_s if len(sessions) == 1 and total.predicted_s else None,
        corrected_s=total.corrected_s if len(sessions) == 1 and total.corrected_s else None,
        planned_bytes=total.planned_bytes,
        energy_j=total.energy_j,
        num_resumed=num_resumed,
        splits=total.splits,
        lost_s=total.lost_s,
        moves=total.moves,
    )


def _usage(data: dict[str, Any]) -> Usage | None:
    """What a session has noted of itself; None where somebody has damaged it."""
    with suppress(ValueError):
        return typed.read(Usage, data)
    return None


def _journal_key(source: ModelSource, engine: Engine) -> str:
    """Names everything beside request and setting that an answer depends on."""
    facts = [fingerprint(source), engine.dtype, describe_versions(), *["deterministic"] * engine.is_deterministic]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
