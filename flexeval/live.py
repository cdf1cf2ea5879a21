"""A run under way as a picture for a terminal and as a line for a log. Knows rich and words; counts nothing."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from flexeval.config import format_size
from flexeval.meter import Answering, TaskCount
from flexeval.report import format as show
from flexeval.status import Life, RunStatus, State

_BAR_WIDTH = 32
_MOST_TASKS = 12
"""Tasks that a picture lists; the others are counted."""
_SILENT_S = 30.0
"""A run that lives writes every two seconds; it is said if it has not for so long."""


def line(now: Answering) -> str:
    """Where answering stands, in a line."""
    parts = [f"{show.count(now.num_done)} of {show.count(now.num_requests)} requests", _sweeps(now)]
    if now.num_done == now.num_requests:
        parts[0] += f" in {show.seconds(now.elapsed_s)}"
    parts += [_speed(now)] if now.tokens_per_s else []
    parts += [_left(now)] if now.left_s else []
    return show.visible(f"{now.setting}: {', '.join(parts)}")


def picture(now: Answering) -> RenderableType:
    """Where answering stands: all of it, speed beside the plan, memory beside the plan, tasks."""
    head = Table.grid(padding=(0, 1))
    share = f"{100 * now.num_done // now.num_requests}%" if now.num_requests else ""  # 100 % is when all are done
    counts = f"{show.count(now.num_done)} of {show.count(now.num_requests)} requests, {share}"
    head.add_row(Text(show.visible(now.setting), style="bold"), _bar(now.num_done, now.num_requests), Text(counts))
    words = [show.seconds(now.elapsed_s), *([_left(now)] if now.left_s is not None else []), *_foretold(now)]
    facts = [", ".join(words), _sweeps(now), *([_speed(now)] if now.tokens_per_s else [])]
    memory = Table.grid(padding=(0, 1))
    for tier in dict.fromkeys([*now.used_bytes, *now.planned_bytes]):
        used, planned = now.used_bytes.get(tier, 0), now.planned_bytes.get(tier, 0)
        if used or planned:
            told = f"{format_size(used)} in use" + (f" of {format_size(planned)} planned" if planned else "")
            memory.add_row(Text(show.visible(tier)), _bar(used, max(planned, used)), Text(told))
    return Group(head, *(Text(fact) for fact in facts), memory, _tasks(now.tasks))


def standing(status: RunStatus, life: Life, now: datetime) -> RenderableType:
    """A run as seen from outside: who runs it and since when, what is done, where answering stands."""
    num, names = status.num_settings_done, ", ".join(status.settings)
    parts: list[RenderableType] = [
        Text(show.visible(_state(status, life, now)), style="bold"),
        Text(show.visible(f"Settings: {names}; {num} of {len(status.settings)} done")),
    ]
    if status.state is State.RUNNING and status.activity:
        steps = f", {show.count(status.num_steps_done)} of {show.count(status.num_steps)}" if status.num_steps else ""
        parts.append(Text(show.visible(f"{status.activity}{steps}")))
    if status.answering is not None and status.state is not State.DONE:
        parts.append(picture(status.answering))
    return Group(*parts)


def _state(status: RunStatus, life: Life, now: datetime) -> str:
    who = f"process {status.pid} on {status.host}, since {_clock(status.began)}"
    heard_s = _seconds_since(status.updated, now)
    heard = "" if heard_s is None else f", last heard of {_rounded(max(0.0, heard_s))} ago"
    again = "flexeval resume DIR goes on where it stopped"
    match status.state:
        case State.DONE:
            return f"Done: {who}, until {_clock(status.updated)}"
        case State.FAILED:
            return f"Failed: {status.problem} ({who}, until {_clock(status.updated)}). {again}"
        case State.INTERRUPTED:
            return f"Interrupted: {who}, until {_clock(status.updated)}. {again}"
    if life is Life.GONE:
        return f"Stopped without a word: {who}, is gone{heard}. {again}"
    if life is Life.UNKNOWN:
        return f"Running, as far as it said: {who}{heard}. From here it cannot be seen whether it lives"
    return f"Running: {who}" + (heard if heard_s is None or heard_s > _SILENT_S else "")


def _tasks(tasks: Sequence[TaskCount]) -> RenderableType:
    """The tasks under way, then those that wait, as many as fit."""
    open_tasks = [task for task in tasks if task.num_done < task.num_requests]
    shown = sorted(open_tasks, key=lambda task: task.num_done == 0)[:_MOST_TASKS]
    table = Table.grid(padding=(0, 1))
    table.add_column(overflow="ellipsis", no_wrap=True, max_width=40)
    for task in shown:
        counts = f"{show.count(task.num_done)} of {show.count(task.num_requests)}"
        table.add_row(Text(show.visible(task.name)), _bar(task.num_done, task.num_requests), Text(counts))
    rest = [f"{len(tasks) - len(open_tasks)} of {len(tasks)} tasks done"] if tasks else []
    rest += [f"{len(open_tasks) - len(shown)} more wait"] if len(open_tasks) > len(shown) else []
    return Group(table, *([Text("; ".join(rest), style="dim")] if rest else []))


def _bar(done: float, total: float) -> ProgressBar:
    return ProgressBar(total=max(1.0, total), completed=done, width=_BAR_WIDTH)


def _sweeps(now: Answering) -> str:
    words = f"{show.count(now.num_sweeps)} sweep{'s' * (now.num_sweeps != 1)} done"
    if now.num_planned_sweeps:
        words += f" of {show.count(now.num_planned_sweeps)} planned"
    return words + (f", {now.sweep_share:.0%} of the next" if now.sweep_share else "")


def _speed(now: Answering) -> str:
    assert now.tokens_per_s is not None
    words = f"{show.digits(now.tokens_per_s)} tokens/s"
    if not now.planned_tokens_per_s:
        return words
    times = show.ratio(now.tokens_per_s / now.planned_tokens_per_s)
    return f"{words}, {times} of the plan's {show.digits(now.planned_tokens_per_s)}"


def _foretold(now: Answering) -> list[str]:
    """What was said of all of it, at first and once it was measured."""
    told = [f"{show.seconds(now.foretold_s)} foretold"] if now.foretold_s else []
    return told + ([f"{show.seconds(now.corrected_s)} after the first block"] if now.corrected_s else [])


def _left(now: Answering) -> str:
    return "" if now.left_s is None else f"about {_rounded(now.left_s)} left"


def _rounded(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 60 else show.seconds(seconds)


def _clock(text: str) -> str:
    return text.replace("T", " ").replace("+00:00", " UTC")


def _seconds_since(text: str, now: datetime) -> float | None:
    try:
        then = datetime.fromisoformat(text)
    except ValueError:
        return None
    return (now - (then if then.tzinfo else then.replace(tzinfo=UTC))).total_seconds()
