"""JSON that others wrote, read into dataclasses whose annotations it must fit. Knows types and units; no meaning.

Names say units here (`num_*`, `*_bytes`, `*_s`), so a count below zero and a duration that is no number are found too.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

_COUNT = re.compile(r"(^|\.)num_|_bytes($|\.)")
_SECONDS = re.compile(r"_s($|\.)")
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", NoneType: "null"}
_JSON_TYPES: dict[type, set[type]] = {bool: {bool}, int: {int}, float: {float, int}, str: {str}, NoneType: {NoneType}}
_SHOWN = 60
_LARGEST = 2**64
_MOST_SECONDS = 1e12


def read(kind: type[T], data: object, **given: Any) -> T:
    """A dataclass from what `dataclasses.asdict` made of it, by way of JSON.

    Args:
        kind: The dataclass; its fields are texts, numbers, enumerations, dataclasses, and lists, tuples and mappings.
        data: The JSON value.
        given: Values of fields that are read by other means; they are taken as they are.

    Raises:
        ValueError: A field is missing, unknown, or of another type.
    """
    return _dataclass(kind, data, "", given)


def show(value: object) -> str:
    """The beginning of a value, for an error."""
    text = repr(value) if isinstance(value, str | int | float | NoneType) else f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def is_amount(name: str) -> bool:
    """Whether a value of this name is never below 0: a count, bytes or seconds."""
    return bool(_COUNT.search(name) or _SECONDS.search(name))


def _dataclass(kind: type[T], data: object, where: str, given: Mapping[str, Any]) -> T:
    if not isinstance(data, dict):
        raise ValueError(f"{where or 'it'} is {show(data)}, not an object")
    wants = hints(kind, frozenset(given))  # type: ignore[arg-type]
    wanted = {field.name for field in fields(kind) if field.default is MISSING and field.default_factory is MISSING}  # type: ignore[arg-type]
    if unknown := data.keys() - wants.keys():
        raise ValueError(f"{_inside(where, min(unknown))} is unknown")
    if missing := wanted - data.keys() - given.keys():
        raise ValueError(f"{_inside(where, min(missing))} is missing")
    return kind(**{name: _value(wants[name], value, _inside(where, name)) for name, value in data.items()}, **given)


@cache
def hints(kind: type, given: frozenset[str] = frozenset()) -> dict[str, Any]:
    """The types of a dataclass's fields; those given may have annotations that only a type checker can read."""
    read = {field.name: field.type for field in fields(kind) if field.name not in given}
    return get_type_hints(type("Fields", (), {"__annotations__": read}), vars(sys.modules[kind.__module__]))


def _value(hint: Any, value: Any, where: str) -> Any:
    if hint is Any:
        return value
    if hint in _JSON_TYPES:
        _check_scalars(hint, (value,), where)
        return value
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return _one_of(inner, value, where)
    if origin in (list, tuple, Sequence):
        return (list if origin is list else tuple)(_items(inner[0], value, where))
    if origin in (dict, Mapping):
        if not isinstance(value, dict):
            raise ValueError(f"{where} is {show(value)}, not an object")
        return dict(zip(value, _items(inner[1], list(value.values()), where, value), strict=True))
    if is_dataclass(hint):
        assert isinstance(hint, type)
        return _dataclass(hint, value, where, {})
    assert issubclass(hint, Enum), hint
    try:
        return hint(value)
    except ValueError as error:
        raise ValueError(f"{where} is {show(value)}, which is none of {', '.join(hint)}") from error


def _one_of(hints: tuple[Any, ...], value: Any, where: str) -> Any:
    problems = []
    for hint in hints:
        try:
            return _value(hint, value, where)
        except ValueError as error:
            problems.append(error)
    raise next((problem for problem in problems if value is not None), problems[-1])


def _items(hint: Any, values: object, where: str, names: Sequence[str] | Mapping[str, Any] | None = None) -> list[Any]:
    """The items of a list, or of an object with these names."""
    if not isinstance(values, list):
        raise ValueError(f"{where} is {show(values)}, not a list")
    if hint in _JSON_TYPES and names is None:  # lists of tokens are long
        _check_scalars(hint, values, where)
        return values
    places = names or map(str, range(len(values)))
    return [_value(hint, value, _inside(where, name)) for name, value in zip(places, values, strict=True)]


def _check_scalars(kind: type, values: Sequence[Any], where: str) -> None:
    """Check that all are of a type, and in the range that it has here."""
    if not set(map(type, values)) <= _JSON_TYPES[kind]:
        odd = next(value for value in values if type(value) not in _JSON_TYPES[kind])
        raise ValueError(f"{where} is {show(odd)}, not {_WORDS[kind]}")
    if kind not in (int, float) or not values:
        return
    least, most = min(values), max(values)
    if not all(abs(value) < _LARGEST for value in (least, most) if isinstance(value, int)):
        raise ValueError(f"{where} is too large a number")
    if _SECONDS.search(where) and not all(abs(value) < _MOST_SECONDS for value in values):
        raise ValueError(f"{where} is no number of seconds")
    if least < 0 and is_amount(where):
        raise ValueError(f"{where} is {show(least)}, less than 0")


def _inside(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name
