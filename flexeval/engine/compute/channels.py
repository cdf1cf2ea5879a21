"""Keys channel by channel: where each channel's numbers lie, found once for a model. Knows keys; not how they rest.

A few channels of keys hold numbers much larger than the others' (KIVI: Liu et al., ICML 2024), and in groups along the
head they leave the others few codes. Here keys are moved and scaled before they rest, each channel by its own range,
and queries are scaled the other way: a score q k = (q s) ((k - m) / s) + q m. The last term is the same for all keys of
a query, so softmax does not see it, and it is left out. Where scores are capped, or meet a sink, it would be seen:
there keys are only scaled. Ranges are those of a fixed run of random tokens, so that they are the model's alone: what
is answered depends on neither batch nor placement.

Shapes: T tokens, N query heads, K KV heads, M query heads to a KV head, H size of a key, W size of a value.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from flexeval.engine.compute.port import Attend, AttentionOptions

NUM_PROMPTS, PROMPT_TOKENS = 2, 512
"""Of the run: on SmolLM2 more tokens changed little, a quarter of them lost most of what there is to gain."""
LEAST_SHARE = 2**-8
"""Of the largest range of a head, that a channel is taken to have at least."""
LEAST_HALF = 2.0**-14
"""Of any range: half-precision has no smaller numbers of full precision."""
MANTISSA = 2**4
"""Scales are rounded to such a part of their power of two, and middles of their scale: to the same on every device."""


class KeyChannels(NamedTuple):
    """Where the keys of one layer lie."""

    middle_KH: Tensor
    scale_KH: Tensor
    """Half the range, about."""

    @classmethod
    def between(cls, low_KH: Tensor, high_KH: Tensor, *, is_moved: bool, dtype: torch.dtype) -> KeyChannels:
        """From the smallest and the largest number of each channel."""
        low_KH, high_KH = low_KH.float(), high_KH.float()
        half_KH = (high_KH - low_KH) / 2 if is_moved else torch.maximum(low_KH.abs(), high_KH.abs())
        half_KH = half_KH.maximum(LEAST_SHARE * half_KH.amax(-1, keepdim=True)).clamp(
            min=torch.finfo(torch.float16).tiny
        )
        mantissa_KH, exponent_KH = torch.frexp(half_KH)
        scale_KH = torch.ldexp((mantissa_KH * MANTISSA).round() / MANTISSA, exponent_KH)
        middle_KH = ((low_KH + high_KH) / 2 / scale_KH * MANTISSA).round() / MANTISSA * scale_KH * is_moved
        return cls(middle_KH.to(dtype), scale_KH.to(dtype))

    def rest(self, k_TKH: Tensor) -> Tensor:
        """Keys as they rest."""
        return (k_TKH - self.middle_KH) / self.scale_KH

    def around(self, attend: Attend) -> Attend:
        """Attention to keys that rest like that."""

        def attend_to_rested(q_TNH: Tensor, k_TKH: Tensor, v_TKW: Tensor, options: AttentionOptions) -> Tensor:
            q_TKMH = q_TNH.unflatten(1, (k_TKH.shape[1], -1)) * self.scale_KH[:, None]
            return attend(q_TKMH.flatten(1, 2), self.rest(k_TKH), v_TKW, options)

        return attend_to_rested


class Keys(Protocol):
    """What becomes of a layer's keys on their way to attention."""

    def around(self, layer: int, attend: Attend) -> Attend:
        """The attention that a layer meets."""
        ...


class RestingKeys:
    """Every layer's keys rest by channel."""

    def __init__(self, channels: dict[int, KeyChannels]):
        self._channels = channels

    def around(self, layer: int, attend: Attend) -> Attend:
        """See `KeyChannels.around`."""
        return self._channels[layer].around(attend)


class KeyWatch:
    """Sees the keys of a run, and leaves them as they are."""

    def __init__(self) -> None:
        self._bounds: dict[int, tuple[Tensor, Tensor]] = {}
        self._is_moved: dict[int, bool] = {}
        self._dtype = torch.float32

    def around(self, layer: int, attend: Attend) -> Attend:
        """Note the keys that a layer gives."""

        def attend_and_note(q_TNH: Tensor, k_TKH: Tensor, v_TKW: Tensor, options: AttentionOptions) -> Tensor:
            low_KH, high_KH = k_TKH.amin(0), k_TKH.amax(0)
            if layer in self._bounds:
                low_KH, high_KH = low_KH.minimum(self._bounds[layer][0]), high_KH.maximum(self._bounds[layer][1])
            self._bounds[layer], self._dtype = (low_KH, high_KH), k_TKH.dtype
            self._is_moved[layer] = options.softcap is None and options.sinks_N is None
            return attend(q_TNH, k_TKH, v_TKW, options)

        return attend_and_note

    def found(self) -> RestingKeys:
        """What was seen of all layers."""
        return RestingKeys(
            {
                layer: KeyChannels.between(*bounds, is_moved=self._is_moved[layer], dtype=self._dtype)
                for layer, bounds in self._bounds.items()
            }
        )


def prompts_of_random_tokens(vocab_size: int, context_length: int) -> list[tuple[int, ...]]:
    """The run: the same for all models of a vocabulary."""
    generator = torch.Generator().manual_seed(0)
    size = (NUM_PROMPTS, min(PROMPT_TOKENS, context_length))
    ids = torch.randint(vocab_size, size, generator=generator)
    return [tuple(prompt) for prompt in ids.tolist()]
