"""transformers' eager attention over keys and values as a setting's coding gives them back: the oracle of coded logs.

Shapes: B sequences, K KV heads, S tokens of each, T = B S, H size of a key, W size of a value.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from flexeval.engine.codecs.kv_format import CodedFormat, KVCoding, KVShape


def register_coded_attention(coding: KVCoding) -> str:
    """Make such attention known to transformers; the name to ask for it by. Harmless when done again."""

    def attention(
        module: nn.Module, query: Tensor, key_BKSH: Tensor, value_BKSW: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> Any:
        eager = sys.modules[type(module).__module__].eager_attention_forward  # each family has its own
        return eager(module, query, *through_coding(key_BKSH, value_BKSW, coding), mask, **kwargs)

    name = f"eager-kv{coding.bits}-g{coding.group_size}"
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, eager_mask)
    return name


def through_coding(keys_BKSH: Tensor, values_BKSW: Tensor, coding: KVCoding) -> tuple[Tensor, Tensor]:
    """What comes back of keys and values."""
    sizes = keys_BKSH.shape[0], keys_BKSH.shape[2]
    keys_TKH, values_TKW = (part.transpose(1, 2).flatten(0, 1) for part in (keys_BKSH, values_BKSW))
    form = CodedFormat(KVShape.of(keys_TKH, values_TKW), keys_TKH.dtype, coding)
    data_TB = keys_TKH.new_empty(len(keys_TKH), form.token_bytes, dtype=torch.uint8)
    form.write(keys_TKH, values_TKW, data_TB)
    back = form.read(data_TB, slice(None))
    return back.keys_CKH.unflatten(0, sizes).transpose(1, 2), back.values_CKW.unflatten(0, sizes).transpose(1, 2)
