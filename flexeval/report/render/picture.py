"""The picture of quality against speed as a file of its own, for a README or a slide. Knows SVG; computes nothing."""

from __future__ import annotations

from flexeval.report.render import chart
from flexeval.report.render.environment import environment, source
from flexeval.report.tables import Comparison

_ALONE = """
.chart, .chart .label { font-size: 13px; }
.chart { width: auto; max-width: none; font-family: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
.ground { fill: var(--ground); }
"""
"""What the page's style leaves to its body."""


def picture(comparison: Comparison) -> str | None:
    """The picture as SVG, light or dark as its reader is; None where fewer than two settings have both."""
    drawn = chart.trade_off(comparison)
    if drawn is None:
        return None
    return (
        environment().get_template("chart.svg").render(chart=drawn, canvas=chart, alone=source("report.css") + _ALONE)
    )
