"""What a policy takes up: most bytes of each tier in use at once. Knows sizes; neither seconds nor machines.

Every formula is linear in the placement: the same code serves plain numbers and the variables of the linear program.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from flexeval.directio import CHUNK_BYTES, STAGED_CHUNKS, round_up
from flexeval.policy.placement import Linear, Placement
from flexeval.policy.policy import KINDS, Policy, Tier
from flexeval.policy.sparse import sparse_workspace_bytes
from flexeval.policy.work import ModelShape, Workload

NUM_BUFFERS = 2
"""Staging buffers of anything that streams: one is used while the next is filled."""
ATTENTION_COPIES = 8
"""Buffers of the model's width that live together while a layer call attends."""
HIDDEN_COPIES, INTERMEDIATE_COPIES = 3, 3
"""Buffers of the model's width and of the feed-forward width that live together in its feed-forward block."""
LOGITS_CHUNK_BYTES = 256 * 2**20
"""Most bytes of 32-bit logits made at once."""
LOGITS_COPIES = 3
"""Logits, their log-softmax and one temporary live together."""


def call_bytes_per_token(shape: ModelShape) -> int:
    """Bytes of the temporaries that a layer call makes for each of its tokens, caches and logits apart."""
    width = max(shape.hidden_size, shape.num_query_heads * shape.head_size)
    inner = INTERMEDIATE_COPIES * shape.intermediate_size
    if shape.num_experts > 1:  # a copy of the token for each expert that it meets, beside both halves of what they make
        inner = max(inner, shape.experts_per_token * shape.hidden_size + 2 * shape.intermediate_size)
    return max(ATTENTION_COPIES * width, HIDDEN_COPIES * width + inner) * shape.dtype_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class RoomModel:
    """Predicts the room that a run of `workload` takes with a model of `shape`."""

    shape: ModelShape
    """The model under its setting."""
    workload: Workload
    """What is to be run."""
    home: Tier
    """The tier that the compute device works in."""

    def num_items(self, policy: Policy) -> dict[str, int]:
        """Items a policy places: layers of weights and KV, rows of a full sweep's hidden states."""
        num_rows = ceil(self.sweep_tokens(policy) / policy.row_tokens)
        return {"weights": self.shape.num_layers, "kv": self.shape.num_layers, "hidden": num_rows}

    def sweep_tokens(self, policy: Policy) -> int:
        """New tokens of the largest sweep."""
        return min(policy.sweep_tokens, self.workload.num_prompt_tokens)

    def shared_tokens(self, policy: Policy) -> int:
        """Tokens of KV in the log of shared nodes: shared prefixes, and scored prompts that take several sweeps."""
        work = self.workload
        is_in_parts = work.max_prompt_tokens > policy.sweep_tokens
        in_parts = min(work.num_scoring_tokens, 2 * work.max_prompt_tokens) if is_in_parts else 0
        return work.num_shared_tokens + in_parts

    def _log_tokens(self, policy: Policy, num_sequences: int) -> int:
        """Tokens that the logs of groups with so many seats have room for."""
        largest = self.workload.max_own_tokens
        num_groups = ceil(num_sequences / policy.group_sequences)
        room = num_groups * max(policy.group_tokens, largest) if policy.group_tokens else num_sequences * largest
        return min(room, num_sequences * largest)

    def item_bytes(self, policy: Policy) -> dict[str, float]:
        """Bytes of one item of each kind: a layer's weights, a layer's KV of a block, a row's hidden states."""
        work, shape = self.workload, self.shape
        block = min(policy.block_sequences, work.num_generating_sequences)
        return {
            "weights": shape.layer_bytes,
            "kv": (self._log_tokens(policy, block) + self.shared_tokens(policy)) * shape.kv_bytes_per_token,
            "hidden": self.sweep_tokens(policy) * shape.hidden_bytes_per_token / self.num_items(policy)["hidden"],
        }

    def peak_bytes(self, policy: Policy, placement: Placement) -> dict[Tier, Linear]:
        """Most bytes of each tier in use at once: what rests there, staging buffers and workspace."""
        work, shape, home = self.workload, self.shape, self.home
        num_generating = work.num_generating_sequences
        row_tokens = min(policy.row_tokens, work.num_prompt_tokens)
        block = min(policy.block_sequences, num_generating)
        item_bytes = self.item_bytes(policy)
        group = min(policy.group_sequences, num_generating)
        group_kv = (self._log_tokens(policy, group) + self.shared_tokens(policy)) * shape.kv_bytes_per_token
        row_bytes = row_tokens * shape.hidden_bytes_per_token
        buffer_bytes = {"weights": shape.layer_bytes, "kv": group_kv, "hidden": row_bytes}

        peak = {tier: sum(item_bytes[kind] * placement.counts[kind][tier] for kind in KINDS) for tier in Tier}
        peak[home] += self.workspace_bytes(policy) + row_bytes  # rows are unequal: one may be over
        peak[home] += block * shape.hidden_bytes_per_token
        peak[home] += NUM_BUFFERS * sum(buffer_bytes[kind] * placement.streams[kind] for kind in KINDS)
        peak[home] += shape.layer_bytes * placement.is_slab_ahead
        if home is Tier.GPU:  # what streams from disk passes through host memory
            peak[Tier.CPU] += NUM_BUFFERS * sum(buffer_bytes[kind] * placement.on_disk[kind] for kind in KINDS)
            peak[Tier.CPU] += row_bytes * placement.streams["hidden"]
        else:
            peak[Tier.CPU] += sum(_staged_bytes(buffer_bytes[kind]) * placement.on_disk[kind] for kind in KINDS)
        peak[Tier.DISK] += row_bytes * placement.on_disk["hidden"]
        return peak

    def workspace_bytes(self, policy: Policy) -> int:
        """Bytes of the compute device that no policy can move: embedding and head, and one layer's temporaries."""
        work, shape = self.workload, self.shape
        group = min(policy.group_sequences, work.num_generating_sequences)
        call_tokens = max(min(policy.row_tokens, work.num_prompt_tokens), group)
        # The KV of nodes that later rows of a sweep descend from stays until the layer ends.
        is_tree = work.num_prompt_tokens < work.num_sequences * work.mean_context_tokens
        is_tree |= work.max_prompt_tokens > policy.row_tokens
        kv_tokens = shape.decode_copies * group * work.max_own_tokens + (self.sweep_tokens(policy) if is_tree else 0)
        kv_bytes = kv_tokens * shape.kv_compute_bytes_per_token
        if shape.is_kv_coded:  # a row's own, coded and as they come back; and a prefix that it attends to
            kv_bytes += call_tokens * (shape.kv_bytes_per_token + shape.kv_compute_bytes_per_token)
            kv_bytes += work.max_prompt_tokens * shape.kv_compute_bytes_per_token
        if shape.sparsity is not None:
            kv_bytes += sparse_workspace_bytes(
                num_scores=call_tokens * shape.num_query_heads * (work.max_prompt_tokens + work.max_own_tokens),
                num_numbers=group * work.max_own_tokens * shape.kv_compute_bytes_per_token // shape.dtype_bytes,
            )
        logits_bytes = min(LOGITS_CHUNK_BYTES, work.max_logits_rows * shape.vocab_size * 4)
        return (
            shape.resident_bytes
            + shape.unpacked_head_bytes
            + (shape.layer_compute_bytes if shape.is_packed else 0)
            + call_tokens * call_bytes_per_token(shape)
            + kv_bytes
            + LOGITS_COPIES * logits_bytes
        )


def _staged_bytes(file_bytes: float) -> int:
    """Host memory that files of that length pass through: of a chunk's buffer, only what they use."""
    return STAGED_CHUNKS * min(CHUNK_BYTES, round_up(ceil(file_bytes)))
