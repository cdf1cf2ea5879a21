"""What lm-evaluation-harness makes of answers: filters, exact match, and the best of several choices.

Knows texts and log-likelihoods; must not know how they were asked. A stranger's regular expression gets a second.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import regex  # type: ignore[import-untyped]  # like re, with a limit of time

from flexeval.errors import ConfigError

_MAX_PATTERN = 2_000
_MAX_SECONDS = 1.0
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_DIGITS = str.maketrans("", "", string.digits)


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """One step between a generated text and its score."""

    function: str
    """`regex`, `remove_whitespace`, `lowercase` or `uppercase`."""
    pattern: str = ""
    """Of `regex`."""
    group_select: int = 0
    """Which of the pattern's matches: 0 is the first, -1 the last."""
    fallback: str = ""
    """What stands for a text without a match."""

    def check(self, where: str) -> None:
        """Raise `ConfigError` where it cannot be applied to every text."""
        if self.function == "regex":
            check_pattern(self.pattern, where)
            if self.group_select not in (0, -1):
                what = f"group_select: {self.group_select} is neither the first match (0) nor the last (-1)"
                raise ConfigError(what, where=where, mend="Write 0 or -1")

    def apply(self, text: str) -> str:
        """The text after it."""
        if self.function == "remove_whitespace":
            return text.strip()
        if self.function in ("lowercase", "uppercase"):
            return text.lower() if self.function == "lowercase" else text.upper()
        try:
            found = regex.findall(self.pattern, text, timeout=_MAX_SECONDS)
        except TimeoutError as error:
            raise _too_slow(self.pattern) from error
        if not found:
            return self.fallback
        match = found[self.group_select]
        if isinstance(match, tuple):
            match = next(filter(None, match), self.fallback)
        return str(match).strip()


class Pipeline(NamedTuple):
    """Filters in a row, under a name."""

    name: str
    filters: tuple[Filter, ...]

    def apply(self, text: str) -> str:
        """The text after all of them."""
        for one in self.filters:
            text = one.apply(text)
        return text


@dataclass(frozen=True, slots=True, kw_only=True)
class MatchOptions:
    """What `exact_match` overlooks."""

    regexes_to_ignore: tuple[str, ...] = ()
    """Removed from both texts first."""
    ignore_case: bool = False
    ignore_punctuation: bool = False
    ignore_numbers: bool = False

    def check(self, where: str) -> None:
        """Raise `ConfigError` for a pattern that is none."""
        for pattern in self.regexes_to_ignore:
            check_pattern(pattern, where)

    def is_match(self, text: str, target: str) -> bool:
        """Whether the two are equal but for that."""
        return self._plain(text) == self._plain(target)

    def _plain(self, text: str) -> str:
        for pattern in self.regexes_to_ignore:
            try:
                text = regex.sub(pattern, "", text, timeout=_MAX_SECONDS)
            except TimeoutError as error:
                raise _too_slow(pattern) from error
        text = text.lower() if self.ignore_case else text
        text = text.translate(_PUNCTUATION) if self.ignore_punctuation else text
        return text.translate(_DIGITS) if self.ignore_numbers else text


class Best(NamedTuple):
    """The most likely of some choices, by three measures."""

    acc: int
    """By log-likelihood."""
    acc_norm: int
    """By log-likelihood a character."""
    acc_bytes: int
    """By log-likelihood a byte."""


def best_choices(logprobs: Sequence[float], choices: Sequence[str]) -> Best:
    """Return the index of the best choice by each measure; the first of equals.

    Args:
        logprobs: Of each choice, summed over its tokens, in nats.
        choices: Their texts, without what stands between question and answer.
    """
    values = np.array(logprobs)
    characters = np.array([float(len(choice)) for choice in choices])
    num_bytes = np.array([float(len(choice.encode())) for choice in choices])
    return Best(*(int(np.argmax(measure)) for measure in (values, values / characters, values / num_bytes)))


def check_pattern(pattern: object, where: str) -> None:
    """Raise `ConfigError` for what is no regular expression, or a very long one."""
    reason = ""
    if not isinstance(pattern, str):
        reason = "not a text"
    elif len(pattern) > _MAX_PATTERN:
        reason = f"longer than {_MAX_PATTERN} characters"
    else:
        try:
            regex.compile(pattern)
        except (regex.error, RecursionError, OverflowError) as error:
            reason = str(error)
    if reason:
        shown = str(pattern)[:60]
        raise ConfigError(f"{shown!r} is no regular expression: {reason}", where=where, mend="Correct it")


def _too_slow(pattern: str) -> ConfigError:
    what = f"the regular expression {pattern[:60]!r} takes more than {_MAX_SECONDS:g} s on one answer"
    return ConfigError(what, mend="Write one that does not try so many ways to match")
