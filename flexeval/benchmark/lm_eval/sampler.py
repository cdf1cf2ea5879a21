"""Which examples stand before which question, by lm-evaluation-harness's own draws. Knows no templates.

Follows `ContextSampler` and `FirstNSampler` of its `api/samplers.py`: random numbers run on from question to question.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from flexeval.benchmark.lm_eval.task import Task
from flexeval.errors import ConfigError

SEED = 1234
"""lm-evaluation-harness's own."""


class Sampler:
    """Draws examples for one question after the other; gives their places in the pool."""

    def __init__(self, task: Task, pool: Sequence[Mapping[str, Any]]):
        self._task, self._pool = task, pool
        self._random = Random(SEED)
        self._plain: list[dict[str, Any]] | None = None

    def draw(self, asked: Mapping[str, Any] | None) -> list[int]:
        """The examples of a question; `asked` is its row where it may be among the examples.

        Raises:
            ConfigError: There are not so many.
        """
        num = self._task.num_fewshot
        num_drawn = num if asked is None else num + 1
        if self._task.examples.sampler == "first_n":
            return self._enough(self._others(range(len(self._pool)), asked) if asked else range(len(self._pool)))[:num]
        if num_drawn > len(self._pool):
            raise self._too_few()
        found = self._random.sample(range(len(self._pool)), num_drawn)
        if asked is None:
            return found
        found = self._others(found, asked)[:num]
        if len(found) < num:  # the pool holds the question several times
            found = self._random.sample(self._enough(self._others(range(len(self._pool)), asked)), num)
        return found

    def _others(self, indices: Sequence[int], asked: Mapping[str, Any]) -> list[int]:
        if self._plain is None:
            self._plain = [dict(row) for row in self._pool]
        return [index for index in indices if self._plain[index] != asked]

    def _enough(self, indices: Sequence[int]) -> list[int]:
        if len(indices) < self._task.num_fewshot:
            raise self._too_few()
        return list(indices)

    def _too_few(self) -> ConfigError:
        what = f"num_fewshot={self._task.num_fewshot}, but there are {len(self._pool)} rows to draw examples from"
        return ConfigError(what, where=self._task.where, mend="Ask for fewer, beside the question itself")
