"""HELM-style evaluation of language models that do not fit the GPU.

Importing this package is instant: the names below load their modules on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexeval.backends.native import Engine
    from flexeval.report.frames import load_results
    from flexeval.request import Completion, Request

__version__ = "0.1.0"
__all__ = ["Completion", "Engine", "Request", "load_results"]

_HOME = {
    "Completion": "flexeval.request",
    "Engine": "flexeval.backends.native",
    "Request": "flexeval.request",
    "load_results": "flexeval.report.frames",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'flexeval' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
