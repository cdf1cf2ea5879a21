"""The report's first page on a terminal. Knows rich; computes no statistic."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flexeval.config import format_size
from flexeval.report import format as show
from flexeval.report.answer import answer
from flexeval.report.compare import compare
from flexeval.report.fidelity import perplexity_ratio
from flexeval.report.scored_through import scored_through
from flexeval.report.tables import Comparison, SettingRow
from flexeval.report.verdict import scale, verdicts
from flexeval.results import RunResults

_NARROW: dict[str, Any] = {"box": SIMPLE_HEAD, "collapse_padding": True, "pad_edge": False}
"""Looks of a table of which all columns fit on 80 characters."""


def print_table(results: RunResults, console: Console | None = None) -> None:
    """Print a row per setting, caveats and the answer.

    Raises:
        ResultsError: The settings cannot be compared question by question.
    """
    comparison = compare(results)
    console = console or Console()
    console.print(_table(comparison))
    if any(row.fidelity for row in comparison.settings):
        console.print(_closeness(comparison))
    if sentence := scored_through(row.result.setting for row in comparison.settings):
        console.print(Text(show.visible(sentence)))
    not_run = [f"{len(results.skipped)} of the suite's tasks not run"] if results.skipped else []
    for note in (*comparison.notes, *not_run):
        console.print(Text(f"Caveat: {show.visible(note)}", style="yellow"))
    first, *rest = answer(comparison)
    console.print(Text(show.visible(first), style="bold"))
    for sentence in rest:
        console.print(Text(show.visible(sentence)))
    for one in verdicts(comparison):
        if one.unseen:
            console.print(Text(show.visible(f"{one.setting}: {one.unseen}"), style="dim"))


def _table(comparison: Comparison) -> Table:
    several = len(comparison.settings) > 1
    per, unit = show.rate_unit([row.questions_per_s for row in comparison.settings if row.questions_per_s])
    result = Table(**_NARROW, title=Text(show.visible(f"{comparison.results.name}: {comparison.results.model}")))
    result.add_column("setting")
    speeds = f"questions/{unit}\ntokens/s\ntime"
    names = [_quality_name(comparison), *(["difference", "p"] if several else []), speeds, "peak memory"]
    for name in names:
        result.add_column(Text(name), justify="right", no_wrap=name == speeds)
    for row in comparison.settings:
        cells = [_quality(comparison, row), *(_difference(comparison, row) if several else []), *_cost(row, per)]
        result.add_row(Text(show.visible(row.result.setting)), *cells)
    return result


def _closeness(comparison: Comparison) -> Table:
    base = comparison.settings[comparison.baseline].result.setting
    result = Table(**_NARROW)
    result.add_column(Text(show.visible(f"against\n{base}")))
    for name in (
        "KL diver-\ngence, nats",
        "same top\ntoken, %",
        "to wrong /\nto right",
        "perplexity\nratio",
        "probability\nof right token",
    ):
        result.add_column(name, justify="right", no_wrap=True)
    for row in comparison.settings:
        if one := row.fidelity:
            ratio, change = perplexity_ratio(one), one.probability_change
            cells = [
                show.with_error(one.kl, one.kl_error),
                show.percent(one.same_top, one.same_top_error),
                f"{row.flips.num_to_wrong} / {row.flips.num_to_right}" if row.flips else show.NOTHING,
                show.with_error(*ratio) if ratio else show.NOTHING,
                show.NOTHING if change is None else show.percent(change, one.probability_change_error) + " %",
            ]
            lines = [cell.replace(" \N{PLUS-MINUS SIGN}", "\n\N{PLUS-MINUS SIGN}") for cell in cells]
            result.add_row(Text(show.visible(row.result.setting)), *lines)
    return result


def _quality_name(comparison: Comparison) -> str:
    if comparison.in_points or not comparison.averaged:
        return "quality"
    return "\n".join(["quality", *show.visible(scale(comparison)).replace("_", " ").split(", ")])


def _quality(comparison: Comparison, row: SettingRow) -> str:
    if row.quality is None:
        return show.NOTHING
    bounds = show.interval(row.quality, in_points=comparison.in_points)
    return f"{show.score(row.quality.value, in_points=comparison.in_points)}\n{bounds}"


def _difference(comparison: Comparison, row: SettingRow) -> list[str]:
    if row.difference is None:
        return [show.NOTHING, show.NOTHING]
    estimate = row.difference.estimate
    bounds = show.interval(estimate, in_points=comparison.in_points, signed=True)
    value = show.change(estimate.value, in_points=comparison.in_points)
    return [f"{value}\n{bounds}", show.p_value(row.difference.corrected_p).removeprefix("p ").removeprefix("= ")]


def _cost(row: SettingRow, per: int) -> list[str]:
    speeds = [row.questions_per_s * per if row.questions_per_s else None, row.tokens_per_s]
    lines = [show.digits(speed) if speed else show.NOTHING for speed in speeds]
    memory = [f"{tier} {format_size(num_bytes)}" for tier, num_bytes in row.result.peak_bytes.items() if num_bytes]
    if row.energy_per_question_j is not None:
        memory.append(f"{show.digits(row.energy_per_question_j)} J a question")
    return ["\n".join([*lines, show.seconds(row.engine_s)]), show.visible("\n".join(memory) or show.NOTHING)]
