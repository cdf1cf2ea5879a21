"""The JSON Schema of what a dataclass is written as: for readers in other languages. Knows types, no meaning.

The draft is 2020-12 (https://json-schema.org/draft/2020-12/schema). What is valid by it, `typed.read` takes.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from flexeval import typed

DRAFT = "https://json-schema.org/draft/2020-12/schema"
_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", NoneType: "null"}
Schema = dict[str, Any]


def json_schema(kind: type, title: str) -> Schema:
    """The schema of a dataclass as `dataclasses.asdict` and JSON give it, with its docstrings as descriptions.

    Args:
        kind: The dataclass; `typed.read` says what its fields may be.
        title: What a file of it is called.
    """
    known: dict[str, Schema] = {}
    _define(kind, known)
    return {"$schema": DRAFT, "title": title, **known.pop(kind.__name__), "$defs": known}


def _define(kind: type, known: dict[str, Schema]) -> Schema:
    """A reference to a dataclass, which becomes known with all that it holds."""
    if kind.__name__ not in known:
        known[kind.__name__] = {}  # holds its place, before those it is made of
        told = _docstrings(kind)
        hints = typed.hints(kind)
        known[kind.__name__] = {
            "type": "object",
            "description": inspect.getdoc(kind),
            "properties": {
                name: _schema(hint, name, known) | {"description": told[name]} for name, hint in hints.items()
            },
            "required": [one.name for one in fields(kind) if one.default is one.default_factory is MISSING],
            "additionalProperties": False,
        }
    return {"$ref": f"#/$defs/{kind.__name__}"}


def _schema(hint: Any, name: str, known: dict[str, Schema]) -> Schema:
    if hint is Any:
        return {}
    if hint in _TYPES:
        least = {"minimum": 0} if hint in (int, float) and typed.is_amount(name) else {}
        return {"type": _TYPES[hint]} | least
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return {"anyOf": [_schema(one, name, known) for one in inner]}
    if origin in (list, tuple, Sequence):
        return {"type": "array", "items": _schema(inner[0], name, known)}
    if origin in (dict, Mapping):
        return {"type": "object", "additionalProperties": _schema(inner[1], name, known)}
    if is_dataclass(hint):
        assert isinstance(hint, type)
        return _define(hint, known)
    assert issubclass(hint, Enum), hint
    return {"enum": [str(one.value) for one in hint]}


def _docstrings(kind: type) -> dict[str, str]:
    """What stands below each field."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    return {
        field.target.id: inspect.cleandoc(text.value.value)
        for field, text in zip(body.body, body.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }
