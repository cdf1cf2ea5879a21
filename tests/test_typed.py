"""JSON becomes dataclasses, or is refused with the place and what is wrong there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

import pytest

from flexeval.files import parse_json
from flexeval.typed import read, show


class Colour(StrEnum):
    RED = "red"


@dataclass(frozen=True, kw_only=True)
class Inner:
    num_cells: int
    width: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner
    colour: Colour
    either: str | tuple[int, ...]
    least: int | None
    many: list[Inner] = field(default_factory=list)
    sizes: tuple[Mapping[str, float], ...] = ()
    peak_bytes: dict[str, int] = field(default_factory=dict)
    elapsed_s: float = 0.0
    anything: Any = None
    is_new: bool = False


WHOLE = Outer(
    inner=Inner(num_cells=2),
    colour=Colour.RED,
    either=(1, 2),
    least=None,
    many=[Inner(num_cells=0, width=-3)],
    sizes=({"a": 1.5, "b": 2},),
    peak_bytes={"cpu": 3},
    elapsed_s=2,
    anything={"x": [None]},
)
JSON = asdict(WHOLE) | {"either": [1, 2], "sizes": [{"a": 1.5, "b": 2}], "colour": "red"}


def test_what_was_written_comes_back() -> None:
    found = read(Outer, JSON)
    assert found == WHOLE
    assert type(found.elapsed_s) is int, "numbers stay as they are: hashes are over them"
    assert read(Outer, JSON | {"either": "text", "least": -4}).either == "text"
    assert read(Inner, {}, num_cells="given") == Inner(num_cells="given")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"inner": {}}, r"^inner\.num_cells is missing$"),
        ({"inner": {"num_cells": 1, "y": 2}}, r"^inner\.y is unknown$"),
        ({"inner": [1]}, r"^inner is a list, not an object$"),
        ({"inner": {"num_cells": True}}, r"^inner\.num_cells is True, not a whole number$"),
        ({"inner": {"num_cells": 1.0}}, r"not a whole number"),
        ({"inner": {"num_cells": -1}}, r"^inner\.num_cells is -1, less than 0$"),
        ({"inner": {"num_cells": 2**64}}, r"too large"),
        ({"colour": "blue"}, r"^colour is 'blue', which is none of red$"),
        ({"colour": ["red"]}, r"^colour is a list"),
        ({"either": [1, "2"]}, r"^either is '2', not a whole number$|not a text$"),
        ({"either": None}, r"^either is None"),
        ({"least": "x"}, r"^least is 'x', not a whole number$"),
        ({"many": [{"num_cells": 1}, None]}, r"^many\.1 is None, not an object$"),
        ({"sizes": [{"a": "x"}]}, r"^sizes\.0\.a is 'x', not a number$"),
        ({"peak_bytes": {"cpu": -1}}, r"^peak_bytes\.cpu is -1, less than 0$"),
        ({"elapsed_s": float("nan")}, r"^elapsed_s is no number of seconds$"),
        ({"elapsed_s": -0.5}, r"^elapsed_s is -0\.5, less than 0$"),
        ({"is_new": 1}, r"^is_new is 1, not true or false$"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        read(Outer, JSON | changes)


def test_errors_are_short_and_nesting_has_an_end() -> None:
    assert show("x" * 1000) == "'" + "x" * 59 + "..."
    assert show({"x": 1}) == "a dict"
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json("[" * 100_000)
