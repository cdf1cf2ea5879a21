"""The keys of a task file, taken one by one with their types. Must not know what any of them means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from flexeval.benchmark.lm_eval.files import Function
from flexeval.benchmark.lm_eval.functions import is_allowed, load_function
from flexeval.errors import ConfigError

FUNCTIONS = ("process_docs", "doc_to_text", "doc_to_target", "doc_to_choice", "samples")
"""Keys that may name a function, where the user lets code run."""


class Keys:
    """A mapping from which keys are taken one by one; what is left over is refused."""

    def __init__(self, keys: Mapping[str, Any], where: str):
        self.left = dict(keys)
        """Those that were not taken yet."""
        self.where = where
        """For messages."""

    def refuse(self, what: str, mend: str = "Leave the task out, or correct its file") -> ConfigError:
        """The error that names what is wrong."""
        return ConfigError(what, where=self.where, mend=mend)

    def take(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """The value of a key, of the right type; None stands for its absence."""
        value = self.left.pop(key, None)
        if value is None:
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise self.refuse(f"{key}: {short(value)} is not {' or '.join(one.__name__ for one in kinds)}")
        return value

    def refuse_functions(self) -> None:
        """Raise for Python that would not be run in any case, or may not be."""
        for key, value in self.left.items():
            inner = value if isinstance(value, dict) and key == "fewshot_config" else {key: value}
            for name, one in inner.items():
                function, may_be_one = _function_in(one), name in FUNCTIONS and isinstance(one, Function)
                if function and not (may_be_one and is_allowed()):
                    if may_be_one:
                        load_function(function, where=f"{name} of {self.where}")  # names the way to allow it
                    mend = "Leave the task out"
                    raise self.refuse(f"{name}: !function {function.name} is Python, which is not run there", mend)

    def function(self, key: str, default: Any = None) -> Any:
        """A function, or nothing."""
        value = self.left.pop(key, None)
        if isinstance(value, Function):
            return load_function(value, where=f"{key} of {self.where}")
        if value is not None:
            raise self.refuse(f"{key}: {short(value)} is not a !function")
        return default

    def spec(self, key: str, kind: type | tuple[type, ...], default: Any) -> Any:
        """A function, or a value of the right type."""
        return self.function(key) if isinstance(self.left.get(key), Function) else self.take(key, kind, default)

    def below(self, key: str) -> Self:
        """The mapping under a key."""
        return type(self)(self.take(key, dict, {}), f"{key} of {self.where}")

    def end(self) -> None:
        """Refuse what nobody took."""
        for key in self.left:
            raise self.refuse(f"the key {key!r} is not supported")


def _function_in(value: Any) -> Function | None:
    """The first function in a value, however deep."""
    if isinstance(value, Function):
        return value
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((found for one in inner if (found := _function_in(one))), None)


def short(value: Any) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
