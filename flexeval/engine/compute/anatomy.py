"""A Hugging Face causal language model, taken apart: embed, layers, head. Knows the model; not where weights come from.

The model is built on the `meta` device and its decoder layers are lifted out. Stubs in their place let the rest of the
model run as it is: once to see the hidden states and arguments that enter each layer, once to finish from the last
layer's output. So a family needs no code of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from flexeval.engine.codecs.codec import Codec
from flexeval.engine.codecs.coded import Coded
from flexeval.engine.codecs.kv_format import KVShape
from flexeval.engine.compute.activations import Activated, find_activated, fuse_activated
from flexeval.engine.compute.binding import bind, fill_buffers, place_of, unchanging_rotary
from flexeval.engine.compute.building import OTHER_FAMILY, build_on_meta, find_layers, find_specs
from flexeval.engine.compute.channels import Keys
from flexeval.engine.compute.experts import Fetch, experts_per_token, find_experts, register_experts
from flexeval.engine.compute.fusion import Fusion
from flexeval.engine.compute.gates import fuse_gates
from flexeval.engine.compute.linear import make_coded
from flexeval.engine.compute.norms import fuse_norms
from flexeval.engine.compute.port import (
    ATTENTION_NAME,
    Attend,
    AttentionInputs,
    AttentionOptions,
    AttentionPort,
    register_attention,
)
from flexeval.engine.compute.rotary import fuse_rotary
from flexeval.engine.compute.spec import TensorSpec
from flexeval.engine.compute.tail import Tail, find_tail
from flexeval.engine.compute.vocabulary import Vocabulary
from flexeval.errors import UnsupportedModelError


class LayerCall(NamedTuple):
    """What the model passes to one layer besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Embedded(NamedTuple):
    """A packed row on its way into the first layer."""

    hidden_1TD: Tensor
    calls: list[LayerCall]
    """One per layer; they share tensors such as rotary embeddings."""


class _Stub(nn.Module):
    """Stands where a layer stood: records what comes in, hands on what it is told to."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        for name in ("attention_type", "layer_type", "is_sliding", "is_attention_layer"):
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))
        self.seen: tuple[Tensor, LayerCall] | None = None
        self.replacement: Tensor | None = None

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.seen = (hidden, LayerCall(args, kwargs))
        return hidden if self.replacement is None else self.replacement


class _AttentionReached(Exception):
    """Ends a layer's call where its attention would begin."""


class Anatomy:
    """The parts of one model, in evaluation mode, without weights until they are bound."""

    def __init__(self, config: PretrainedConfig, dtype: torch.dtype):
        """Build the model on `meta`. Raises `UnsupportedModelError` where layers cannot be lifted out."""
        register_attention()
        register_experts()
        self.config = copy.deepcopy(config)  # transformers shares configs between models
        self.dtype = dtype
        self.model = build_on_meta(self.config, dtype, attention=ATTENTION_NAME)
        self.fusion = Fusion()
        """What of it is one pass instead of several."""
        for fuse in (fuse_norms, fuse_rotary, fuse_gates):
            fuse(self.model, self.fusion)
        self._port = AttentionPort()
        self.keys: Keys | None = None
        """What becomes of keys on their way to attention; None leaves them as they are."""
        self.layers_name, layers = find_layers(self.model)
        self.layers: list[nn.Module] = list(layers)
        for layer in self.layers:
            for module in layer.modules():
                object.__setattr__(module, "attention_port", self._port)
        per_token = experts_per_token(self.config.get_text_config())
        self.experts = [find_experts(layer, per_token, self.fusion) for layer in self.layers]
        """Per layer, its experts; None where they are not apart."""
        self.codable = [
            make_coded(layer) | (experts.codable if experts is not None else frozenset())
            for layer, experts in zip(self.layers, self.experts, strict=True)
        ]
        """Per layer, the names of the weights that may be bound as coded matrices."""
        self._specs = [find_specs(*pair) for pair in zip(self.layers, self.experts, strict=True)]
        self._kv_shapes: dict[tuple[TensorSpec, ...], KVShape] = {}  # by kind of layer
        self.vocabulary = Vocabulary(self.model)
        """Its embedding and head."""
        self._stubs = [_Stub(layer) for layer in self.layers]
        parent, _, leaf = self.layers_name.rpartition(".")
        setattr(self.model.get_submodule(parent), leaf, nn.ModuleList(self._stubs))
        self._fuse_activated()
        self._tail = self._find_tail()

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.layers)

    @property
    def context_length(self) -> int:
        """Longest sequence that does not depend on the others in its row.

        Rotary embeddings that change with the longest sequence of a call (dynamic NTK, LongRoPE) do so beyond the
        length the model was first trained on; up to there they are the plain ones. Attention in chunks (Llama 4) is
        plain attention within the first one.
        """
        text = self.config.get_text_config()
        rope = getattr(text, "rope_parameters", None) or {}
        changing = {"dynamic", "longrope"}
        by_layer_type = [entry for entry in rope.values() if isinstance(entry, dict)]
        lengths = [
            entry.get("original_max_position_embeddings")
            or getattr(text, "original_max_position_embeddings", None)
            or text.max_position_embeddings
            for entry in (by_layer_type or [rope])
            if entry.get("rope_type") in changing
        ]
        chunk = getattr(text, "attention_chunk_size", None)
        return int(min([text.max_position_embeddings, *lengths, *([chunk] if chunk else [])]))

    def resident_bytes(self, codec: Codec | None) -> int:
        """Bytes of embedding, norms and head, where the codec is for the first and the last; tied ones count once."""
        tensors = self.model.state_dict(keep_vars=True)
        distinct = {
            place_of(tensor): self.vocabulary.num_bytes(name, tensor, codec) for name, tensor in tensors.items()
        }
        return sum(distinct.values())

    def layer_specs(self, layer: int) -> list[TensorSpec]:
        """The tensors of a layer's slab: its parameters and the buffers a checkpoint holds, whatever is bound now."""
        return self._specs[layer]

    def bind_layer(self, layer: int, tensors: Mapping[str, Tensor | Coded], fetch_experts: Fetch | None = None) -> None:
        """Let a layer compute with these tensors (views into a slab), of `codable` names also with coded matrices.

        Where `fetch_experts` is given, the experts' tensors need not hold anything before it was asked for them.
        """
        bind(self.layers[layer], tensors)
        if (experts := self.experts[layer]) is not None:
            experts.port.fetch = fetch_experts

    def unbind_layers(self) -> None:
        """What layers compute with is given back: nobody computes with what lies there next."""
        for module, specs in zip(self.layers, self._specs, strict=True):
            bind(module, {spec.name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for spec in specs})

    def bind_rest(self, tensors: Mapping[str, Tensor], device: torch.device, codec: Codec | None = None) -> None:
        """Give embedding, norms and head their weights, and every remaining buffer its initial value.

        A codec is for the embedding and the head. Raises what `Vocabulary.bind` does.
        """
        for module in [*self.model.modules(), *(child for layer in self.layers for child in layer.modules())]:
            fill_buffers(self.model, module, device)
        coded = frozenset() if codec is None else self.vocabulary.bind(tensors, codec, device)
        plain = {name: tensor for name, tensor in tensors.items() if name not in coded}
        moved = {place_of(tensor): tensor.to(device) for tensor in plain.values()}  # tied tensors once
        bind(self.model, {name: moved[place_of(tensor)] for name, tensor in plain.items()})
        unbound = {name for name, tensor in self.model.state_dict(keep_vars=True).items() if tensor.is_meta}
        assert unbound == coded, (unbound, "tensors without a value")

    def embed(self, ids_1T: Tensor, positions_1T: Tensor) -> Embedded:
        """Hidden states entering the first layer, and what every layer is called with."""
        for stub in self._stubs:
            stub.replacement = None
        rotary = unchanging_rotary(self.model) if ids_1T.is_meta else nullcontext()
        with self.vocabulary.looking_up(ids_1T) as ids_1T, rotary:
            self.model.base_model(input_ids=ids_1T, position_ids=positions_1T, use_cache=False)
        seen = [stub.seen for stub in self._stubs]
        for stub in self._stubs:
            stub.seen = None
        assert seen[0] is not None
        return Embedded(seen[0][0], [call for _, call in seen])  # type: ignore[misc]

    def run_layer(self, layer: int, hidden_1TD: Tensor, call: LayerCall, attend: Attend) -> Tensor:
        """One layer on one packed row. Raises `UnsupportedModelError` for a layer that does not let us attend."""
        self._port.put(attend if self.keys is None else self.keys.around(layer, attend))
        experts = self.experts[layer]
        if experts is not None:
            experts.port.is_waiting = True
        output: Tensor | tuple[Tensor, ...] = self.layers[layer](hidden_1TD, *call.args, **call.kwargs)
        if self._port.is_waiting:
            raise UnsupportedModelError(
                f"layer {layer} of {type(self.model).__name__} does not attend through transformers' interface",
                mend=OTHER_FAMILY,
            )
        if experts is not None and experts.port.is_waiting:
            raise UnsupportedModelError(
                f"layer {layer} of {type(self.model).__name__} runs its experts past transformers' interface",
                mend=OTHER_FAMILY,
            )
        return output[0] if isinstance(output, tuple) else output

    def run_to_attention(self, layer: int, hidden_1TD: Tensor, call: LayerCall) -> AttentionInputs:
        """One layer as far as its attention; raises as `run_layer` does."""
        reached: list[AttentionInputs] = []

        def attend(q_TNH: Tensor, k_TKH: Tensor, v_TKW: Tensor, options: AttentionOptions) -> Tensor:
            reached.append(AttentionInputs(q_TNH, k_TKH, v_TKW, options))
            raise _AttentionReached

        with suppress(_AttentionReached):
            self.run_layer(layer, hidden_1TD, call, attend)
        return reached[0]

    def without_memory(self, layer: int, num_tokens: int = 1) -> Callable[[], object]:
        """A call of one layer, for what can be seen of its operations; to be made before weights are bound."""

        def attend(q_TNH: Tensor, k_TKH: Tensor, v_TKW: Tensor, options: AttentionOptions) -> Tensor:
            return v_TKW.new_empty(q_TNH.shape[0], q_TNH.shape[1], v_TKW.shape[-1])

        return partial(self.run_layer, layer, *self._entering(layer, num_tokens), attend)

    def _entering(self, layer: int, num_tokens: int) -> tuple[Tensor, LayerCall]:
        """What a layer is called with, without memory."""
        ids_1T = torch.zeros(1, num_tokens, dtype=torch.long, device="meta")
        embedded = self.embed(ids_1T, torch.arange(num_tokens, device="meta")[None])
        return embedded.hidden_1TD, embedded.calls[layer]

    def kv_shape(self, layer: int) -> KVShape:
        """One token's keys and values, found by calling a layer of its kind without memory, up to its attention.

        To be asked for the first time before weights are bound.
        """
        kind = tuple(self.layer_specs(layer))
        if kind not in self._kv_shapes:
            assert self.keys is None, "their tensors lie in memory"
            inputs = self.run_to_attention(layer, *self._entering(layer, 1))
            self._kv_shapes[kind] = KVShape.of(inputs.k_TKH, inputs.v_TKW)
        return self._kv_shapes[kind]

    def _fuse_activated(self) -> None:
        found: dict[tuple[TensorSpec, ...], Sequence[Activated]] = {}  # by kind of layer
        for index, (layer, specs, experts) in enumerate(zip(self.layers, self._specs, self.experts, strict=True)):
            kind = tuple(specs)
            if experts is None and kind not in found:
                found[kind] = find_activated(layer, partial(self.without_memory, index))
            fuse_activated(layer, found.get(kind, ()), self.fusion)

    def _find_tail(self) -> Tail | None:
        width = self.config.get_text_config().hidden_size
        left_1TD = torch.empty(1, 2, width, dtype=self.dtype, device="meta")
        with self._leaving(left_1TD):
            return find_tail(self.model, left_1TD)

    @contextmanager
    def _leaving(self, hidden_1TD: Tensor) -> Iterator[None]:
        """Meanwhile these hidden states leave the last layer."""
        self._stubs[-1].replacement = hidden_1TD
        try:
            yield
        finally:
            self._stubs[-1].replacement = self._stubs[-1].seen = None

    def head(self, hidden_1TD: Tensor) -> Tensor:
        """Logits `[1, T, V]` of hidden states that left the last layer."""
        if self._tail is not None:
            return self._tail(hidden_1TD)
        zeros_1T = torch.zeros(hidden_1TD.shape[:2], dtype=torch.long, device=hidden_1TD.device)
        with self._leaving(hidden_1TD), self.vocabulary.looking_up(zeros_1T) as ids_1T:
            logits: Tensor = self.model(input_ids=ids_1T, position_ids=zeros_1T, use_cache=False).logits
        return logits
