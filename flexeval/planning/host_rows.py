"""Which rows of a sweep the CPU attends for, layer by layer. Integers only; knows rows, and no lane or tensor.

Only decode rows, and only where a layer's KV rests in host memory. A row that rewrites a log reads it on the device
anyway, so it attends there; while the log that all rows share is rewritten, nobody reads it where it rests.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from math import floor

from flexeval.planning.rows import SHARED, RowPlan

ROUNDING = 1e-9
"""What a sum of parts may fall short of the whole number that it is."""


def host_rows(
    plans: Sequence[RowPlan], *, kv_bytes: Sequence[int], weight_bytes: Sequence[int], share: float
) -> list[frozenset[int]]:
    """Indices of the rows that the CPU attends for at each layer: the first that may.

    Args:
        plans: The rows of a sweep.
        kv_bytes: Per layer, bytes of a token's KV in host memory; 0 where it rests elsewhere.
        weight_bytes: Per layer, bytes of weights that come to the device.
        share: Of the decode attention over sequences' own KV in host memory, how much the CPU takes.
    """
    is_rewriting = any(compaction.group == SHARED for plan in plans for compaction in plan.compactions)
    decode = [index for index, plan in enumerate(plans) if plan.decode]
    fit = [index for index in decode if not plans[index].compactions and not is_rewriting]
    num_tokens = sum(span.log_length for index in decode for span in plans[index].decode)
    parts = balanced([num_tokens * size for size in kv_bytes], weight_bytes, share=share)
    ends = accumulate((part * len(decode) for part in parts), initial=0.0)
    counts = [floor(end + ROUNDING) - floor(start + ROUNDING) for start, end in pairwise(ends)]
    return [frozenset(fit[:count]) for count in counts]


def balanced(kv_bytes: Sequence[int], weight_bytes: Sequence[int], *, share: float) -> list[float]:
    """Which part of each layer's KV the CPU attends to, so that of all KV it is `share`.

    Each layer takes as long as the link or the CPU, whoever ends last. So the CPU takes the same part of what every
    layer has to bring, weights and KV: more of the KV of a layer whose weights come, less where they are there. Where
    that were more than all the layer's KV, the other layers' parts make up for it.
    """
    parts = [0.0] * len(kv_bytes)
    left, open_layers = share * sum(kv_bytes), {layer for layer, size in enumerate(kv_bytes) if size}
    while open_layers:
        of_all = left / sum(kv_bytes[layer] + weight_bytes[layer] for layer in open_layers)
        for layer in open_layers:
            parts[layer] = of_all * (kv_bytes[layer] + weight_bytes[layer]) / kv_bytes[layer]
        full = {layer for layer in open_layers if parts[layer] >= 1}
        if not full:
            break
        for layer in full:
            parts[layer] = 1.0
        left = max(0.0, left - sum(kv_bytes[layer] for layer in full))
        open_layers -= full
    return parts
