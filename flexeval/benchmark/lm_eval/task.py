"""What a task of lm-evaluation-harness says, as plain values. Knows nothing of files, keys and rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flexeval.benchmark.lm_eval.scoring import MatchOptions, Pipeline

Spec = str | int | list[Any] | dict[str, Any] | Callable[[dict[str, Any]], Any] | None
"""A column's name, a Jinja template, a constant, or a function of a row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """How a row becomes a question with its answer."""

    text: Spec
    """`doc_to_text`."""
    target: Spec
    """`doc_to_target`."""
    choice: Spec
    """`doc_to_choice`."""
    gen_prefix: str | None
    """The beginning of the answer, which the prompt gives."""
    target_delimiter: str
    """Between question and answer."""
    fewshot_delimiter: str
    """After an example."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """Where examples come from."""

    split: str | None
    """The split they are drawn from."""
    samples: list[dict[str, Any]] | Callable[[], list[dict[str, Any]]] | None
    """Those that the file itself holds, or a function that returns them."""
    process: Callable[[Any], Any] | None
    """A function of the split they are drawn from."""
    sampler: str
    """`default` draws them anew for each question, `first_n` takes the first."""
    form: Form
    """How they are written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a task's files say."""

    name: str
    """Its name."""
    where: str
    """Its file or folder, for messages."""
    folder: Path
    """Data files lie below it."""
    base: Path
    """Names of data files are relative to it."""
    dataset_path: str
    """`json`, `csv`, `parquet`, or a dataset of the hub."""
    dataset_name: str | None
    """Its configuration."""
    data_files: Any
    """File names, by split or not, or None."""
    process: Callable[[Any], Any] | None
    """A function of each split."""
    splits: Mapping[str, str | None]
    """Names of the splits `training`, `validation` and `test`."""
    output_type: str
    """`multiple_choice` or `generate_until`."""
    description: str
    """Stands before everything."""
    form: Form
    """How questions are written."""
    examples: Examples
    """Where examples come from."""
    num_fewshot: int
    """How many of them stand before each question."""
    metrics: tuple[str, ...]
    """Their names, the first one is the headline."""
    match: MatchOptions = field(default_factory=MatchOptions)
    """What `exact_match` overlooks."""
    pipelines: tuple[Pipeline, ...] = ()
    """What is done to a generated text before it is compared, each with its own score."""
    until: tuple[str, ...] = ()
    """Texts that end an answer."""
    max_tokens: int = 0
    """Of an answer at most."""
