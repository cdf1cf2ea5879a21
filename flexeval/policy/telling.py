"""A policy in words, as plans and benchmarks show it."""

from __future__ import annotations

from flexeval.policy.policy import Policy, Split, Tier


def tell_policy(policy: Policy) -> str:
    """`weights 20% gpu, 80% cpu; KV 100% cpu; hidden states ...`, and how much is in flight."""
    words = (
        f"weights {tell_shares(policy.weights)}; KV {tell_shares(policy.kv)}; "
        f"hidden states {tell_shares(policy.hidden)}; "
        f"rows of {policy.row_tokens:,} tokens, sweeps of {policy.sweep_tokens:,}; "
        f"groups of {policy.group_sequences:,} sequences, {policy.num_groups:,} at a time"
    )
    if policy.group_tokens:
        words += f", with room for {policy.group_tokens:,} tokens each"
    share = policy.host_attention
    return words + (f"; the CPU attends to {share:.0%} of the KV in host memory" if share else "")


def tell_shares(split: Split) -> str:
    """`25% gpu, 75% cpu`."""
    return ", ".join(f"{share:.0%} {tier}" for tier in Tier if (share := getattr(split, tier)))
