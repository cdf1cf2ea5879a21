"""A forecast on a terminal. Knows rich; computes no figure."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flexeval.config import format_size
from flexeval.forecast.forecast import Forecast
from flexeval.policy.policy import KINDS
from flexeval.policy.telling import tell_policy
from flexeval.report import format as show

_BAR = 12
"""Characters of a full tier."""
_LANES = {
    "compute": "computing",
    "to_gpu": "the link to the GPU",
    "from_gpu": "the link from the GPU",
    "disk_read": "reading from disk",
    "disk_write": "writing to disk",
    "host_attention": "attention on the CPU",
}
_DEVICES = {"gpu": "GPU memory", "cpu": "host memory", "disk": "disk"}


def print_forecasts(title: str, forecasts: Sequence[Forecast], console: Console) -> None:
    """Print, for each setting, what is computed, where everything rests, how long it takes and what would help."""
    console.print(Text(title, style="bold"))
    for forecast in forecasts:
        console.print(Text(f"\n{forecast.setting}: {forecast.summary}"))
        console.print(_tiers(forecast), _tasks(forecast))
        console.print(Text(_time(forecast), style="bold"))
        console.print(Text(_advice(forecast)))
        console.print(Text(f"Policy: {tell_policy(forecast.policy)}", style="dim"))


def _tiers(forecast: Forecast) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=show.NARROW)
    table.add_column("tier", no_wrap=True)
    for name in ("weights", "KV", "hidden\nstates", "peak", "usable"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for tier, resting in forecast.resting_bytes.items():
        peak, usable = forecast.peak_bytes[tier], forecast.usable_bytes[tier]
        full = min(_BAR, round(_BAR * peak / usable))
        table.add_row(
            tier,
            *(format_size(resting[kind]) if resting[kind] else show.NOTHING for kind in KINDS),
            format_size(peak),
            format_size(usable),
            "\N{FULL BLOCK}" * full + "\N{LIGHT SHADE}" * (_BAR - full),
        )
    return table


def _tasks(forecast: Forecast) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=show.NARROW)
    table.add_column("task", overflow="ellipsis", max_width=38)
    for name in ("asked", "prompt\ntokens", "com-\nputed", "gene-\nrated", "time", "per\nsecond"):
        table.add_column(name, justify="right", no_wrap=True)
    for task, part in forecast.tasks.items():
        table.add_row(
            show.visible(task),
            show.count(part.num_requests),
            show.count(part.num_prompt_tokens),
            show.count(part.num_computed_tokens),
            show.count(part.num_generated_tokens),
            show.seconds(part.elapsed_s),
            show.digits(part.num_requests / part.elapsed_s) if part.elapsed_s else show.NOTHING,
        )
    return table


def _time(forecast: Forecast) -> str:
    phases = ", ".join(
        f"{phase} {show.seconds(seconds)} (bound by {_LANES[forecast.bound_by[phase]]})"
        for phase, seconds in forecast.phase_s.items()
    )
    return f"About {show.seconds(forecast.elapsed_s)} without loading the weights: {phases}"


def _advice(forecast: Forecast) -> str:
    if not forecast.is_offloaded:
        home = next(iter(forecast.resting_bytes))
        return f"All of it fits in {_DEVICES[home]}: nothing needs to be offloaded."
    if not forecast.gains:
        return "One GiB more of any tier would save next to nothing."
    return "One GiB more would save: " + ", ".join(
        f"{_DEVICES[tier]} {show.seconds(saved)} ({saved / forecast.elapsed_s:.0%})"
        for tier, saved in forecast.gains.items()
    )
