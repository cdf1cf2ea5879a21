"""What the search decides from: the sizes of a model, and of what it is to do. Plain numbers; knows no machine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from flexeval.config import Sparsity


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes of a model under one setting. Layers are equal; where they are not, each figure is the largest."""

    num_layers: int
    """Decoder layers."""
    hidden_size: int
    """Width of the hidden states."""
    intermediate_size: int
    """Width inside the feed-forward block; of all active experts together."""
    layer_bytes: int
    """One layer's slab as it rests (packed, if the setting compresses weights)."""
    layer_compute_bytes: int
    """One layer's slab as many tokens are multiplied by it; more than `layer_bytes` means that it is unpacked first."""
    resident_bytes: int
    """Embedding, final norm and head: always on the compute device."""
    layer_params: int
    """Matrix parameters of one layer that a token meets (active experts only)."""
    num_query_heads: int
    """Attention heads."""
    num_kv_heads: int
    """Heads of keys and values."""
    head_size: int
    """Width of a head."""
    kv_bytes_per_token: int
    """Keys and values of one token at one layer, as they rest."""
    kv_compute_bytes_per_token: int
    """The same as attention computes with them; more than `kv_bytes_per_token` means that they rest coded."""
    hidden_bytes_per_token: int
    """Hidden state of one token."""
    vocab_size: int
    """Rows of the head."""
    dtype_bytes: int
    """Bytes of one number in the layer's arithmetic."""
    results_per_token: float
    """Numbers that a layer's operations make of one token, products and attention apart."""
    few_tokens: int
    """Up to so many tokens of a layer call a packed slab is multiplied as it rests; 0 where it is always unpacked."""
    decode_copies: int
    """Copies that decode attention makes of a group's keys and values; 0 where it reads them where they are."""
    gathers_prompts: bool = True
    """Whether a CPU's attention has prompts' queries, keys and values copied, and each part of a context merged."""
    unpacked_head_bytes: int = 0
    """Of a head that rests in codes, what is unpacked at a time."""
    num_matrices: int = 0
    """Matrices of a layer that a token is multiplied by, those of all experts of a kind as one."""
    num_experts: int = 1
    """Experts of a layer, where they lie apart."""
    experts_per_token: int = 1
    """How many of them a token meets."""
    value_bytes_per_token: int = 0
    """Of `kv_bytes_per_token`, those of values; said where keys are chosen."""
    sparsity: Sparsity | None = None
    """Which keys are attended to; None attends to all."""
    expert_share: float = 0.0
    """Share of a layer's bytes that are theirs; 0 without experts."""
    is_recordable: bool = True
    """Whether a GPU may launch from recordings what a layer computes of few tokens."""

    @property
    def is_packed(self) -> bool:
        """Whether a slab is unpacked before it is multiplied."""
        return self.layer_bytes != self.layer_compute_bytes

    @property
    def is_kv_coded(self) -> bool:
        """Whether keys and values are coded as they are stored, and attended to as they come back."""
        return self.kv_bytes_per_token != self.kv_compute_bytes_per_token


class SizeClass(NamedTuple):
    """Generating sequences of about the same size."""

    num_tokens: int
    """Most that one of them adds to the KV cache: its prompt after the shared prefix, and `max_tokens`."""
    num_sequences: int
    """How many there are."""
    num_steps: int
    """Tokens they generate at most after their first, together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The sequences of a run, in numbers. Scoring sequences are done after one pass; the others generate."""

    num_sequences: int
    """All sequences, generating and scoring."""
    num_scoring_sequences: int
    """Of these, the ones that need one forward pass: they keep no KV."""
    num_prompt_tokens: int
    """Prompt tokens to compute, each shared prefix once."""
    num_scoring_tokens: int
    """Of these, the ones whose KV nobody decodes from: of scoring sequences and of prefixes only they share."""
    num_shared_tokens: int
    """Room for the KV of shared prefixes that outlives a sweep, in tokens: of those in use at once."""
    max_prompt_tokens: int
    """The longest stretch of prompt tokens computed in one piece: a shared prefix or what follows it."""
    max_own_tokens: int
    """Most tokens a generating sequence adds to the KV cache: its prompt after the shared prefix, and `max_tokens`."""
    mean_context_tokens: float
    """Mean prompt length of a sequence, its shared prefix included: what its last prompt token attends to."""
    num_prompt_pairs: float
    """Of a prompt token and a token in its context or its own stretch, which is computed as a square, over all."""
    num_hidden_pairs: float
    """Of these, the ones that causality hides: a token and a later one of its own stretch."""
    num_prompt_parts: int
    """Of a prompt token and a part of its context that it attends to apart: its own stretch, and each prefix before."""
    num_generated_tokens: int
    """Tokens to generate at most: the sum of `max_tokens` over generating sequences."""
    max_generated_tokens: int
    """The largest `max_tokens`."""
    num_logits_rows: int
    """Positions of all prompts whose logits are wanted."""
    max_logits_rows: int
    """Most positions of one row of tokens whose logits are wanted."""
    has_top: bool = False
    """Whether the most probable tokens are wanted there."""
    is_kept: bool = False
    """Whether the distributions are kept."""
    size_classes: tuple[SizeClass, ...] = ()
    """The generating sequences, smallest first; empty where all are of `max_own_tokens`."""

    def __post_init__(self) -> None:
        assert 0 <= self.num_scoring_sequences <= self.num_sequences, self
        assert 0 <= self.num_scoring_tokens <= self.num_prompt_tokens, self
        assert self.num_generated_tokens >= self.num_generating_sequences, self

    @property
    def num_generating_sequences(self) -> int:
        """Sequences that decode from a KV cache."""
        return self.num_sequences - self.num_scoring_sequences

    @property
    def classes(self) -> tuple[SizeClass, ...]:
        """The generating sequences by size; one class where nothing is known of it."""
        num = self.num_generating_sequences
        return self.size_classes or (SizeClass(self.max_own_tokens, num, self.num_generated_tokens - num),)


MOST_CLASSES = 8
"""Of sizes that a workload tells apart; each has about as many steps as the others."""


def classify(sizes: Iterable[tuple[int, int]]) -> tuple[SizeClass, ...]:
    """Classes of sequences, given the tokens that each adds to the KV cache and the steps that it takes."""
    ordered = sorted(sizes)
    num_all_steps = sum(num_steps for _, num_steps in ordered)
    classes: list[SizeClass] = []
    num_sequences = num_steps = num_steps_before = 0
    for index, (num_tokens, own_steps) in enumerate(ordered):
        num_sequences, num_steps = num_sequences + 1, num_steps + own_steps
        is_full = (num_steps_before + num_steps) * MOST_CLASSES >= num_all_steps * (len(classes) + 1)
        is_last = index + 1 == len(ordered)
        if is_last or (is_full and ordered[index + 1][0] > num_tokens):
            classes.append(SizeClass(num_tokens, num_sequences, num_steps))
            num_steps_before += num_steps
            num_sequences = num_steps = 0
    return tuple(classes)
