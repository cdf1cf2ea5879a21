"""Gives modules their tensors, wherever these lie. Knows modules and names; not where tensors come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flexeval.engine.codecs.coded import Coded, CodedMatrices, CodedMatrix
from flexeval.engine.compute.experts import ExpertsPort
from flexeval.engine.compute.linear import CodedLinear


def bind(root: nn.Module, tensors: Mapping[str, Tensor | Coded]) -> None:
    """Let the modules under `root` compute with these tensors, linear layers and experts also with coded matrices."""
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        module = root.get_submodule(path)
        if isinstance(module, CodedLinear) and leaf == "weight":
            module.coded = None if isinstance(tensor, Tensor) else cast(CodedMatrix, tensor)
        elif isinstance(port := getattr(module, "experts_port", None), ExpertsPort):
            port.coded.pop(leaf, None)
            if not isinstance(tensor, Tensor):
                port.coded[leaf] = cast(CodedMatrices, tensor)
        else:
            assert isinstance(tensor, Tensor), (name, "cannot be coded")
        if not isinstance(tensor, Tensor):
            module._parameters[leaf] = None
        elif leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        else:
            assert leaf in module._buffers, (name, "is neither a parameter nor a buffer")
            module._buffers[leaf] = tensor


@contextmanager
def unchanging_rotary(model: PreTrainedModel) -> Iterator[None]:
    """For calls without memory: there, rotary embeddings that change with the largest position cannot look at it.

    Within `Anatomy.context_length` none of them changes.
    """
    rotary: list[Any] = [module for module in model.modules() if hasattr(module, "rope_type")]
    found = [(module, module.rope_type) for module in rotary]
    try:
        for module, kind in found:
            module.rope_type = dict.fromkeys(kind, "default") if isinstance(kind, dict) else "default"
        yield
    finally:
        for module, kind in found:
            module.rope_type = kind


def place_of(tensor: Tensor) -> tuple[int, torch.Size]:
    """The same for tensors that share their numbers."""
    return (id(tensor) if tensor.is_meta else tensor.data_ptr(), tensor.shape)


def fill_buffers(model: PreTrainedModel, module: nn.Module, device: torch.device) -> None:
    """Compute the buffers of a module of `model` that no checkpoint holds (rotary frequencies, scales), as it does."""
    in_checkpoint = set(module.state_dict(keep_vars=True))
    absent = [name for name, buffer in module.named_buffers(recurse=False) if name not in in_checkpoint]
    if any(module.get_buffer(name).is_meta for name in absent):
        assert all(parameter.is_meta for parameter in module.parameters(recurse=False)), "weights come after buffers"
        for name in absent:
            module._buffers[name] = torch.empty_like(module.get_buffer(name), device=device)
        model._init_weights(module)
