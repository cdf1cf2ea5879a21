"""The sizes that a policy is chosen from: of a model under a setting, and of a batch of requests. Only counts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from flexeval.config import Sparsity
from flexeval.engine.codecs.codec import Codec
from flexeval.engine.codecs.kv_format import KVCoding, make_format
from flexeval.engine.compute.anatomy import Anatomy
from flexeval.engine.compute.dense import decode_copies
from flexeval.engine.compute.elementwise import results_per_token
from flexeval.engine.compute.experts import experts_per_token
from flexeval.engine.compute.host_prompts import attends_to_prompts
from flexeval.engine.compute.vocabulary import PART_VALUES
from flexeval.engine.memory.slab import SlabLayout
from flexeval.planning.prefix import build_tree
from flexeval.planning.streams import make_streams
from flexeval.planning.usage import NodeUsage
from flexeval.policy.work import ModelShape, Workload, classify
from flexeval.request import TokenRequest


def model_shape(
    anatomy: Anatomy,
    codec: Codec | None,
    device: torch.device,
    *,
    kv_coding: KVCoding | None = None,
    sparsity: Sparsity | None = None,
    vocabulary_codec: Codec | None = None,
    is_apart: bool = False,
) -> ModelShape:
    """Sizes of a model as the engine computes it on `device`; where layers differ, the largest.

    Requests that are kept `is_apart` are computed by kernels that do not depend on how many they are.

    Raises `UnsupportedModelError` where its keys and values cannot be coded.
    """
    text = anatomy.config.get_text_config()
    specs = [anatomy.layer_specs(layer) for layer in range(anatomy.num_layers)]
    matrices = [sum(math.prod(spec.shape) for spec in layer if len(spec.shape) >= 2) for layer in specs]
    num_matrices = max(sum(len(spec.shape) >= 2 for spec in layer) for layer in specs)
    in_experts = [sum(math.prod(spec.shape) for spec in layer if len(spec.shape) == 3) for layer in specs]
    kinds = {tuple(layer): index for index, layer in enumerate(specs)}
    takes_coded = all(
        SlabLayout(list(layer), codec).coded_names <= anatomy.codable[index] for layer, index in kinds.items()
    )
    largest = max((SlabLayout(list(layer), codec) for layer in kinds), key=lambda layout: layout.num_bytes)
    named = (n for key in _NUM_EXPERTS if isinstance(n := getattr(text, key, None), int) and n > 0)
    experts, active = largest.num_experts or next(named, 1), experts_per_token(text)
    kv_shapes = [anatomy.kv_shape(layer) for layer in kinds.values()]
    forms = [make_format(kv_shape, anatomy.dtype, kv_coding) for kv_shape in kv_shapes]
    form = max(forms, key=lambda form: form.token_bytes)
    num_query_heads = text.num_attention_heads
    num_kv_heads = getattr(text, "num_key_value_heads", None) or num_query_heads
    return ModelShape(
        num_layers=anatomy.num_layers,
        hidden_size=text.hidden_size,
        intermediate_size=_intermediate_size(text, active),
        layer_bytes=largest.num_bytes,
        layer_compute_bytes=max(SlabLayout(list(layer), None).num_bytes for layer in kinds),
        resident_bytes=anatomy.resident_bytes(vocabulary_codec),
        unpacked_head_bytes=0 if vocabulary_codec is None else PART_VALUES * anatomy.dtype.itemsize,
        layer_params=max(
            total - expert + expert * active // experts for total, expert in zip(matrices, in_experts, strict=True)
        ),
        num_query_heads=num_query_heads,
        num_kv_heads=num_kv_heads,
        head_size=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        kv_bytes_per_token=form.token_bytes,
        value_bytes_per_token=form.token_bytes * form.shape.value_size // (form.shape.key_size + form.shape.value_size),
        sparsity=sparsity,
        kv_compute_bytes_per_token=max(kv.num_values for kv in kv_shapes) * anatomy.dtype.itemsize,
        hidden_bytes_per_token=text.hidden_size * anatomy.dtype.itemsize,
        vocab_size=text.vocab_size,
        dtype_bytes=anatomy.dtype.itemsize,
        results_per_token=results_per_token(anatomy, device),
        few_tokens=codec.few_tokens(device, anatomy.dtype) if codec is not None and takes_coded and not is_apart else 0,
        decode_copies=0 if sparsity else decode_copies(device, form, heads_per_kv=num_query_heads // num_kv_heads),
        gathers_prompts=not all(attends_to_prompts(kv, anatomy.dtype, num_query_heads) for kv in kv_shapes)
        or bool(sparsity),
        num_matrices=num_matrices,
        num_experts=max(1, largest.num_experts),
        experts_per_token=active,
        expert_share=1 - largest.num_dense_bytes / largest.num_bytes,
        is_recordable=not is_apart,
    )


_NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


def _intermediate_size(text: object, experts_per_token: int) -> int:
    """Width of what a token passes in the feed-forward block, by the names it has in configurations."""
    sizes = (getattr(text, name, None) for name in ("intermediate_size", "ffn_dim", "n_inner"))
    width = next((size for size in sizes if isinstance(size, int)), 4 * text.hidden_size)  # type: ignore[attr-defined]
    of_expert = getattr(text, "moe_intermediate_size", None)
    return max(width, of_expert * experts_per_token) if of_expert else width * experts_per_token


def measure_workload(requests: Sequence[TokenRequest], *, is_apart: bool = False) -> Workload:
    """Count a batch of at least one request; what several share counts once, unless they are kept `is_apart`."""
    streams = make_streams(requests, is_apart=is_apart)
    longest = max(len(stream.prompt_ids) for stream in streams)
    tree = build_tree([stream.prompt_ids for stream in streams], max_node_tokens=longest, is_apart=is_apart)
    usage = NodeUsage(tree, is_generating=[stream.is_generating for stream in streams])
    leaf = {stream: node for node, entry in enumerate(tree.nodes) for stream in entry.prompts}
    is_scored = usage.mark(
        {i for i, stream in enumerate(streams) if any(requests[index].score_prompt for index in stream.requests)}
    )
    generating = [(i, stream) for i, stream in enumerate(streams) if stream.is_generating]
    num_scored = sum(n for n, scored in zip(usage.num_tokens, is_scored, strict=True) if scored)
    num_scored += len({leaf[i] for i, stream in enumerate(streams) if stream.last_ids})
    return Workload(
        num_sequences=len(streams),
        num_scoring_sequences=len(streams) - len(generating),
        num_prompt_tokens=tree.num_computed_tokens,
        num_scoring_tokens=sum(
            n for n, is_kept in zip(usage.num_tokens, usage.is_generating, strict=True) if not is_kept
        ),
        num_shared_tokens=usage.generating_room() + usage.scoring_room(),
        max_prompt_tokens=max(usage.num_tokens),
        max_own_tokens=max((usage.num_own[leaf[i]] + stream.max_tokens for i, stream in generating), default=0),
        mean_context_tokens=tree.num_asked_tokens / len(streams),
        num_prompt_pairs=sum(
            n * (node.first_position + n) for n, node in zip(usage.num_tokens, tree.nodes, strict=True)
        ),
        num_hidden_pairs=sum(n * (n - 1) // 2 for n in usage.num_tokens),
        num_prompt_parts=sum(n * len(tree.path(node)) for node, n in enumerate(usage.num_tokens)),
        num_generated_tokens=sum(stream.max_tokens for _, stream in generating),
        max_generated_tokens=max(stream.max_tokens for stream in streams),
        num_logits_rows=sum(stream.max_tokens > 0 for stream in streams) + num_scored,
        max_logits_rows=len(streams) + num_scored,
        has_top=any(request.num_top_logprobs for request in requests),
        is_kept=any(request.keep_top for request in requests),
        size_classes=classify(
            (usage.num_own[leaf[i]] + stream.max_tokens, stream.max_tokens - 1) for i, stream in generating
        ),
    )
