"""Which rows of a sweep the CPU attends for, layer by layer. Integers only; knows rows, and no lane or tensor.

Only decode rows, and only where a layer's KV rests in host memory. A row that rewrites a log reads it on the device
anyway, so it attends there; while the log that all rows share is rewritten, nobody reads it where it rests.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import floor

from flexeval.planning.rows import SHARED, RowPlan


def host_rows(plans: Sequence[RowPlan], *, is_on_host: Sequence[bool], share: float) -> list[frozenset[int]]:
    """Indices of the rows that the CPU attends for at each layer: the first that may.

    Args:
        plans: The rows of a sweep.
        is_on_host: Per layer, whether its KV rests in host memory.
        share: Of the decode attention of these layers, how much the CPU takes.
    """
    is_rewriting = any(compaction.group == SHARED for plan in plans for compaction in plan.compactions)
    num_decode = sum(bool(plan.decode) for plan in plans)
    fit = [index for index, plan in enumerate(plans) if plan.decode and not plan.compactions and not is_rewriting]
    rows, ordinal = [], 0
    for is_here in is_on_host:
        rows.append(frozenset(fit[: spread(ordinal, share * num_decode)]) if is_here else frozenset())
        ordinal += is_here
    return rows


def spread(ordinal: int, per_layer: float) -> int:
    """Whole rows of the layer with this ordinal: after any number of layers they are `per_layer` each, rounded down."""
    return floor((ordinal + 1) * per_layer) - floor(ordinal * per_layer)
