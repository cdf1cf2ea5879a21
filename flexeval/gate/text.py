"""A check's outcome as lines for a log and as a comment on a pull request. Knows words; judges nothing."""

from __future__ import annotations

from flexeval.gate.findings import Finding, Outcome, Status
from flexeval.report import format as show
from flexeval.report.render.markdown import plain

_LABELS = {Status.PASS: "ok", Status.REGRESSION: "FAIL", Status.OPEN: "open"}
_NAMED = 20
"""Questions that a line names."""
_LISTED = 200
"""Questions that the Markdown names for each finding."""


def lines(outcome: Outcome) -> list[str]:
    """A line a finding, then the notes and the answer."""
    return [
        *(f"{_LABELS[one.status]:<5}{_on_one_line(_sentence(one))}" for one in outcome.findings),
        *(f"note {_on_one_line(note)}" for note in outcome.notes),
        _on_one_line(headline(outcome)),
    ]


def headline(outcome: Outcome) -> str:
    """The answer in one line."""
    if num := len(outcome.regressions):
        return f"Regression: {num} of {len(outcome.findings)} comparisons show more of a fall than is tolerated."
    if undecided := outcome.undecided:
        return f"Could not decide: {undecided[0].setting}, {undecided[0].subject}: {undecided[0].why}."
    num_open = sum(finding.status is Status.OPEN for finding in outcome.findings)
    return "Passed: no regression is shown" + (
        f"; {num_open} of {len(outcome.findings)} comparisons stay open." if num_open else "."
    )


def markdown(outcome: Outcome) -> str:
    """A summary fit for a pull request: a table, and the questions that are answered worse."""
    rows = [
        f"| {_LABELS[one.status]} | {plain(show.visible(one.setting))} | {plain(show.visible(one.subject))} "
        f"| {plain(show.visible(one.now))} | {plain(show.visible(one.why))} |"
        for one in outcome.findings
    ]
    parts = [
        f"**{plain(show.visible(headline(outcome)))}**",
        "\n".join(["| | setting | what | now and before | why |", "|---|---|---|---|---|", *rows]),
    ]
    for one in outcome.regressions:
        if one.lost:
            parts.append(
                f"Answered worse, {plain(show.visible(f'{one.setting}, {one.subject}'))}: "
                f"{plain(show.visible(_names(one, _LISTED)))}"
            )
    parts += [f"Note: {plain(show.visible(note))}" for note in outcome.notes]
    return "\n\n".join(parts) + "\n"


def details(finding: Finding) -> str:
    """What a finding rests on, with the questions that are answered worse."""
    worse = f"; worse: {_names(finding, _LISTED)}" if finding.lost else ""
    return f"{finding.now}; {finding.why}{worse}"


def _sentence(one: Finding) -> str:
    worse = f". Worse: {_names(one, _NAMED)}" if one.status is Status.REGRESSION and one.lost else ""
    return f"{one.setting}, {one.subject}: {one.now}; {one.why}{worse}"


def _on_one_line(text: str) -> str:
    return " ".join(show.visible(text).split())


def _names(finding: Finding, most: int) -> str:
    more = f" and {len(finding.lost) - most} more" if len(finding.lost) > most else ""
    return ", ".join(finding.lost[:most]) + more
