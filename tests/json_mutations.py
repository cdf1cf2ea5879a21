"""JSON values with something wrong in one place, as somebody might have written them by mistake or on purpose."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

ODD: list[Any] = [
    None,
    True,
    0,
    -1,
    1.5,
    2**31,
    2**70,
    float("nan"),
    float("-inf"),
    1e308,
    "",
    "..",
    "../../x",
    "/etc/passwd",
    "a\0b",
    "x" * 5000,
    "\ud800",
    "\x1b[31m\n",
    [],
    [None],
    [[]],
    ["x"],
    {},
    {"x": 1},
    {"num_x": -1},
]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a JSON value, itself included."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def changed(value: Any, path: tuple[Any, ...], change: str, odd: Any) -> Any:
    """The value with another one at `path`, or without it, or with a key that nobody knows."""
    if not path:
        return odd
    result = copy.deepcopy(value)
    parent = result
    for key in path[:-1]:
        parent = parent[key]
    if change == "drop":
        del parent[path[-1]]
    elif change == "add" and isinstance(parent, dict):
        parent["unknown"] = odd
    elif change == "double" and isinstance(parent, list):
        parent.append(copy.deepcopy(parent[path[-1]]))
    else:
        parent[path[-1]] = odd
    return result


def mutations(value: Any) -> st.SearchStrategy[Any]:
    """The value, changed in one place."""
    kinds = st.sampled_from(["replace", "replace", "replace", "drop", "add", "double"])
    return st.builds(changed, st.just(value), st.sampled_from(list(places(value))), kinds, st.sampled_from(ODD))


def damaged(whole: bytes) -> st.SearchStrategy[bytes]:
    """A file's bytes with some of them changed, left out or put in, or cut short."""
    place = st.integers(0, len(whole) - 1)

    def damage(start: int, num: int, new: bytes) -> bytes:
        return whole[:start] + new + whole[start + num :]

    return st.one_of(
        st.builds(lambda at, bit: damage(at, 1, bytes([whole[at] ^ (1 << bit)])), place, st.integers(0, 7)),
        st.builds(damage, place, st.integers(0, 16), st.binary(max_size=16)),
        st.builds(lambda at: whole[:at], place),
    )
