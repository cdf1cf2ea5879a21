"""A model's modules, built without memory, and its decoder layers among them. Knows transformers; not what runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from flexeval.engine.compute.experts import EXPERTS_NAME, Experts
from flexeval.engine.compute.spec import TensorSpec
from flexeval.errors import UnsupportedModelError

OTHER_FAMILY = "Choose a model of another family (Llama, Qwen, Mistral, OPT, ...)"
"""How to mend a family that cannot run."""


class FoundLayers(NamedTuple):
    """Where a model keeps its decoder layers."""

    name: str
    layers: nn.ModuleList


def build_on_meta(config: PretrainedConfig, dtype: torch.dtype, *, attention: str) -> PreTrainedModel:
    """The model's modules without memory. Raises `UnsupportedModelError`."""
    try:
        with torch.device("meta"), _quiet_default_dtype():
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attention, experts_implementation=EXPERTS_NAME
            )
    except Exception as error:  # sizes that make no model raise whatever they lead to
        is_ours = isinstance(error, KeyError) and error.args == (attention,)
        why = "transformers does not let its attention be replaced" if is_ours else f"{type(error).__name__}: {error}"
        raise UnsupportedModelError(
            f"the {config.model_type} family cannot run here: {why}", mend=OTHER_FAMILY
        ) from error
    return model.eval()  # type: ignore[no-any-return]


@contextmanager
def _quiet_default_dtype() -> Iterator[None]:
    """Some families set torch's default type while they build; put it back."""
    before = torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def find_layers(model: PreTrainedModel) -> FoundLayers:
    """The decoder's layers. Raises `UnsupportedModelError`."""
    num_layers = model.config.get_text_config().num_hidden_layers
    in_decoder = set(model.get_decoder().modules())  # a vision tower may have as many layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers and module in in_decoder:
            return FoundLayers(name, module)
    raise UnsupportedModelError(f"{type(model).__name__} has no list of {num_layers} decoder layers", mend=OTHER_FAMILY)


def find_specs(layer: nn.Module, experts: Experts | None) -> list[TensorSpec]:
    """The tensors of a layer: its parameters and the buffers that a checkpoint holds."""
    transposed = {name for name, child in layer.named_modules() if _is_input_first(child)}
    return [
        TensorSpec(
            name=name,
            shape=tuple(tensor.shape),
            dtype=tensor.dtype,
            is_input_first=name.rpartition(".")[0] in transposed,
            is_router=experts is not None and experts.is_router(name, tensor.shape),
            num_experts=experts.num_experts if experts is not None and name in experts.parameters else 0,
        )
        for name, tensor in layer.state_dict(keep_vars=True).items()
    ]


def _is_input_first(module: nn.Module) -> bool:
    """Whether a module's matrices have the input dimension before the output's."""
    return isinstance(module, Conv1D) or bool(getattr(module, "is_transposed", False))
