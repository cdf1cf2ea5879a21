"""Errors a user can mend. Knows only how to say: what is wrong, where, and how to mend it; and what must not be said.

Anything else that goes wrong is our bug and keeps its traceback.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_LONGEST = 1000
"""Characters of what is wrong, and of where: they may quote a file that somebody else wrote."""
_SECRETS = (
    re.compile(r"(?<=://)[^\s/@]+(?=@)"),
    re.compile(r"(?<=\bhf_)[A-Za-z0-9]{20,}"),
    re.compile(r"(?<=\bsk-)[\w-]{20,}"),
    re.compile(r"(?<=[?&])((?:[\w-]*(?:token|key|secret|password|signature)[\w-]*)=)[^\s&#'\"]+", re.IGNORECASE),
)
"""Names and passwords in addresses, tokens of hubs, keys of services, and signed addresses."""


def without_secrets(text: str) -> str:
    """A text as it may be shown and kept: libraries quote addresses with all that stands in them."""
    for pattern in _SECRETS:
        text = pattern.sub(lambda found: f"{found[1] if found.lastindex else ''}***", text)
    return text


class FlexevalError(Exception):
    """A problem the user can mend; the command line prints it as one line and exits with code 2.

    docs/errors.md lists the kinds.

    Args:
        what: What is wrong, with the offending value.
        where: The file, option or field it was found in, if there is one.
        mend: What the user can do about it.
    """

    code = "error"
    """Names the kind, for scripts that read the line."""

    def __init__(self, what: str, *, where: str | None = None, mend: str | None = None):
        self.what = what
        self.where = where
        self.mend = mend
        place = f" ({_cut(where)})" if where else ""
        hint = f". {mend}" if mend else ""
        line = " ".join(without_secrets(f"{_cut(what).rstrip('. ')}{place}{hint}").splitlines())
        super().__init__(
            "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)
        )


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


class ConfigError(FlexevalError):
    """An option, suite file or setting that cannot be read."""

    code = "config"


class RequestError(FlexevalError):
    """A request that no engine could answer as asked: wrong values, or longer than the context."""

    code = "request"


class ModelError(FlexevalError):
    """A model that cannot be found, read or run."""

    code = "model"


class UnsupportedModelError(ModelError):
    """A model family that the engine would answer wrongly, and therefore refuses."""

    code = "unsupported-model"


class FailedRequestsError(ModelError):
    """Some requests of a batch have no answer, for the model's numbers are none; all others were answered."""

    code = "failed-requests"

    def __init__(self, reasons: Mapping[int, str]):
        """Say the first one's reason; `reasons` has that of every failed request, by its index."""
        self.reasons = dict(sorted(reasons.items()))
        index, reason = next(iter(self.reasons.items()))
        others = f"; {len(reasons)} requests failed in all" if len(reasons) > 1 else ""
        mend = "Compute in another type (--dtype float32)"
        super().__init__(f"{reason}{others}", where=f"request {index}", mend=mend)


class CapacityError(FlexevalError):
    """The work does not fit in the memory given.

    Args:
        what: As of every `FlexevalError`.
        where: Likewise.
        mend: Likewise.
        tier: The memory (`gpu`, `cpu`, `disk`) that was full when room in it was asked for; None where a plan says that
            it would be.
    """

    code = "capacity"

    def __init__(self, what: str, *, where: str | None = None, mend: str | None = None, tier: str | None = None):
        super().__init__(what, where=where, mend=mend)
        self.tier = tier


class DiskError(FlexevalError):
    """A disk that fails in the middle of the work."""

    code = "disk"


class DataError(FlexevalError):
    """Benchmark data that is missing or not what it should be."""

    code = "data"


class ResultsError(FlexevalError):
    """A results directory that cannot be read or compared."""

    code = "results"
