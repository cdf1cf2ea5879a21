"""Questions as lm-evaluation-harness 0.4.13 writes them: description, examples, question. Knows texts alone.

Follows `ConfigurableTask.fewshot_context`, `build_qa_turn` and `process_results` of its `api/task.py`.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flexeval.benchmark.lm_eval.render import render
from flexeval.benchmark.lm_eval.rows import Rows
from flexeval.benchmark.lm_eval.sampler import Sampler
from flexeval.benchmark.lm_eval.task import Form, Spec, Task
from flexeval.errors import ConfigError

_MAX_CHARACTERS = 1 << 30
"""Of all contexts."""
_Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One row, ready to be asked."""

    context: str
    """All that stands before the answer; where the choices are contexts themselves, what they share."""
    choices: tuple[str, ...]
    """The choices, without the delimiter before them; none where an answer is generated."""
    continuations: tuple[str, ...]
    """What follows the context for each of them."""
    num_context: tuple[int, ...]
    """How many characters of both together are context, not scored."""
    gold: tuple[int, ...]
    """Which choices are right: any of them will do; none where the row does not say."""
    targets: tuple[str, ...]
    """Texts of which a generated answer should equal one."""


def build_questions(task: Task, rows: Rows, *, limit: int | None = None) -> list[Question]:
    """Return the questions of a task in the order of its rows, the first `limit` of them.

    Raises:
        ConfigError: A template fails, a row does not make a question, or there are fewer examples than asked for.
    """
    found, columns = rows.questions()
    asked = [dict(found[index]) for index in range(min(len(found), limit or len(found)))]
    if not asked:
        raise ConfigError("the split has no rows", where=task.where, mend="Name another one")
    written = _Written(task, task.form, asked, columns)
    blocks = _example_blocks(task, rows, asked, columns)
    is_multiple, has_inputs = isinstance(written.targets[0], list), isinstance(written.texts[0], int)
    is_choice = task.output_type == "multiple_choice"
    questions, num_characters = [], 0
    for index in range(len(asked)):
        where = f"row {index} of {task.where}"
        text, prefix, delimiter = written.texts[index], written.prefixes[index], task.form.target_delimiter
        choices, target = written.choices[index], written.targets[index]
        if is_multiple != isinstance(target, list) or has_inputs != isinstance(text, int):
            raise ConfigError(
                "a row is of another kind than the first: lists, or numbers", where=where, mend="Correct it"
            )
        context = written.descriptions[index] + "".join(blocks[index])
        if isinstance(text, int):  # each choice is an input of its own, behind which the target is scored
            if not is_choice or not isinstance(target, str):
                raise ConfigError(f"doc_to_text gives the number {text}", where=where, mend="Leave the task out")
            before, after, gold = [choice + prefix for choice in choices], [delimiter + target] * len(choices), text
        else:
            context += text + (delimiter if prefix and _needs_delimiter(text, prefix) else "") + prefix
            before, after, gold = [""] * len(choices), [delimiter + choice for choice in choices], target
        num_characters += len(context)
        _check_text(context, choices, num_characters, where)
        if is_choice and not all(context + one for one in before):
            raise ConfigError(
                "there is nothing before the choices", where=where, mend="A context is needed to score them"
            )
        questions.append(
            Question(
                context=context,
                choices=choices if is_choice else (),
                continuations=tuple(map(str.__add__, before, after)) if is_choice else (),
                num_context=tuple(len(context) + len(one) for one in before) if is_choice else (),
                gold=_gold(gold, choices, where) if is_choice else (),
                targets=() if is_choice else _accepted(target, choices, where),
            )
        )
    return questions


class _Written:
    """The parts of some rows, written out in a form."""

    def __init__(self, task: Task, form: Form, rows: _Rows, columns: Sequence[str]):
        specs: dict[str, Spec] = {
            "text": form.text,
            "target": form.target,
            "choice": form.choice,
            "prefix": form.gen_prefix,
            "description": task.description or None,
        }
        has_choice = task.form.choice is not None
        templates = {key: spec for key, spec in specs.items() if isinstance(spec, str) and spec and spec not in columns}
        texts = render(list(templates.values()), rows, where=task.where)
        rendered = dict(zip(templates, texts, strict=True))

        def values(key: str) -> list[Any]:
            spec = specs[key]
            if key in rendered:
                return list(rendered[key])
            if callable(spec):
                return [spec(dict(row)) for row in rows]
            if isinstance(spec, str) and spec:
                return [_column(row, spec, task) for row in rows]
            return [spec] * len(rows)

        self.texts = [_text(value, has_choice and "text" in rendered, task) for value in values("text")]
        self.targets = [_target(value, has_choice) if "target" in rendered else value for value in values("target")]
        self.choices = [_choices(value, "choice" in rendered, task) for value in values("choice")]
        self.prefixes = [_string(value, "gen_prefix", task) for value in values("prefix")]
        self.descriptions = [_string(value, "description", task) for value in values("description")]


def _example_blocks(task: Task, rows: Rows, asked: _Rows, columns: Sequence[str]) -> list[list[str]]:
    """The examples before each question, written out."""
    if not task.num_fewshot:
        return [[] for _ in asked]
    pool = rows.examples()
    is_own_split = task.examples.split == task.splits["test"]
    sampler = Sampler(task, pool)
    drawn = [sampler.draw(row if is_own_split else None) for row in asked]
    used = sorted({index for indices in drawn for index in indices})
    form = task.examples.form
    written = _Written(task, form, [dict(pool[index]) for index in used], columns)
    blocks = {
        index: _example(form, text, choices if form.choice is not None else (), target, prefix, task)
        for index, text, choices, target, prefix in zip(
            used, written.texts, written.choices, written.targets, written.prefixes, strict=True
        )
    }
    return [[blocks[index] for index in indices] for indices in drawn]


def _example(form: Form, text: str | int, choices: tuple[str, ...], target: Any, prefix: str, task: Task) -> str:
    """An example with its answer: the two turns of `build_qa_turn` as text."""
    if isinstance(text, int):
        if not 0 <= text < len(choices):
            raise ConfigError(f"an example is choice {text} of {len(choices)}", where=task.where, mend="Correct it")
        text, choices = choices[text], ()
    is_index = bool(choices) and isinstance(target, int)
    if is_index and not -len(choices) <= target < len(choices):
        raise ConfigError(
            f"an example's answer is choice {target} of {len(choices)}", where=task.where, mend="Correct it"
        )
    answer = choices[target] if is_index else target[0] if isinstance(target, list) and target else target
    if not isinstance(answer, str):
        raise ConfigError(
            f"an example's answer {answer!r} is not a text", where=task.where, mend="Correct doc_to_target"
        )
    if not answer:
        between = form.target_delimiter if prefix and _needs_delimiter(text, prefix) else ""
        return text + between + prefix
    between = form.target_delimiter if not prefix or _needs_delimiter(text, prefix) else ""
    space = " " if prefix and not (prefix[-1].isspace() or answer[0].isspace()) else ""
    return text + between + prefix + space + answer + form.fewshot_delimiter


def _check_text(context: str, choices: tuple[str, ...], num_characters: int, where: str) -> None:
    """Raise `ConfigError` for what UTF-8 cannot write, and for gigabytes."""
    if num_characters > _MAX_CHARACTERS:
        raise ConfigError("the prompts are gigabytes", where=where, mend="Set a limit, or ask for fewer examples")
    if any("\ud800" <= char <= "\udfff" for text in (context, *choices) if not text.isascii() for char in text):
        raise ConfigError("half of a surrogate pair, which is no text", where=where, mend="Correct the row")


def _needs_delimiter(before: str, after: str) -> bool:
    return bool(before) and not (before[-1].isspace() or after[0].isspace())


def _column(row: Mapping[str, Any], name: str, task: Task) -> Any:
    if name not in row:
        raise ConfigError(f"a row has no column {name!r}", where=task.where, mend="Correct the row")
    return row[name]


def _string(value: Any, key: str, task: Task) -> str:
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"{key} is {value!r}, not a text", where=task.where, mend="Correct the row")
    return value or ""


def _text(value: Any, may_be_index: bool, task: Task) -> str | int:
    """The question; or the index of the right choice, where each choice is a question."""
    if may_be_index and isinstance(value, str) and value.isdecimal():
        return int(value)
    if not isinstance(value, str | int):
        raise ConfigError(f"doc_to_text gives {str(value)[:40]!r}", where=task.where, mend="Correct it or the row")
    return value


def _target(text: str, has_choice: bool) -> Any:
    """What a template's text means: an index of a choice, a list, or itself."""
    is_list = len(text) >= 2 and text[0] == "[" and text[-1] == "]"
    if (has_choice and text.isdigit()) or is_list:
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return text
    return text


def _choices(value: Any, is_rendered: bool, task: Task) -> tuple[str, ...]:
    if value is None:
        return ()
    if is_rendered:
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            value = None
    value = list(value.values()) if isinstance(value, dict) else value
    if not isinstance(value, list | tuple) or not value or not all(isinstance(one, str) and one for one in value):
        raise ConfigError("doc_to_choice does not give a list of texts", where=task.where, mend="Correct it or the row")
    return tuple(value)


def _gold(target: Any, choices: tuple[str, ...], where: str) -> tuple[int, ...]:
    """The right choices; an index or a text that is none of them is nobody's."""
    if isinstance(target, str):
        return (choices.index(target),) if target in choices else ()
    indices = target if isinstance(target, list) else [target]
    if not all(isinstance(index, int) for index in indices):
        raise ConfigError(f"the target {target!r} is no choice", where=where, mend="Give its index or its text")
    return tuple(sorted({int(index) for index in indices if 0 <= index < len(choices)}))


def _accepted(target: Any, choices: tuple[str, ...], where: str) -> tuple[str, ...]:
    """The texts that a generated answer is compared with."""
    if choices:
        if not isinstance(target, int) or not -len(choices) <= target < len(choices):
            raise ConfigError(f"the target {target!r} is the index of no choice", where=where, mend="Correct the row")
        return (choices[target],)
    if isinstance(target, list):
        if not target or not all(isinstance(one, str) for one in target):
            raise ConfigError(f"the target {target!r} is no list of texts", where=where, mend="Correct the row")
        return tuple(target)
    return (str(target),)
