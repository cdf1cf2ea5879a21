"""Made-up data of all of HELM Lite, in the files and formats that its scenarios read. No question is real."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
from nltk.tokenize.punkt import PunktTrainer

from flexeval.benchmark.suites import Suite

NUM_EACH = 9
"""Examples of each split: more than any prompt takes."""
SENTENCES = [
    f"The {noun} of number {i} is {color}. It costs {i} coins."
    for i, (noun, color) in enumerate(zip(["door", "cart", "lamp"] * 6, ["red", "blue"] * 9, strict=True))
]


def write_all(suite: Suite, scenarios: Path) -> None:
    """Write the files of a suite's entries below HELM's `scenarios` folder."""
    _write_mmlu(scenarios / "mmlu/data", values_of(suite, "mmlu", "subject"))
    for split in ("train", "test"):
        write_lines(scenarios / f"gsm/gsm_data_{split}", (_gsm(i) for i in range(NUM_EACH)))
        write_lines(
            scenarios / f"openbookqa/data/OpenBookQA-V1-Sep2018/Data/Main/{split}.jsonl",
            (_openbook(i) for i in range(NUM_EACH)),
        )
    for split in ("train", "dev", "test"):
        write_lines(
            scenarios / f"med_qa/data/data_clean/questions/US/4_options/phrases_no_exclude_{split}.jsonl",
            (_med(i) for i in range(NUM_EACH)),
        )
    _write_narratives(scenarios / "narrativeqa/data/narrativeqa-master")
    for number in range(5):
        path = scenarios / f"natural_qa/data/nq-dev-0{number}.jsonl.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(path, "wt") as file:
            file.writelines(json.dumps(_natural(i)) + "\n" for i in range(2 * NUM_EACH))
    subsets = values_of(suite, "legalbench", "subset")
    settings = [
        {subset: [["Text", "text"]] for subset in subsets},
        dict.fromkeys(subsets, "Say yes or no."),
        dict.fromkeys(subsets, "answer"),
        dict.fromkeys(subsets, "Label"),
        {},
    ]
    for folder in ("legalbench", "legalbench/data"):
        write_lines(scenarios / folder / "prompt_construction_settings.json", settings)


def values_of(suite: Suite, name: str, argument: str) -> set[str]:
    """What a suite's entries of that name give for an argument."""
    wanted = [entry.partition(":")[2].split(",") for entry in suite.entries if entry.startswith(f"{name}:")]
    pairs = [part.partition("=") for parts in wanted for part in parts]
    return {value for key, _, value in pairs if key == argument}


def load_dataset(path: str, name: str | None = None, *, split: str | None = None, **_: Any) -> Any:
    """In the place of `datasets.load_dataset`: what HELM Lite reads from the hub."""
    if path == "wmt14":
        assert name is not None
        source = name.partition("-")[0]
        pairs = [{"translation": {source: f"{source}: {text}", "en": text}} for text in SENTENCES]
        found = dict.fromkeys(("train", "validation", "test"), datasets.Dataset.from_list(pairs))
    elif path == "nguha/legalbench":
        rows = [{"text": text, "answer": "yes" if i % 2 else "no"} for i, text in enumerate(SENTENCES)]
        found = dict.fromkeys(("train", "test"), datasets.Dataset.from_list(rows))
    else:
        assert path == "hendrycks/competition_math", path
        subjects = ("Algebra", "Counting & Probability", "Geometry", "Intermediate Algebra", "Number Theory")
        rows = [
            {
                "problem": f"What is {i} + {level} in {subject}?",
                "solution": f"We add: \\boxed{{{i + level}}}.",
                "type": subject,
                "level": f"Level {level}",
            }
            for subject in (*subjects, "Prealgebra", "Precalculus")
            for level in range(1, 6)
            for i in range(NUM_EACH)
        ]
        found = dict.fromkeys(("train", "test"), datasets.Dataset.from_list(rows))
    return found[split] if split else datasets.DatasetDict(found)


def write_punkt(folder: Path) -> None:
    """A sentence tokenizer for BLEU, trained on the sentences above, as NLTK keeps its own."""
    trainer = PunktTrainer()
    trainer.train(" ".join(SENTENCES * 20), finalize=True)
    found = trainer.get_params()
    target = folder / "tokenizers/punkt_tab/english"
    target.mkdir(parents=True)
    (target / "abbrev_types.txt").write_text("\n".join(sorted(found.abbrev_types)))
    (target / "sent_starters.txt").write_text("\n".join(sorted(found.sent_starters)))
    (target / "collocations.tab").write_text("\n".join("\t".join(pair) for pair in sorted(found.collocations)))
    contexts = sorted(found.ortho_context.items())
    (target / "ortho_context.tab").write_text("\n".join(f"{word}\t{context}" for word, context in contexts))


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    """Rows of JSON, a line each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write_mmlu(folder: Path, subjects: Iterable[str]) -> None:
    for split in ("dev", "val", "test"):
        (folder / split).mkdir(parents=True)
        for subject in subjects:
            with (folder / split / f"{subject}_{split}.csv").open("w", newline="") as file:
                csv.writer(file).writerows(
                    [f"{subject}: what is {i} + 1?", i, i + 1, i + 2, i + 3, "B"] for i in range(NUM_EACH)
                )


def _write_narratives(folder: Path) -> None:
    (folder / "third_party/wikipedia").mkdir(parents=True)
    ids = [(f"{split}{i}", split) for split in ("train", "valid", "test") for i in range(NUM_EACH)]
    with (folder / "third_party/wikipedia/summaries.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["document_id", "set", "summary"])
        writer.writerows([identity, split, " ".join(SENTENCES[:4])] for identity, split in ids)
    with (folder / "qaps.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["document_id", "set", "question", "answer1", "answer2"])
        writer.writerows([identity, split, "What colour is the door?", "red", "It is red"] for identity, split in ids)


def _gsm(i: int) -> dict[str, str]:
    return {"question": f"Tom has {i} coins and finds one. How many has he?", "answer": f"{i}+1={i + 1}\n#### {i + 1}"}


def _openbook(i: int) -> dict[str, Any]:
    choices = [{"label": letter, "text": f"{letter.lower()}{i}"} for letter in "ABCD"]
    return {"question": {"stem": f"Which is number {i}?", "choices": choices}, "answerKey": "ABCD"[i % 4]}


def _med(i: int) -> dict[str, Any]:
    options = {letter: f"drug {letter}{i}" for letter in "ABCD"}
    return {"question": f"Patient {i} coughs. What helps?", "options": options, "answer_idx": "ABCD"[i % 4]}


def _natural(i: int) -> dict[str, Any]:
    html = f"<p>The lamp number {i} is green.</p>"
    start = html.index("green")
    return {
        "document_tokens": [{"token": word} for word in html.split()],
        "document_html": html,
        "document_title": f"Lamp {i}",
        "question_text": f"what colour is lamp {i}",
        "annotations": [
            {
                "long_answer": {"start_byte": 0, "end_byte": len(html)},
                "short_answers": [{"start_byte": start, "end_byte": start + len("green")}],
            }
        ],
    }
