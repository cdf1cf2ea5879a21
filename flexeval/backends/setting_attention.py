"""transformers' eager attention under a setting: keys and values as its coding gives them back, and only those chosen.

The oracle of coded logs and of sparse attention.

Shapes: B sequences, N query heads, K KV heads, Q queries, S keys of a sequence, T = B S, H size of a key, W of a value.
"""

from __future__ import annotations

import sys
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from flexeval.backends.sparse_reference import chosen_keys
from flexeval.config import Sparsity
from flexeval.engine.codecs.kv_format import CodedFormat, KVCoding, KVShape
from flexeval.engine.compute.channels import KeyChannels, prompts_of_random_tokens

_CHANNELS: WeakKeyDictionary[nn.Module, KeyChannels] = WeakKeyDictionary()
"""Of each attention layer whose keys rest by channel."""


def register_attention(coding: KVCoding | None, sparsity: Sparsity | None, *, has_key_channels: bool = False) -> str:
    """Make such attention known to transformers; the name to ask for it by. Harmless when done again.

    A model whose keys rest by channel first goes through `find_key_channels`.
    """
    num_seen: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # tokens that a layer has seen of a sequence

    def attention(
        module: nn.Module, q_BNQH: Tensor, key_BKSH: Tensor, value_BKSW: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> Any:
        eager = sys.modules[type(module).__module__].eager_attention_forward  # each family has its own
        if has_key_channels and module not in _CHANNELS:
            is_moved = kwargs.get("softcap") is None and kwargs.get("s_aux") is None
            low_KH, high_KH = key_BKSH.amin((0, 2)), key_BKSH.amax((0, 2))
            _CHANNELS[module] = KeyChannels.between(low_KH, high_KH, is_moved=is_moved, dtype=key_BKSH.dtype)
        elif has_key_channels and coding is not None:
            middle_K1H, scale_K1H = (part_KH[:, None] for part_KH in _CHANNELS[module])
            rested_BKSH, value_BKSW = through_coding((key_BKSH - middle_K1H) / scale_K1H, value_BKSW, coding)
            key_BKSH = rested_BKSH * scale_K1H + middle_K1H
        elif coding is not None:
            key_BKSH, value_BKSW = through_coding(key_BKSH, value_BKSW, coding)
        if sparsity is not None:
            num_queries, num_keys = q_BNQH.shape[2], key_BKSH.shape[2]
            # Beside a window transformers forgets older keys. Before its first step a layer has as many as queries.
            num_seen[module] = num_queries + (num_seen[module] if num_keys > num_queries else 0)
            is_chosen_BNQS = chosen_keys(
                q_BNQH,
                key_BKSH,
                None if mask is None else mask[..., :num_keys] == 0,
                sparsity,
                first_position=num_seen[module] - num_keys,
                scale=kwargs["scaling"] if kwargs.get("scaling") is not None else q_BNQH.shape[-1] ** -0.5,
                softcap=kwargs.get("softcap"),
            )
            hidden = torch.zeros(is_chosen_BNQS.shape, dtype=q_BNQH.dtype, device=q_BNQH.device)
            mask = hidden.masked_fill_(~is_chosen_BNQS, torch.finfo(q_BNQH.dtype).min)
        return eager(module, q_BNQH, key_BKSH, value_BKSW, mask, **kwargs)

    parts = ["eager"]
    if coding is not None:
        parts.append(f"kv{coding.bits}-g{coding.group_size}{'-perchannel' if has_key_channels else ''}")
    if sparsity is not None:
        parts.append(f"{sparsity.method}{sparsity.percent}")
    name = "-".join(parts)
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, eager_mask)
    return name


@torch.inference_mode()
def find_key_channels(model: PreTrainedModel, context_length: int) -> None:
    """Look at the keys of random tokens, as the engine does: all prompts at once, for they are equally long."""
    prompts = prompts_of_random_tokens(model.config.get_text_config().vocab_size, context_length)
    model(input_ids=torch.tensor(prompts, device=model.device), use_cache=False)


def through_coding(keys_BKSH: Tensor, values_BKSW: Tensor, coding: KVCoding) -> tuple[Tensor, Tensor]:
    """What comes back of keys and values."""
    sizes = keys_BKSH.shape[0], keys_BKSH.shape[2]
    keys_TKH, values_TKW = (part.transpose(1, 2).flatten(0, 1) for part in (keys_BKSH, values_BKSW))
    form = CodedFormat(KVShape.of(keys_TKH, values_TKW), keys_TKH.dtype, coding)
    data_TB = keys_TKH.new_empty(len(keys_TKH), form.token_bytes, dtype=torch.uint8)
    form.write(keys_TKH, values_TKW, data_TB)
    back = form.read(data_TB, slice(None))
    return back.keys_CKH.unflatten(0, sizes).transpose(1, 2), back.values_CKW.unflatten(0, sizes).transpose(1, 2)
