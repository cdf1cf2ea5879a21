"""How many passes over the layers a workload takes under a policy, and how much each does.

Knows sequences and tokens; no machine, no placement and no sizes of a model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from fractions import Fraction
from math import ceil

from flexeval.planning.logs import FILLED_SHARE
from flexeval.policy.policy import Policy
from flexeval.policy.work import Workload

PREFILL, DECODE = "prefill", "decode"
"""The phases of a run: prompts are computed, sequences are continued."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """The mean pass over all layers in one phase of a run."""

    phase: str
    """`prefill` or `decode`."""
    num_sweeps: int
    """How often it happens."""
    num_tokens: float
    """New tokens it computes."""
    num_calls: int
    """Layer calls they take at each layer."""
    num_pairs: float
    """Pairs of a new token and a token it attends to; a stretch of a prompt counts as a square."""
    num_hidden_pairs: float
    """Of these, the ones that causality hides."""
    num_parts: float
    """Pairs of a new token and a part of its context that it attends to apart: its own, and each that others share."""
    num_logits_rows: float
    """Positions whose logits are computed."""
    num_kv_read: float
    """Tokens whose keys and values are read from the cache at each layer."""
    num_own_read: float
    """Of these, the ones of sequences' own contexts."""
    num_kv_written: float
    """Tokens whose keys and values are added to it."""
    weights_share: float = 1.0
    """Part of such sweeps that weights come for: others compute prompts as well, for which they are there."""


_NOT_COUNTED = ("phase", "num_sweeps", "num_calls", "weights_share")
COUNTS = tuple(field.name for field in fields(Sweep) if field.name not in _NOT_COUNTED)
"""What grows with the work that a sweep does."""


def plan_sweeps(policy: Policy, workload: Workload) -> dict[str, Sweep]:
    """The passes of a run: `prefill` (all prompts, scoring included) and, if anything is generated on, `decode`.

    Finished sequences are replaced by waiting ones, so a block of B stays full: decoding takes the larger of
    `max_generated_tokens` - 1 sweeps (the longest sequence alone) and one sweep for every B tokens left to generate;
    for larger sequences B is less where logs have not room for as many.
    With equal lengths that is the n - 1 sweeps a block of FlexGen (Sheng et al., ICML 2023, section 4.3): a
    sequence's first token comes from its prefill. What only scores comes last, while others decode. A prefix that
    sequences share is read once for a call that they are in together, their own tokens once for each of them.
    """
    num_generating = workload.num_generating_sequences
    num_kept = workload.num_prompt_tokens - workload.num_scoring_tokens if num_generating else 0
    num_prefills = ceil(workload.num_prompt_tokens / policy.sweep_tokens)
    if num_generating:
        blocks = ((one.num_sequences, seats(policy, workload, one.num_tokens)) for one in workload.classes)
        num_prefills = max(num_prefills, ceil(_turns(blocks)))
    num_tokens = workload.num_prompt_tokens / num_prefills
    prefill = Sweep(
        phase=PREFILL,
        num_sweeps=num_prefills,
        num_tokens=num_tokens,
        num_calls=ceil(num_tokens / policy.row_tokens),
        num_pairs=workload.num_prompt_pairs / num_prefills,
        num_hidden_pairs=workload.num_hidden_pairs / num_prefills,
        num_parts=workload.num_prompt_parts / num_prefills,
        num_logits_rows=workload.num_logits_rows / num_prefills,
        num_kv_read=0,
        num_own_read=0,
        num_kv_written=num_kept / num_prefills,
    )
    num_left = workload.num_generated_tokens - num_generating
    if num_left <= 0:
        return {PREFILL: prefill}
    steps = ((one.num_steps, min(seats(policy, workload, one.num_tokens), num_generating)) for one in workload.classes)
    part = Fraction(num_left, sum(one.num_steps for one in workload.classes))  # fewer, where texts end by themselves
    num_decodes = max(workload.max_generated_tokens - 1, ceil(part * _turns(steps)))
    num_active = num_left / num_decodes
    half_generated = workload.num_generated_tokens / num_generating / 2
    num_calls = ceil(num_active / min(policy.group_sequences, policy.row_tokens))
    num_scoring = num_prefills * workload.num_scoring_tokens / workload.num_prompt_tokens
    num_own = num_kept / num_generating
    num_shared = max(0.0, workload.mean_context_tokens - num_own)
    decode = Sweep(
        phase=DECODE,
        num_sweeps=num_decodes,
        num_tokens=num_active,
        num_calls=num_calls,
        num_pairs=num_active * (workload.mean_context_tokens + half_generated),
        num_hidden_pairs=0,
        num_parts=num_active * (1 + (num_shared > 0)),
        num_logits_rows=num_active,
        num_kv_read=num_active * (num_own + half_generated) + num_calls * num_shared,
        num_own_read=num_active * (num_own + half_generated),
        num_kv_written=num_active,
        weights_share=weights_share(num_scoring, num_decodes),
    )
    return {PREFILL: prefill, DECODE: decode}


def _turns(classes: Iterable[tuple[int, int]]) -> Fraction:
    """Turns that all take, given how many there are of each class and how many of it go at once."""
    return sum((Fraction(num, num_at_once) for num, num_at_once in classes), Fraction(0))


def seats(policy: Policy, workload: Workload, num_tokens: int) -> int:
    """Sequences of so many tokens that decode at once: as many as groups take, and as their logs have room for."""
    if not policy.group_tokens:
        return policy.block_sequences
    room = max(workload.max_own_tokens, int(FILLED_SHARE * policy.group_tokens))
    return policy.num_groups * min(policy.group_sequences, max(1, room // num_tokens))


def weights_share(num_scoring: float, num_decodes: float) -> float:
    """Part of the sweeps that decode which bring weights themselves: what only scores comes while others decode."""
    return 1 - min(1.0, num_scoring / num_decodes) if num_decodes else 1.0
