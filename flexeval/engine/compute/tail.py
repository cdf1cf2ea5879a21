"""From what left the last layer to logits, past all of the model that makes no difference to them.

Knows a model whose layers are stubs; no family. Called through the whole model, embedding, positions, masks and stubs
take Python a millisecond, which a GPU waits for with every chunk of a vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from flexeval.engine.compute.binding import unchanging_rotary
from flexeval.engine.compute.trying import Call, watch


class Tail:
    """The end of one model."""

    def __init__(self, last: Sequence[nn.Module], decoder: nn.Module, output: ModelOutput, model: PreTrainedModel):
        """`last` makes, one after the other, the hidden states in `output`, which `decoder` has given to `model`."""
        self._last = last
        self._decoder = decoder
        self._output = output
        self._model = model

    def __call__(self, hidden_1TD: Tensor) -> Tensor:
        """Logits `[1, T, V]`."""
        for module in self._last:
            hidden_1TD = module(hidden_1TD)
        with self._given(hidden_1TD):
            logits: Tensor = self._model(use_cache=False).logits
        return logits

    @contextmanager
    def _given(self, hidden_1TD: Tensor) -> Iterator[None]:
        """Meanwhile the decoder gives these hidden states to whoever calls it."""
        output = type(self._output)(**{**self._output, "last_hidden_state": hidden_1TD})
        self._decoder.forward = lambda *args, **kwargs: output
        try:
            yield
        finally:
            del self._decoder.forward


def find_tail(model: PreTrainedModel, hidden_1TD: Tensor) -> Tail | None:
    """The end of a model on `meta`, whose last layer gives `hidden_1TD`, seen in a call without memory.

    None where it is not a few modules, each called with just what the one before it gave: then only the model knows.
    """
    ids_1T = torch.zeros(hidden_1TD.shape[:2], dtype=torch.long, device="meta")
    logits_shape = None

    def run() -> None:
        nonlocal logits_shape
        with unchanging_rotary(model):
            logits_shape = model(input_ids=ids_1T, position_ids=ids_1T, use_cache=False).logits.shape

    last: list[nn.Module] = []
    found: Call | None = None
    x = hidden_1TD
    for call in watch(model, run):
        is_next = found is None and len(call.args) == 1 and _is_same(call.args[0], x)
        if is_next and isinstance(call.out, Tensor):
            last.append(call.module)
            x = call.out
        elif isinstance(call.out, ModelOutput) and _is_same(call.out.get("last_hidden_state"), x):
            found = call  # the outermost is the last
    if found is None or "forward" in vars(found.module):
        return None
    tail = Tail(last, found.module, found.out, model)
    try:
        is_same = tail(hidden_1TD).shape == logits_shape
    except Exception:  # its end asks for more than hidden states
        return None
    return tail if is_same else None


def _is_same(tensor: Any, x: Tensor) -> bool:
    """Whether it is this tensor, or all of it in the same shape."""
    return tensor is x or (isinstance(tensor, Tensor) and tensor._base is x and tensor.shape == x.shape)
