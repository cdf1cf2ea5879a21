"""The sizes that a policy is chosen from: of a model under a setting, and of a batch of requests. Only counts."""

from __future__ import annotations

import math
from collections.abc import Sequence

from flexeval.engine.compute.anatomy import Anatomy
from flexeval.engine.memory.codec import Codec
from flexeval.engine.memory.slab import SlabLayout
from flexeval.planning.prefix import build_tree
from flexeval.policy.policy import ModelShape, Workload
from flexeval.request import TokenRequest


def model_shape(anatomy: Anatomy, codec: Codec | None) -> ModelShape:
    """Sizes of a model; where layers differ, the largest."""
    text = anatomy.config.get_text_config()
    specs = [anatomy.layer_specs(layer) for layer in range(anatomy.num_layers)]
    matrices = [sum(math.prod(spec.shape) for spec in layer if len(spec.shape) >= 2) for layer in specs]
    experts = next((n for key in _NUM_EXPERTS if isinstance(n := getattr(text, key, None), int) and n > 0), 1)
    active = getattr(text, "num_experts_per_tok", None) or 1
    in_experts = [sum(math.prod(spec.shape) for spec in layer if len(spec.shape) == 3) for layer in specs]
    kinds = {tuple(layer): index for index, layer in enumerate(specs)}
    return ModelShape(
        num_layers=anatomy.num_layers,
        hidden_size=text.hidden_size,
        intermediate_size=max(_intermediate_size(text), getattr(text, "moe_intermediate_size", None) or 0),
        layer_bytes=max(SlabLayout(list(layer), codec).num_bytes for layer in kinds),
        layer_compute_bytes=max(SlabLayout(list(layer), None).num_bytes for layer in kinds),
        resident_bytes=anatomy.resident_bytes,
        layer_params=max(
            total - expert + expert * active // experts for total, expert in zip(matrices, in_experts, strict=True)
        ),
        num_query_heads=text.num_attention_heads,
        num_kv_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        head_size=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        kv_bytes_per_token=max(anatomy.kv_values_per_token(layer) for layer in kinds.values()) * anatomy.dtype.itemsize,
        hidden_bytes_per_token=text.hidden_size * anatomy.dtype.itemsize,
        vocab_size=text.vocab_size,
        dtype_bytes=anatomy.dtype.itemsize,
    )


_NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


def _intermediate_size(text: object) -> int:
    """Width of the feed-forward block, by the names it has in configurations."""
    for name in ("intermediate_size", "ffn_dim", "n_inner"):
        if isinstance(size := getattr(text, name, None), int):
            return size
    return 4 * int(text.hidden_size)  # type: ignore[attr-defined]


def measure_workload(requests: Sequence[TokenRequest]) -> Workload:
    """Count a batch of at least one request; shared prefixes count once, as the engine computes them."""
    longest = max(len(request.prompt_ids) for request in requests)
    tree = build_tree([request.prompt_ids for request in requests], max_node_tokens=longest)
    lengths = [len(node.token_ids) for node in tree.nodes]
    decodes = [any(requests[prompt].max_tokens > 1 for prompt in node.prompts) for node in tree.nodes]
    ends_decoding = list(decodes)
    is_scored = [any(requests[prompt].score_prompt for prompt in node.prompts) for node in tree.nodes]
    for index in range(len(tree.nodes) - 1, -1, -1):
        if (parent := tree.nodes[index].parent) is not None:
            decodes[parent] |= decodes[index]
            is_scored[parent] |= is_scored[index]
    own = [
        length + max(requests[prompt].max_tokens for prompt in node.prompts)
        for length, node in zip(lengths, tree.nodes, strict=True)
        if any(requests[prompt].max_tokens > 1 for prompt in node.prompts)
    ]
    return Workload(
        num_sequences=len(requests),
        num_scoring_sequences=sum(request.max_tokens <= 1 for request in requests),
        num_prompt_tokens=sum(lengths),
        num_scoring_tokens=sum(n for n, decoding in zip(lengths, decodes, strict=True) if not decoding),
        num_shared_tokens=sum(
            n for n, decoding, ends in zip(lengths, decodes, ends_decoding, strict=True) if decoding and not ends
        ),
        max_prompt_tokens=max(lengths),
        max_own_tokens=max(own, default=0),
        mean_context_tokens=tree.num_asked_tokens / len(requests),
        num_generated_tokens=sum(request.max_tokens for request in requests if request.max_tokens > 1),
        max_generated_tokens=max(request.max_tokens for request in requests),
        max_logits_rows=len(requests) + sum(n for n, scored in zip(lengths, is_scored, strict=True) if scored),
    )
