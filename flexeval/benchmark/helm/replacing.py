"""Functions of other modules, replaced for a while by whatever name a module knows them. Knows modules; not why."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

Function = Callable[..., Any]


@contextmanager
def replaced(*pairs: tuple[Function, Function]) -> Iterator[None]:
    """Put the second of each pair in the place of the first, wherever a module holds it, until the block ends.

    Modules that are imported meanwhile take the new one with them: so it is looked for again at the end.
    """
    placed = [(old, _of_its_own(new)) for old, new in pairs]
    for old, new in placed:
        _replace_everywhere(old, new)
    try:
        yield
    finally:
        for old, new in placed:
            _replace_everywhere(new, old)


def _of_its_own(function: Function) -> Function:
    """A function that is found nowhere yet: the one given stays where it is at home."""

    @wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        return function(*arguments, **options)

    return call


def _replace_everywhere(old: Function, new: Function) -> None:
    for module in list(sys.modules.values()):
        for name in [name for name, value in list(getattr(module, "__dict__", {}).items()) if value is old]:
            setattr(module, name, new)
