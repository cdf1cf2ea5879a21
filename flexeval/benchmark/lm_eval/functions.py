"""Python beside task files (`!function utils.process_docs`), for whoever allows it. Knows modules; not what they do.

Consent comes from the environment alone: a suite or a file of prompts may be a stranger's as well.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from flexeval.benchmark.lm_eval.files import Function
from flexeval.benchmark.resources import import_file
from flexeval.errors import ConfigError

CONSENT = "FLEXEVAL_ALLOW_TASK_CODE"
"""Set to 1, code from task files is run."""


def is_allowed() -> bool:
    """Whether the user lets code from task files run."""
    return os.environ.get(CONSENT) == "1"


def load_function(function: Function, *, where: str) -> Callable[..., Any]:
    """Return a function of a module that lies beside the task's file; its errors become `ConfigError`.

    Raises:
        ConfigError: Code is not allowed to run, or there is no such function.
    """
    if not is_allowed():
        mend = f"Write a template, leave the task out, or set {CONSENT}=1 if you trust {function.folder}"
        raise ConfigError(f"!function {function.name} is Python, which is not run", where=where, mend=mend)
    stem, _, name = function.name.rpartition(".")
    found = getattr(_module(function, stem, where), name, None)
    if not callable(found):
        raise ConfigError(f"there is no function {function.name}", where=where, mend="Correct the task's file")

    def call(*arguments: Any) -> Any:
        try:
            return found(*arguments)
        except Exception as error:
            what = f"{function.name} fails: {type(error).__name__}: {error}"
            raise ConfigError(what, where=where, mend=f"Correct it in {function.folder}") from error

    return call


def _module(function: Function, stem: str, where: str) -> ModuleType:
    path = (function.folder / f"{stem.replace('.', '/')}.py").resolve()
    name = f"flexeval_lm_eval_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    if not stem or not path.is_file():
        mend = f"Put {stem or 'a module'} beside the task's file"
        raise ConfigError(f"there is no {path} with {function.name}", where=where, mend=mend)
    return import_file(path, name)
