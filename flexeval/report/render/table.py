"""The tidy table: one row per task and setting, raw numbers. Knows column names; rounds and words nothing."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

from flexeval.report.fidelity import perplexity_ratio
from flexeval.report.tables import Cell, Comparison, Difference
from flexeval.results import QUANTILES


def table(comparison: Comparison) -> str:
    """The table as CSV; a figure that does not exist is an empty field."""
    table_rows = list(rows(comparison))
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(table_rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table_rows)
    return text.getvalue()


def rows(comparison: Comparison) -> Iterator[dict[str, object]]:
    """The table row by row; None for a figure that does not exist."""
    results = comparison.results
    baseline = results.settings[comparison.baseline].setting
    for row in comparison.tasks:
        for setting, cell in zip(results.settings, row.cells, strict=True):
            yield {
                "run": results.name,
                "model": results.model,
                "suite": results.suite,
                "task": row.task.name,
                "group": row.task.group,
                "metric": row.task.metric,
                "split": row.task.split,
                "higher_is_better": row.task.higher_is_better,
                "setting": cell.setting,
                "backend": setting.backend,
                "num_questions": row.num_questions,
                "score": cell.score.value,
                "score_low": cell.score.low,
                "score_high": cell.score.high,
                **_difference(cell.difference, baseline),
                **_closeness(cell),
                "num_prompt_tokens": cell.num_prompt_tokens,
                "num_generated_tokens": cell.num_generated_tokens,
                "elapsed_s": cell.elapsed_s,
                "questions_per_s": row.num_questions / cell.elapsed_s if cell.elapsed_s else None,
            }


def _closeness(cell: Cell) -> dict[str, object]:
    flips, one = cell.flips, cell.fidelity
    ratio = perplexity_ratio(one) if one else None
    return {
        "num_flips_to_wrong": flips.num_to_wrong if flips else None,
        "num_flips_to_right": flips.num_to_right if flips else None,
        "num_positions": one.num_positions if one else None,
        "kl": one.kl if one else None,
        "kl_error": one.kl_error if one else None,
        "kl_p99": one.kl_quantiles[QUANTILES.index(0.99)] if one else None,
        "kl_at_least": one.kl_at_least if one else None,
        "same_top": one.same_top if one else None,
        "same_top_error": one.same_top_error if one else None,
        "num_text_positions": one.num_text if one else None,
        "perplexity_ratio": ratio.value if ratio else None,
        "perplexity_ratio_error": ratio.error if ratio else None,
        "probability_change": one.probability_change if one else None,
        "probability_change_error": one.probability_change_error if one else None,
        "probability_change_rms": one.probability_change_rms if one else None,
    }


def _difference(difference: Difference | None, baseline: str) -> dict[str, object]:
    return {
        "baseline": baseline if difference else None,
        "difference": difference.estimate.value if difference else None,
        "difference_low": difference.estimate.low if difference else None,
        "difference_high": difference.estimate.high if difference else None,
        "bootstrap_low": difference.bootstrap.low if difference else None,
        "bootstrap_high": difference.bootstrap.high if difference else None,
        "p_value": difference.p_value if difference else None,
        "corrected_p_value": difference.corrected_p if difference else None,
        "num_better": difference.num_better if difference else None,
        "num_worse": difference.num_worse if difference else None,
        "num_same_output": difference.num_same_output if difference else None,
    }
