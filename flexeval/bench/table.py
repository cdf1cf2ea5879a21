"""A benchmark's figures on a terminal. Knows rich; computes no figure."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flexeval.bench.figures import BenchResults, SpeedupFigures, SystemFigures, WholeFigures
from flexeval.config import format_size
from flexeval.report import format as show

_NOTES = (
    "Prefill counts computed prompt tokens over the sweeps that compute any; decode is the mean sweep that computes "
    "none; gen. tok/s are generated tokens over prefill and decode together. Ratios count every prompt token asked.",
    "A lane's utilization is its busy share of the phase. A bound is what crossed a resource at its measured rate "
    "(compute: matrix products, or the weights read once a sweep from the device's memory); reached is the highest "
    "bound over the seconds taken. A GPU at its power limit multiplies a few percent faster than products alone, where "
    "other work lets it rest.",
)


def print_bench(results: BenchResults, console: Console) -> None:
    """Print who was how fast, then where the engine's time went."""
    console.print(Text(f"{results.model}: {results.work}", style="bold"))
    if results.chosen:
        console.print(Text(f"Number of requests chosen: {results.chosen}."))
    console.print(_systems(results))
    for system in results.systems:
        if system.splits:
            split = f"memory ran out, and work went on with {'; '.join(system.splits)}"
            console.print(Text(f"{_name(system)}: {split}", style="yellow"))
    ours = [system for system in results.systems if system.phases["prefill"].lanes]
    for system in ours:
        console.print(Text(f"{_name(system)}: {_tokens(system)}"))
        if system.scale:
            console.print(Text(f"{_name(system)}: {_scale(system)}"))
    for system in ours:
        console.print(Text(f"{_name(system)}: {_phases(system)}"))
        console.print(_lanes(system), _bounds(system))
    for system in results.systems:
        if system.whole is not None:
            console.print(Text(f"{_name(system)}: {_part(system, system.whole)}"))
        for line in _comparison(system):
            console.print(Text(line, style="bold"))
    for peer, why in results.skipped.items():
        console.print(Text(f"{peer} was not measured: {show.visible(why)}", style="yellow"))
    for note in _NOTES:
        console.print(Text(note, style="dim"))


def _systems(results: BenchResults) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("system", no_wrap=True)
    for name in ("batch", "prefill\ntok/s", "decode\ns/sweep", "gen.\ntok/s", "requests\n/s", "peak\nmemory"):
        table.add_column(name, justify="right", no_wrap=True)
    for system in results.systems:
        table.add_row(
            _name(system),
            show.count(system.batch_size),
            show.digits(system.prefill_tokens_per_s),
            _or_nothing(system.decode_s_per_sweep),
            _of_all(system, system.generated_tokens_per_s),
            _of_all(system, system.requests_per_s),
            _memory(system),
        )
    return table


def _memory(system: SystemFigures) -> str:
    """Tiers, where the system knows them; else the whole process, libraries included."""
    hidden = "process" if "cpu" in system.peak_bytes else ""
    sizes = {name: format_size(size) for name, size in system.peak_bytes.items() if size and name != hidden}
    return "\n".join(f"{'host' if name == 'process' else name} {size}" for name, size in sizes.items())


def _lanes(system: SystemFigures) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("phase", no_wrap=True)
    table.add_column("lane", no_wrap=True)
    for name in ("moved", "rate", "busy", "utilized"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, phase in system.phases.items():
        for index, (lane, figures) in enumerate(phase.lanes.items()):
            rate = figures.num_bytes / figures.busy_s if figures.busy_s and figures.num_bytes else None
            table.add_row(
                name if index == 0 else "",
                lane,
                format_size(figures.num_bytes) if figures.num_bytes else show.NOTHING,
                f"{format_size(rate)}/s" if rate else show.NOTHING,
                show.seconds(figures.busy_s),
                f"{figures.utilization:.0%}",
            )
    return table


def _bounds(system: SystemFigures) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=show.NARROW)
    table.add_column("phase", no_wrap=True)
    table.add_column("resource", no_wrap=True)
    for name in ("crossed", "at most", "bound", "predicted", "reached"):
        table.add_column(name, justify="right")
    for name, phase in system.phases.items():
        for index, (resource, figures) in enumerate(phase.bounds.items()):
            is_bytes = resource != "compute"
            crossed = format_size(figures.amount) if is_bytes else f"{figures.amount / 1e12:.3g} TFLOP"
            rate = f"{format_size(figures.per_s)}/s" if is_bytes else f"{figures.per_s / 1e12:.3g} TFLOP/s"
            is_highest = resource == phase.bound and phase.reached is not None
            table.add_row(
                name if index == 0 else "",
                resource,
                crossed,
                rate,
                show.seconds(figures.bound_s),
                show.seconds(figures.predicted_s),
                f"{phase.reached:.0%}" if is_highest else "",
            )
    return table


def _phases(system: SystemFigures) -> str:
    return ", ".join(
        f"{name} {show.count(phase.num_sweeps)} sweep{'s' if phase.num_sweeps > 1 else ''} in "
        f"{show.seconds(phase.elapsed_s)}"
        for name, phase in system.phases.items()
    )


def _tokens(system: SystemFigures) -> str:
    tokens = system.tokens
    saved = (
        f"{show.count(tokens.num_duplicate)} are of equal prompts, {show.count(tokens.num_shared)} of shared "
        f"beginnings, {show.count(tokens.num_last)} only scored"
    )
    predicted = "" if system.predicted_s is None else f", {show.seconds(system.predicted_s)} predicted"
    return (
        f"{show.count(tokens.num_asked)} prompt tokens asked, {show.count(tokens.num_computed)} computed ({saved}); "
        f"{show.count(tokens.num_generated)} generated in {show.seconds(system.elapsed_s)}{predicted}"
    )


def _scale(system: SystemFigures) -> str:
    points = ", ".join(
        f"{show.count(point.num_requests)} requests {show.seconds(point.s_per_request)} each" for point in system.scale
    )
    return f"{points}: seconds grow with requests to the power {system.exponent:.2f}"


def _part(system: SystemFigures, whole: WholeFigures) -> str:
    """What an estimate rests on."""
    words = (
        f"{show.count(system.num_requests)} of {show.count(whole.num_requests)} requests asked, "
        f"{show.count(system.tokens.num_generated)} of {show.count(whole.num_generated)} tokens generated; "
        f"~ is all of them at its seconds a prompt token and a generated token: {show.seconds(whole.elapsed_s)}"
    )
    if system.batch_size < whole.batch_size:
        words += f". {show.count(whole.batch_size)} fit a batch and would be quicker: raise --peer-requests"
    return words


def _comparison(system: SystemFigures) -> list[str]:
    return [
        f"flexeval {setting} answers {_estimate(system)}{show.ratio(speedup.requests)} the requests a second of "
        f"{_name(system)}: {_by_token(speedup)}"
        + (f" ({system.same_answers:.0%} of the answers are equal)" if system.same_answers is not None else "")
        for setting, speedup in system.speedups.items()
    ]


def _by_token(speedup: SpeedupFigures) -> str:
    words = f"prompt tokens {show.ratio(speedup.prompt_tokens)}"
    if speedup.decode_tokens is not None:
        words += f", tokens after a first one {show.ratio(speedup.decode_tokens)}"
    return words


def _estimate(system: SystemFigures) -> str:
    """What stands before a figure that was not measured but follows from others."""
    return "" if system.whole is None else "~"


def _of_all(system: SystemFigures, value: float | None) -> str:
    return _or_nothing(value) if value is None else _estimate(system) + show.digits(value)


def _name(system: SystemFigures) -> str:
    return f"{system.system} {system.setting}" if system.phases["prefill"].lanes else system.system


def _or_nothing(value: float | None) -> str:
    return show.NOTHING if value is None else show.digits(value)
