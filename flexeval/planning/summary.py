"""What a plan saves, in tokens, and why. Knows counts only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flexeval.planning.prefix import PrefixTree, build_tree
from flexeval.planning.streams import computed_lengths
from flexeval.request import TokenRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSummary:
    """The prompts of one batch."""

    num_requests: int
    """All requests."""
    num_distinct: int
    """Different prompts."""
    num_asked_tokens: int
    """Prompt tokens of all requests."""
    num_duplicate_tokens: int
    """Of these, in prompts that equal an earlier one."""
    num_shared_tokens: int
    """Of the others, in beginnings that are computed with an earlier prompt."""
    num_last_tokens: int
    """Of the others, last ones of prompts that are only scored: nothing follows them."""
    num_computed_tokens: int
    """What is left, and computed."""
    num_nodes: int
    """Runs of tokens that are computed in one piece each."""

    @classmethod
    def of(cls, requests: Sequence[TokenRequest], tree: PrefixTree) -> PlanSummary:
        """Count; `tree` holds what is computed of the prompts of `requests`, equal ones at least once."""
        lengths = computed_lengths(requests)
        num_asked = sum(len(request.prompt_ids) for request in requests)
        num_distinct_tokens, num_needed = sum(map(len, lengths)), sum(lengths.values())
        num_again = max(0, tree.num_computed_tokens - num_needed)  # of equal prompts that are kept apart
        return cls(
            num_requests=len(requests),
            num_distinct=len(lengths),
            num_asked_tokens=num_asked,
            num_duplicate_tokens=num_asked - num_distinct_tokens - num_again,
            num_shared_tokens=num_needed + num_again - tree.num_computed_tokens,
            num_last_tokens=num_distinct_tokens - num_needed,
            num_computed_tokens=tree.num_computed_tokens,
            num_nodes=len(tree.nodes),
        )

    @property
    def saved_share(self) -> float:
        """Share of the asked tokens that is not computed."""
        return 1 - self.num_computed_tokens / self.num_asked_tokens if self.num_requests else 0.0

    def __str__(self) -> str:
        """One line for a person."""
        return (
            f"{self.num_asked_tokens:,} prompt tokens asked, {self.num_computed_tokens:,} computed: "
            f"{self.num_duplicate_tokens:,} are of equal prompts, {self.num_shared_tokens:,} of shared beginnings, "
            f"{self.num_last_tokens:,} the last of prompts that are only scored"
        )


def summarize(requests: Sequence[TokenRequest], *, is_apart: bool = False) -> PlanSummary:
    """What a plan for these requests saves; of those kept `is_apart`, equal ones alone are computed once."""
    prompts = [prompt_ids[:length] for prompt_ids, length in computed_lengths(requests).items()]
    longest = max(map(len, prompts), default=1)
    return PlanSummary.of(requests, build_tree(prompts, max_node_tokens=longest, is_apart=is_apart))
