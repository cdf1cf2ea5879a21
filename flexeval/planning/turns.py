"""In which order a layer computes the rows of a sweep. Knows rows; neither lanes nor how long anything takes."""

from __future__ import annotations

from collections.abc import Sequence

from flexeval.planning.rows import RowPlan


def take_turns(plans: Sequence[RowPlan]) -> list[int]:
    """Indices of the rows in the order of their turns: rows that decode are spread evenly among those with prompts.

    The KV of a row comes while the row before it is computed: prompts take longer than that, a step next to nothing.
    Rows of a kind keep their order, and all rows do where one rewrites a log, for those that use it come after.
    """
    if any(plan.compactions for plan in plans):
        return list(range(len(plans)))
    fresh = [index for index, plan in enumerate(plans) if plan.fresh]
    decode = [index for index, plan in enumerate(plans) if not plan.fresh]
    turns = {index: (turn + 1) / (len(decode) + 1) for turn, index in enumerate(decode)}
    turns |= {index: (turn + 0.5) / len(fresh) for turn, index in enumerate(fresh)}
    return sorted(turns, key=lambda index: (turns[index], index in decode))
