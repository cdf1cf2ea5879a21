"""Which tasks the overall quality is a mean of, and how much each counts. Knows no score and no setting."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Protocol, TypeVar

from flexeval.results import TaskInfo


class Measured(Protocol):
    """A task, and the scale of its scores."""

    @property
    def task(self) -> TaskInfo:
        """What the task is."""

    @property
    def in_points(self) -> bool:
        """Whether scores lie in [0, 1] and more is better."""


M = TypeVar("M", bound=Measured)


def averaged_tasks(tasks: Sequence[M]) -> list[M]:
    """Tasks on a common scale: those in points, or else all of them if they share one metric."""
    in_points = [one for one in tasks if one.in_points]
    one_metric = len({(one.task.metric, one.task.higher_is_better) for one in tasks}) == 1
    return in_points or (list(tasks) if one_metric else [])


def task_weights(averaged: Sequence[Measured]) -> list[float]:
    """The weight of each task in a mean over groups of the mean over the group's tasks; they add up to 1."""
    sizes = Counter(one.task.group for one in averaged)
    return [1 / (len(sizes) * sizes[one.task.group]) for one in averaged]
