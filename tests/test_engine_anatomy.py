"""Taking a model apart: how long a sequence may be, and what cannot be taken apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import tiny_config

from flexeval.engine.compute.anatomy import Anatomy
from flexeval.engine.compute.elementwise import results_per_token
from flexeval.errors import UnsupportedModelError

LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


@pytest.mark.parametrize(
    ("family", "changes", "length"),
    [
        ("llama", {"max_position_embeddings": 300}, 300),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}, 256),
        ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64}, 64),
        ("llama4_text", {"attention_chunk_size": 48, "num_local_experts": 2}, 48),
        ("llama4_text", {"attention_chunk_size": None, "num_local_experts": 2}, 256),
    ],
)
def test_the_context_ends_where_other_answers_would_begin(family: str, changes: dict[str, Any], length: int) -> None:
    config = tiny_config(family, **{"max_position_embeddings": 256, "intermediate_size": 128} | changes)
    assert Anatomy(config, torch.float32).context_length == length


@pytest.mark.parametrize(
    ("family", "rope"), [("phi3", LONGROPE), ("llama", {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0})]
)
def test_rotary_embeddings_that_change_with_the_length_leave_a_model_countable(
    family: str, rope: dict[str, Any]
) -> None:
    changes = {"rope_parameters": rope, "original_max_position_embeddings": 64, "max_position_embeddings": 256}
    anatomy = Anatomy(tiny_config(family, **changes), torch.float32)
    kinds = [module.rope_type for module in anatomy.model.modules() if hasattr(module, "rope_type")]
    assert anatomy.kv_shape(0) and results_per_token(anatomy, torch.device("cpu")) > 0
    assert kinds == [module.rope_type for module in anatomy.model.modules() if hasattr(module, "rope_type")] != []
    made = [name for module in anatomy.model.modules() for name in vars(module) if name.endswith("long_inv_freq")]
    assert not made, "without memory, they would be found and used by calls with it"


def test_attention_that_cannot_be_replaced_is_said_to_be_so() -> None:
    with pytest.raises(UnsupportedModelError, match="falcon family cannot run here: transformers does not let"):
        Anatomy(tiny_config("falcon"), torch.float32)
