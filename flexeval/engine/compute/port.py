"""Where a model's layer meets our attention: one function registered with transformers, one port per engine.

Knows transformers' attention interface and refuses what we do not implement; not how attention is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import AttentionInterface

from flexeval.errors import UnsupportedModelError

ATTENTION_NAME = "flexeval"
_HARMLESS = frozenset(
    {"position_ids", "use_cache", "cache_position", "output_attentions", "output_hidden_states", "return_dict"}
    | {"output_router_logits", "logits_to_keep", "num_items_in_batch", "position_embeddings", "is_causal"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionOptions:
    """What a family asks of attention beyond scores and softmax."""

    scale: float
    """Factor on query-key products."""
    window: int | None = None
    """A query sees this many positions, its own included; None sees all before it."""
    softcap: float | None = None
    """Scores become softcap * tanh(score / softcap)."""
    sinks_N: Tensor | None = None
    """One logit per query head that takes part in the softmax but has no value (gpt-oss)."""


Attend = Callable[[Tensor, Tensor, Tensor, AttentionOptions], Tensor]
"""(q_TNH, k_TKH, v_TKH, options) -> out_TNH for the new tokens of one packed row at one layer."""


class AttentionInputs(NamedTuple):
    """What a layer hands to its attention."""

    q_TNH: Tensor
    k_TKH: Tensor
    v_TKW: Tensor
    options: AttentionOptions


class AttentionPort:
    """The engine puts the current row's attention here before it calls a layer; the layer takes it."""

    def __init__(self) -> None:
        self._attend: Attend | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether no layer has taken what was put here: one does not attend through transformers' interface."""
        return self._attend is not None

    def put(self, attend: Attend | None) -> None:
        """Set the attention of the next layer call."""
        self._attend = attend

    def take(self) -> Attend:
        """The attention of the layer that is running; once per call."""
        assert self._attend is not None, "a layer attends outside a sweep, or twice"
        attend, self._attend = self._attend, None
        return attend


def register_attention() -> None:
    """Make `attn_implementation="flexeval"` known to transformers; harmless when done again."""
    AttentionInterface.register(ATTENTION_NAME, _attention)


def _attention(
    module: nn.Module,
    query_1NTH: Tensor,
    key_1KTH: Tensor,
    value_1KTH: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface. Raises `UnsupportedModelError` for an argument we would have to ignore."""
    unknown = sorted(name for name, value in kwargs.items() if name not in _HARMLESS and value is not None)
    if attention_mask is not None:
        unknown.append("attention_mask")
    if dropout or kwargs.get("is_causal") is False:
        unknown.append("dropout" if dropout else "is_causal=False")
    if unknown:
        raise UnsupportedModelError(
            f"attention of {type(module).__name__} asks for {', '.join(unknown)}, which the engine does not implement",
            mend="Choose another model, or the backend transformers",
        )
    port = module.attention_port
    assert isinstance(port, AttentionPort)
    attend = port.take()
    options = AttentionOptions(
        scale=scaling if scaling is not None else query_1NTH.shape[-1] ** -0.5,
        window=sliding_window,
        softcap=softcap,
        sinks_N=s_aux,
    )
    out_TNH = attend(query_1NTH[0].transpose(0, 1), key_1KTH[0].transpose(0, 1), value_1KTH[0].transpose(0, 1), options)
    return out_TNH[None], None
