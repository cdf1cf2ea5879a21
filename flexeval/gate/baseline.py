"""What is kept of a run to hold later ones against: a small file in Git whose diff shows which questions flipped.

Knows scores, and hashes of questions. Must not know how a run is judged.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from flexeval import typed
from flexeval.errors import ResultsError
from flexeval.files import read_json, write_text
from flexeval.report.pairing import Question, pair
from flexeval.results import RunResults, TaskInfo

SCHEMA_VERSION = 1
_LARGEST_BYTES = 64 * 2**20
_DIGITS = 6
"""Of a score: beyond them lies rounding."""
_LARGEST_SCORE = 1e100
_MACHINE = ("processor", "cores", "gpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptQuestion:
    """One question."""

    asked: str
    """Hash of its prompts and correct answers."""
    scores: list[float]
    """Under each setting, in their order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptTask:
    """One task."""

    task: TaskInfo
    """What it is."""
    questions: dict[str, KeptQuestion]
    """By their ids."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """How many times as fast a setting is as something measured in the same job."""

    setting: str
    """Name of the setting."""
    against: str
    """Another setting, a peer, `prediction`, or `bound`, as `throughput.py` has them."""
    work: str
    """What was asked of both, in words."""
    ratios: list[float]
    """Of every repeat; above 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """A run, as far as later ones are held against it."""

    suite: str
    """Name of the suite."""
    model: str
    """The model as the user named it."""
    model_note: str
    """What one should know about the weights and prompts."""
    created: str
    """ISO 8601, UTC."""
    machine: dict[str, str]
    """Processor, cores and GPU, in words."""
    versions: dict[str, str]
    """Of the software."""
    settings: list[str]
    """Names of the settings."""
    tasks: list[KeptTask]
    """In the suite's order."""
    speeds: list[Speed] = field(default_factory=list)
    """Ratios of throughput."""
    fingerprint: str = ""
    """Hash of the model's files, as the results have it; empty where it was not kept."""
    schema_version: int = SCHEMA_VERSION
    """Version of this layout."""

    @property
    def num_questions(self) -> int:
        """Questions of all tasks."""
        return sum(len(task.questions) for task in self.tasks)

    def save(self, path: Path) -> None:
        """Write a line a question, whole or not at all."""
        write_text(path, "\n".join(self._lines()) + "\n")

    def _lines(self) -> Iterator[str]:
        yield "{"
        names = ("schema_version", "suite", "model", "model_note", "fingerprint", "created")
        for name in (*names, "machine", "versions", "settings"):
            yield f" {_json(name)}: {_json(getattr(self, name))},"
        yield ' "speeds": ['
        yield from _separated(f"  {_json(asdict(speed))}" for speed in self.speeds)
        yield " ],"
        yield ' "tasks": ['
        yield from _separated(_task_lines(kept) for kept in self.tasks)
        yield " ]"
        yield "}"

    @classmethod
    def load(cls, path: Path) -> Baseline:
        """Read a baseline. Raises `ResultsError`."""
        if not path.is_file():
            raise ResultsError("no baseline here", where=str(path), mend="Write one: flexeval check DIR --update")
        mend = "Write it again: flexeval check DIR --update"
        try:
            if path.stat().st_size > _LARGEST_BYTES:
                raise ValueError(f"it is larger than {_LARGEST_BYTES // 2**20} MiB")
            data = read_json(path)
            if isinstance(data, dict) and data.get("schema_version") != SCHEMA_VERSION:
                raise ValueError(
                    f"layout version {typed.show(data.get('schema_version'))}, this flexeval reads {SCHEMA_VERSION}"
                )
            return _checked(typed.read(cls, data))
        except (ValueError, OSError) as error:
            raise ResultsError(f"not a baseline: {error}", where=str(path), mend=mend) from error


def keep(results: RunResults, speeds: Sequence[Speed] = ()) -> Baseline:
    """What to keep of a run: the questions that were asked under all of its settings.

    Raises:
        ResultsError: There are none, one was answered twice, or a score is no number.
    """
    kept: dict[str, dict[str, KeptQuestion]] = {task.name: {} for task in results.tasks}
    for question in sorted(pair(results).questions, key=lambda one: (len(one.instance_id), one.instance_id)):
        scores = [rounded(answer.score) for answer in question.answers]
        kept[question.task][question.instance_id] = KeptQuestion(asked=_asked(question), scores=scores)
    baseline = Baseline(
        suite=results.suite,
        model=results.model,
        model_note=results.model_note,
        created=results.created,
        machine={name: results.machine[name] for name in _MACHINE if name in results.machine},
        versions=dict(results.versions),
        fingerprint=results.fingerprint,
        settings=[setting.setting for setting in results.settings],
        tasks=[KeptTask(task=task, questions=kept[task.name]) for task in results.tasks if kept[task.name]],
        speeds=[replace(speed, ratios=[rounded(ratio, 4) for ratio in speed.ratios]) for speed in speeds],
    )
    try:
        return _checked(baseline)
    except ValueError as error:
        raise ResultsError(f"no run to check: {error}", where=results.name, mend="Run the suite again") from error


def rounded(value: float, digits: int = _DIGITS) -> float:
    """A number with so many significant digits; a whole one as such, for it is shorter."""
    number = float(f"{value:.{digits}g}")
    return int(number) if number in (0, 1) else number


def _asked(question: Question) -> str:
    texts = list(dict.fromkeys(answer.prompt for answer in question.answers))
    return hashlib.sha256(json.dumps([*texts, question.answers[0].reference]).encode()).hexdigest()[:12]


def _checked(baseline: Baseline) -> Baseline:
    """The baseline, unless a value is none that was ever written. Raises `ValueError`."""
    names = [kept.task.name for kept in baseline.tasks]
    for what, values in {"setting": baseline.settings, "task": names}.items():
        if not values or len(set(values)) < len(values):
            raise ValueError(f"a {what} is there twice" if values else f"it holds no {what}")
    for kept in baseline.tasks:
        if not kept.questions:
            raise ValueError(f"task {typed.show(kept.task.name)} has no question")
        for name, question in kept.questions.items():
            if len(question.scores) != len(baseline.settings) or not all(
                abs(score) < _LARGEST_SCORE for score in question.scores
            ):
                raise ValueError(
                    f"question {typed.show(name)} of {typed.show(kept.task.name)} has not one score a setting"
                )
    for speed in baseline.speeds:
        if not speed.ratios or not all(0 < ratio < math.inf for ratio in speed.ratios):
            raise ValueError(f"the speed of {typed.show(speed.setting)} is no ratio")
    return baseline


def _task_lines(kept: KeptTask) -> str:
    questions = _separated(f"   {_json(name)}: {_json(asdict(one))}" for name, one in kept.questions.items())
    return "\n".join([f'  {{"task": {_json(asdict(kept.task))}, "questions": {{', *questions, "  }}"])


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _separated(lines: Iterable[str]) -> Iterator[str]:
    """Lines with a comma behind each but the last."""
    whole = list(lines)
    yield from (f"{line}," for line in whole[:-1])
    yield from whole[-1:]
