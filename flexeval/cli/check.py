"""`flexeval check`: options, what is printed, and the exit code. Nothing is imported before it is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flexeval.errors import ConfigError, FlexevalError


def check(
    directories: Annotated[
        list[Path],
        typer.Argument(metavar="DIR", help="What `flexeval run` wrote; further ones repeat it, for their speed."),
    ],
    baseline: Annotated[Path, typer.Option(metavar="FILE.json", help="The run to hold it against.")],
    update: Annotated[bool, typer.Option("--update", help="Write the baseline instead.")] = False,
    setting: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Check this one. Repeatable.", show_default="all of the baseline's"),
    ] = None,
    tolerance: Annotated[
        float,
        typer.Option(
            metavar="POINTS", min=0, max=100, help="Drop that is accepted, of 100; on another scale, percent."
        ),
    ] = 1.0,
    speed_tolerance: Annotated[
        float, typer.Option(metavar="PERCENT", min=0, max=99, help="Fall of a ratio of speed that is accepted.")
    ] = 20.0,
    bench: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Speeds that `flexeval bench --repeat 3 --out` wrote.")
    ] = None,
    any_model: Annotated[bool, typer.Option("--any-model", help="Compare with a baseline of another model.")] = False,
    any_machine: Annotated[bool, typer.Option("--any-machine", help="Judge speeds of another machine too.")] = False,
    shared_only: Annotated[
        bool, typer.Option("--shared-only", help="Leave out questions that only one of the two has.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 2 where a drop overall is neither shown nor ruled out.")
    ] = False,
    junit: Annotated[Path | None, typer.Option(metavar="FILE.xml", help="Write the findings as JUnit XML.")] = None,
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE.md", help="Write a summary for a pull request.")
    ] = None,
) -> None:
    """Say whether a run is worse than a baseline: exit code 0 no, 1 yes, 2 could not decide.

    It fails only on a drop that is shown, question by question, to be beyond the tolerance.
    """
    from flexeval.files import write_text
    from flexeval.gate.baseline import Baseline
    from flexeval.gate.check import CheckOptions, read_run
    from flexeval.gate.check import check as check_run
    from flexeval.gate.junit import junit as as_junit
    from flexeval.gate.junit import junit_error
    from flexeval.gate.text import lines
    from flexeval.gate.text import markdown as as_markdown

    if update:
        for option, value in {"--junit": junit, "--markdown": markdown}.items():
            if value is not None:
                raise ConfigError("nothing is checked with --update", where=option, mend="Leave one of the two out")
        kept = read_run(directories, bench)
        kept.save(baseline)
        counts = {"question": kept.num_questions, "task": len(kept.tasks), "setting": len(kept.settings)}
        if kept.speeds:
            counts["speed"] = len(kept.speeds)
        words = [f"{num:,} {name}{'s' * (num != 1)}" for name, num in counts.items()]
        speeds = "" if kept.speeds else "; no speed, which takes three repeats"
        typer.echo(f"Baseline: {baseline} ({', '.join(words)}{speeds})")
        return
    options = CheckOptions(
        settings=tuple(setting or ()),
        tolerance=tolerance / 100,
        speed_tolerance=speed_tolerance / 100,
        any_model=any_model,
        any_machine=any_machine,
        shared_only=shared_only,
        is_strict=strict,
    )
    try:
        outcome = check_run(Baseline.load(baseline), read_run(directories, bench), options)
    except FlexevalError as error:
        if junit is not None:
            write_text(junit, junit_error(str(error)))
        raise
    for line in lines(outcome):
        typer.echo(line)
    if junit is not None:
        write_text(junit, as_junit(outcome))
    if markdown is not None:
        write_text(markdown, as_markdown(outcome))
    raise typer.Exit(outcome.exit_code)
