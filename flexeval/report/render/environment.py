"""The templates' surroundings: where they lie, what they may call, how values become text. Knows no page."""

from __future__ import annotations

import json
import math
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from flexeval.config import format_size
from flexeval.report import format as show
from flexeval.report.fidelity import perplexity_ratio
from flexeval.report.statistics import Estimate


def environment() -> Environment:
    """An environment for texts that others wrote.

    Every value has its control characters written out and, in HTML and SVG, is escaped; a name that does not exist is
    an error.
    """
    result = Environment(
        loader=PackageLoader("flexeval.report.render", "templates"),
        autoescape=select_autoescape(("html", "svg")),
        undefined=StrictUndefined,
        finalize=_harmless,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    result.filters.update(
        score=_score,
        change=_change,
        interval=_interval,
        p_value=show.p_value,
        with_error=show.with_error,
        percent=show.percent,
        perplexity_ratio=perplexity_ratio,
        exp=_exp,
        digits=show.digits,
        count=show.count,
        ratio=show.ratio,
        seconds=show.seconds,
        size=format_size,
        pretty=_pretty,
    )
    return result


def source(name: str) -> str:
    """The text of a file beside the templates, as it is."""
    env = environment()
    assert env.loader is not None
    return env.loader.get_source(env, name)[0]


def _harmless(value: Any) -> Any:
    is_markup = hasattr(value, "__html__")  # made by a macro or marked `safe` in a template, not data
    return show.visible(value) if isinstance(value, str) and not is_markup else value


def _score(value: float, in_points: bool) -> str:
    return show.score(value, in_points=in_points)


def _change(value: float, in_points: bool) -> str:
    return show.change(value, in_points=in_points)


def _interval(estimate: Estimate, in_points: bool, signed: bool = False) -> str:
    return show.interval(estimate, in_points=in_points, signed=signed)


def _exp(value: float) -> float:
    """The exponential, or infinity."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False)
