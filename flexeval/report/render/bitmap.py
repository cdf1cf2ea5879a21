"""The picture of quality against speed as PNG, for where no SVG is shown. Knows pixels; computes nothing.

Pillow draws it from the same geometry, colours and shapes as the SVG, so it takes neither a browser nor a network.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageColor, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from flexeval.report import format as show
from flexeval.report.render import chart
from flexeval.report.render.environment import environment, source
from flexeval.report.tables import Comparison

SCALE = 2
"""Pixels of a unit of the canvas."""
_FINER = 2
"""Drawn so many times as large and then shrunk, which smooths edges."""
_UNIT = SCALE * _FINER
_FONTS = {False: "DejaVuSans.ttf", True: "DejaVuSans-Bold.ttf"}
_FONT_SIZE = 13
_FADED = 0.55
_COLOR = re.compile(r"--(\w+): *(#[0-9a-fA-F]{3,6})")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_DASH = (5.0, 4.0)
_PLAINER = str.maketrans({"\N{MINUS SIGN}": "-", "\N{HORIZONTAL ELLIPSIS}": "~"})
Point = tuple[float, float]


def bitmap(comparison: Comparison) -> bytes | None:
    """The picture as PNG, light; None where fewer than two settings have both quality and speed."""
    drawn = chart.trade_off(comparison)
    if drawn is None:
        return None
    canvas = _Canvas()
    _axes(canvas, drawn)
    for one, two in zip(drawn.front, drawn.front[1:], strict=False):
        canvas.dashed(one, two, "quiet", 1.5)
    for mark in drawn.marks:
        if mark.leader:
            canvas.line([(mark.x, mark.y), mark.leader], "quiet", 1)
    for mark in drawn.marks:
        if mark.ends:
            low, high = mark.ends
            for path in (
                [(mark.x, low), (mark.x, high)],
                [(mark.x - 5, low), (mark.x + 5, low)],
                [(mark.x - 5, high), (mark.x + 5, high)],
            ):
                canvas.line(path, f"s{mark.series % 7}", 2, faded=True)
    for mark in drawn.marks:
        canvas.shape((mark.x, mark.y), mark.series)
    for mark in drawn.marks:
        x, anchor = (mark.box.left, "ls") if mark.anchor == "start" else (mark.box.right, "rs")
        canvas.text((x, mark.box.bottom - 3), mark.label, anchor, bold=True)
    return canvas.png(f"{drawn.y_label} against {drawn.x_label}")


def _axes(canvas: _Canvas, drawn: chart.Chart) -> None:
    for tick in drawn.y_ticks:
        canvas.line([(chart.LEFT, tick.position), (chart.RIGHT, tick.position)], "rule", 1)
        canvas.text((chart.LEFT - 8, tick.position), tick.text, "rm")
    for tick in drawn.x_ticks:
        canvas.line([(tick.position, chart.TOP), (tick.position, chart.BOTTOM)], "rule", 1)
        canvas.text((tick.position, chart.BOTTOM + 17), tick.text, "ms")
    canvas.text(((chart.LEFT + chart.RIGHT) / 2, chart.HEIGHT - 6), drawn.x_label, "ms")
    canvas.upright_text((13, (chart.TOP + chart.BOTTOM) / 2), drawn.y_label)


class _Canvas:
    """Draws in the units of the chart."""

    def __init__(self) -> None:
        self._colors = dict(_COLOR.findall(source("report.css").partition("@media")[0]))
        self._shapes: Sequence[str] = vars(environment().get_template("macros.html").module)["shapes"]
        self._image = Image.new("RGB", (chart.WIDTH * _UNIT, chart.HEIGHT * _UNIT), self._colors["ground"])
        self._draw = ImageDraw.Draw(self._image)

    def line(self, points: Sequence[Point], color: str, width: float, *, faded: bool = False) -> None:
        """A line through points."""
        ink = _between(self._colors["ground"], self._colors[color], _FADED) if faded else self._colors[color]
        self._draw.line([(x * _UNIT, y * _UNIT) for x, y in points], ink, round(width * _UNIT), joint="curve")

    def dashed(self, start: Point, end: Point, color: str, width: float) -> None:
        """A dashed line."""
        length = math.dist(start, end)
        at = 0.0
        while at < length:
            ends = [
                tuple(a + (b - a) * share / length for a, b in zip(start, end, strict=True))
                for share in (at, min(at + _DASH[0], length))
            ]
            self.line([(x, y) for x, y in ends], color, width)
            at += sum(_DASH)

    def shape(self, place: Point, series: int) -> None:
        """The mark of a setting."""
        path, color = self._shapes[series % len(self._shapes)], self._colors[f"s{series % 7}"]
        numbers = [float(number) for number in _NUMBER.findall(path)]
        points = list(zip(numbers[::2], numbers[1::2], strict=True))
        if "a" in path:  # the circle, from its left end on
            radius = -points[0][0]
            turns = [math.tau * turn / 40 for turn in range(40)]
            points = [(radius * math.cos(turn), radius * math.sin(turn)) for turn in turns]
        whole = [((place[0] + x) * _UNIT, (place[1] + y) * _UNIT) for x, y in points]
        self._draw.polygon(whole, color, self._colors["ground"], round(0.75 * _UNIT))

    def text(self, place: Point, text: str, anchor: str, *, bold: bool = False) -> None:
        """A text at an anchor in Pillow's words; a label, which is bold, has a halo."""
        font, text = _font_for(text, bold)
        self._draw.text(
            (place[0] * _UNIT, place[1] * _UNIT),
            text,
            self._colors["ink" if bold else "quiet"],
            font,
            anchor,
            stroke_width=2 * _UNIT if bold else 0,
            stroke_fill=self._colors["ground"],
        )

    def upright_text(self, middle: Point, text: str) -> None:
        """A text that runs from the bottom to the top."""
        font, text = _font_for(text, False)
        left, top, right, bottom = (round(edge) for edge in font.getbbox(text))
        patch = Image.new("RGB", (right - left, bottom - top), self._colors["ground"])
        ImageDraw.Draw(patch).text((-left, -top), text, self._colors["quiet"], font)
        turned = patch.rotate(90, expand=True)
        x, y = (round(at * _UNIT - size / 2) for at, size in zip(middle, turned.size, strict=True))
        self._image.paste(turned, (max(0, x), max(0, y)))

    def png(self, title: str) -> bytes:
        """The picture as a file."""
        about = PngInfo()
        about.add_itxt("Title", show.visible(title))
        file = io.BytesIO()
        size = (chart.WIDTH * SCALE, chart.HEIGHT * SCALE)
        self._image.resize(size, Image.Resampling.LANCZOS).save(file, "PNG", pnginfo=about)
        return file.getvalue()


def _font_for(text: str, bold: bool) -> tuple[Any, str]:
    """A font, and the text as it can show it: a machine without fonts has Pillow's own, which knows ASCII alone."""
    shown = show.visible(text)
    try:
        return ImageFont.truetype(_FONTS[bold], _FONT_SIZE * _UNIT), shown
    except OSError:
        plain = shown.translate(_PLAINER).encode("ascii", "replace").decode()
        return ImageFont.load_default(_FONT_SIZE * _UNIT), plain


def _between(one: str, other: str, share: float) -> tuple[int, ...]:
    """A colour so far on the way from one to another."""
    return tuple(
        round(a + (b - a) * share) for a, b in zip(ImageColor.getrgb(one), ImageColor.getrgb(other), strict=True)
    )
