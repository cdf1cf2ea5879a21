"""Where the labels of crowded marks go. Knows rectangles on a canvas; not what a mark stands for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

LINE_HEIGHT = 15
MARK_SIZE = 7
"""Half of the side of the square that a mark takes."""
_CHARACTER_WIDTH = 8.8
_GAPS = (11, 26, 48, 74, 104)
"""How far beside its mark a label may begin."""
_FARTHEST = 9
"""Lines that a label may stand above or below its mark."""
_ROUNDS = 4


class Box(NamedTuple):
    """A rectangle on the canvas."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: Box) -> bool:
        """Whether the two have more than an edge in common."""
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )


class Line(NamedTuple):
    """A straight line from a mark to its label."""

    x1: float
    y1: float
    x2: float
    y2: float

    def crosses(self, box: Box) -> bool:
        """Whether it touches a rectangle, at a dozen of its points."""
        return any(
            box.left <= self.x1 + share * (self.x2 - self.x1) <= box.right
            and box.top <= self.y1 + share * (self.y2 - self.y1) <= box.bottom
            for share in (step / 12 for step in range(13))
        )


def leader(place: tuple[float, float], box: Box) -> Line | None:
    """The line from a mark to its label; None where the label stands right beside it."""
    x, y = place
    end = box.left - 2 if box.left > x else box.right + 2
    middle = (box.top + box.bottom) / 2
    if abs(end - x) <= _GAPS[0] and abs(middle - y) < LINE_HEIGHT / 2:
        return None
    return Line(x, y, end, middle)


def place_labels(
    places: Sequence[tuple[float, float]], names: Sequence[str], bars: Sequence[Box], room: Box
) -> list[Box]:
    """A place for each mark's label: near it, on the canvas, over no mark or other label, and over few bars.

    Each label in turn takes the best place beside the others', some times over, since the first ones do not know
    where the last ones will want to stand.

    Args:
        places: The marks' centres.
        names: Their labels.
        bars: What is better not written over.
        room: Where labels may stand.
    """
    marks = [Box(x - MARK_SIZE, y - MARK_SIZE, x + MARK_SIZE, y + MARK_SIZE) for x, y in places]
    options = [_candidates(place, name, room) for place, name in zip(places, names, strict=True)]
    boxes: dict[int, Box] = {}
    for _ in range(_ROUNDS):
        before = dict(boxes)
        for index, place in enumerate(places):
            others = [box for other, box in boxes.items() if other != index]
            lines = [
                line
                for other, box in boxes.items()
                if other != index and (line := leader(places[other], box)) is not None
            ]
            boxes[index] = _best(options[index], partial(_penalty, place, [*marks, *others], lines, bars))
        if boxes == before:
            break
    return [boxes[index] for index in range(len(places))]


def _candidates(place: tuple[float, float], name: str, room: Box) -> list[tuple[float, Box]]:
    """Places with their distances, nearest first: those in the room, or all where there are none."""
    x, y = place
    width = len(name) * _CHARACTER_WIDTH
    boxes = [
        Box(left, middle - LINE_HEIGHT / 2, left + width, middle + LINE_HEIGHT / 2)
        for rise in range(-_FARTHEST, _FARTHEST + 1)
        for middle in [y + rise * LINE_HEIGHT]
        for gap in _GAPS
        for left in (x + gap, x - gap - width)
    ]
    near = sorted((_distance(place, box), box) for box in boxes)
    inside = [
        (far, box)
        for far, box in near
        if box.left >= room.left and box.right <= room.right and box.top >= room.top and box.bottom <= room.bottom
    ]
    return inside or near


def _best(options: Sequence[tuple[float, Box]], penalty: Callable[[Box], float]) -> Box:
    """The option whose distance and penalty are least together; options come nearest first."""
    least, best = math.inf, options[0][1]
    for far, box in options:
        if far >= least:
            break
        if (cost := far + penalty(box)) < least:
            least, best = cost, box
    return best


def _distance(place: tuple[float, float], box: Box) -> float:
    x, y = place
    return min(abs(box.left - x), abs(box.right - x)) + abs((box.top + box.bottom) / 2 - y)


def _penalty(
    place: tuple[float, float], taken: Sequence[Box], lines: Sequence[Line], bars: Sequence[Box], box: Box
) -> float:
    """How bad a place is beside its distance: what is unreadable first, then what confuses."""
    unreadable = sum(box.overlaps(one) for one in taken)
    crossed = sum(one.crosses(box) for one in lines)
    if (line := leader(place, box)) is not None:
        crossed += sum(line.crosses(one) for one in taken) - 1  # it begins in its own mark
    return 10_000 * unreadable + 400 * crossed + 60 * sum(box.overlaps(bar) for bar in bars)
