"""A row's way through all layers as one recording, its attention included. Knows tapes; not when it is time for one.

Attention that cannot be recorded stays a stop between two tapes.

Shapes: T tokens of a row, filled up; N query heads, K KV heads, H size of a key, W size of a value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from flexeval.engine.compute.anatomy import Anatomy
from flexeval.engine.compute.frame import Frame, Places
from flexeval.engine.compute.port import Attend, AttentionOptions
from flexeval.engine.compute.tape import Tape, Tapes

AttendAt = Callable[[int], Attend | None]
"""The attention of a row at a layer, on places that stay the same as long as `Row.steady` does; None where they do not.
"""


class Stop(NamedTuple):
    """Between two tapes: a layer's attention."""

    places: Places
    options: AttentionOptions
    next: Tape


class Steady(NamedTuple):
    """A row's way through all layers."""

    first: Tape
    """Up to the first stop."""
    stops: dict[int, Stop]
    """By layer."""


def record_steady(anatomy: Anatomy, frame: Frame, tapes: Tapes, attend_at: AttendAt, num_tokens: int) -> Steady:
    """Record all layers of a row of so many tokens, whose weights are bound where they stay."""
    first = tape = tapes.new()
    stops: dict[int, Stop] = {}
    with tapes.recording():
        tape.begin()
        for layer in range(anatomy.num_layers):

            def stop(
                q_TNH: Tensor, k_TKH: Tensor, v_TKW: Tensor, options: AttentionOptions, layer: int = layer
            ) -> Tensor:
                nonlocal tape
                places = leave(frame, q_TNH, k_TKH, v_TKW)
                tape.end()
                tape = tapes.new()
                tape.begin()
                stops[layer] = Stop(places, options, tape)
                return places.out_TNW

            attend = attend_at(layer)
            attend = stop if attend is None else within(frame, num_tokens, attend)
            frame.hidden_1TD.copy_(anatomy.run_layer(layer, frame.hidden_1TD, frame.calls[layer], attend))
        tape.end()
    return Steady(first, stops)


def leave(frame: Frame, q_TNH: Tensor, k_TKH: Tensor, v_TKW: Tensor) -> Places:
    """Bring what attention takes to where it will be found."""
    places = frame.places(q_TNH, k_TKH, v_TKW)
    for place, tensor in zip(places, (q_TNH, k_TKH, v_TKW), strict=False):
        place.copy_(tensor)
    return places


def within(frame: Frame, num_tokens: int, attend: Attend) -> Attend:
    """Attention of a row's own tokens, and of those that fill it up any."""

    def attend_within(q_TNH: Tensor, k_TKH: Tensor, v_TKW: Tensor, options: AttentionOptions) -> Tensor:
        out_TNW = frame.places(q_TNH, k_TKH, v_TKW).out_TNW
        out_TNW[:num_tokens] = attend(q_TNH[:num_tokens], k_TKH[:num_tokens], v_TKW[:num_tokens], options)
        return out_TNW

    return attend_within
