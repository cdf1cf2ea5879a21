"""transformers itself as a backend, wholly on one device: no offloading, nothing shared. The oracle of the engine.

Under a lossy setting it runs on the weights, keys and values that the setting's codecs give back, and attends to the
keys that the setting chooses, so that the engine can be held to it.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from flexeval.backends.backend import OnCompletions, Usage
from flexeval.backends.generation import Generator
from flexeval.backends.loading import OpenModel, open_model
from flexeval.backends.padded_batch import answer_batch
from flexeval.backends.setting_attention import find_key_channels, register_attention
from flexeval.config import Setting
from flexeval.engine.memory.packing import Packer
from flexeval.engine.memory.slab import SlabLayout
from flexeval.errors import ConfigError
from flexeval.models import ModelSource
from flexeval.request import Completion, Request, TokenRequest, TokenResult


class TransformersBackend:
    """A model driven the plainest way: one request at a time, as HELM's own client does, or in padded batches."""

    name = "transformers"

    def __init__(
        self,
        model: str | ModelSource,
        *,
        setting: str | Setting = "none",
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int = 1,
        attention: str | None = "eager",
    ):
        """Load the model. Raises `FlexevalError` where it cannot be used.

        Args:
            model: As for `Engine.load`.
            setting: As for `Engine.load`.
            device: As for `Engine.load`.
            dtype: As for `Engine.load`.
            batch_size: Sequences computed together.
            attention: transformers' name of an implementation; None leaves the choice to it.
        """
        start = time.perf_counter()
        chosen = Setting.parse(setting) if isinstance(setting, str) else setting
        if chosen.sparsity is not None and batch_size > 1:
            what = f"setting {chosen.name!r} chooses keys by their positions, which padded batches move"
            raise ConfigError(what, mend="Use a batch size of 1")
        opened = open_model(model, setting=chosen, device=device, dtype=dtype)
        self.text = opened.text
        whole = load_whole(opened, attention=attention)
        whole.to(opened.device)  # type: ignore[arg-type]
        self.generator = Generator(whole, opened.text, device=opened.device, batch_size=batch_size)
        self._load_s = time.perf_counter() - start

    def generate(
        self, requests: Sequence[Request], *, on_completions: OnCompletions = lambda completions: None
    ) -> list[Completion]:
        """Answer the requests. Raises `RequestError` before anything is computed."""
        return self.generator.generate(requests, on_completions=on_completions)

    def usage(self) -> Usage:
        """What was used so far; memory is not measured."""
        return self.generator.usage(self._load_s)

    def close(self) -> None:
        """Forget the model."""
        del self.generator


def load_whole(opened: OpenModel, *, attention: str | None = "eager") -> PreTrainedModel:
    """The model in host memory, its matrices, keys and values as the setting's codecs give them back.

    Raises `ConfigError` for an `attention` that does not do to keys and values what the setting does.
    """
    if opened.kv_coding is not None or opened.sparsity is not None:
        if attention != "eager":
            what = f"attention {attention!r} does not treat keys and values as setting {opened.setting.name!r} demands"
            raise ConfigError(what, mend="Choose attention 'eager', or a setting without kv, topk and quest")
        has_key_channels = opened.setting.has_key_channels
        attention = register_attention(opened.kv_coding, opened.sparsity, has_key_channels=has_key_channels)
    anatomy, cpu = opened.anatomy, torch.device("cpu")
    state: dict[str, Tensor] = dict(opened.checkpoint.rest())
    if opened.vocabulary_codec is not None:
        state |= anatomy.vocabulary.as_coded(state, opened.vocabulary_codec)
    layouts = [SlabLayout(anatomy.layer_specs(layer), opened.codec) for layer in range(anatomy.num_layers)]
    layers = range(anatomy.num_layers)
    with Packer(opened.checkpoint, layouts, layers, layers_name=anatomy.layers_name, device=cpu) as packer:
        for layer, layout in enumerate(layouts):
            slab = torch.empty(layout.num_bytes, dtype=torch.uint8)
            packer.fill(layer, slab)
            workspace = torch.empty(layout.num_coded_values, dtype=layout.coded_dtype) if opened.codec else None
            tensors = layout.unpack(slab, workspace)
            state.update((f"{anatomy.layers_name}.{layer}.{name}", tensor) for name, tensor in tensors.items())
    config = copy.deepcopy(anatomy.config)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=anatomy.dtype, attn_implementation=attention
        )
    _fill_buffers(model)
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    if opened.setting.has_key_channels:
        find_key_channels(model.eval(), anatomy.context_length)
    return model.eval()  # type: ignore[no-any-return]


def _fill_buffers(model: PreTrainedModel) -> None:
    """Give the buffers that no checkpoint holds (rotary frequencies, scales) their values; weights come afterwards."""
    for module in model.modules():
        in_checkpoint = set(module.state_dict(keep_vars=True))
        absent = [name for name, _ in module.named_buffers(recurse=False) if name not in in_checkpoint]
        for name in absent:
            module._buffers[name] = torch.empty_like(module.get_buffer(name), device="cpu")
        if absent:
            model._init_weights(module)


def answer(model: PreTrainedModel, request: TokenRequest) -> TokenResult:
    """Score and continue one sequence with transformers' own cache."""
    return answer_batch(model, [request], device=model.device).results[0]
