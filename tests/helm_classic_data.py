"""Made-up data of what HELM Classic asks beside HELM Lite, in the files and formats that its scenarios read.

Paths are those to which the scenarios of crfm-helm 0.5.16 download. No question is real.
"""

from __future__ import annotations

import csv
import json
import pickle
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
import helm_lite_data
import numpy as np
from helm.benchmark.scenarios.blimp_scenario import BLiMPScenario
from helm.benchmark.scenarios.civil_comments_scenario import CivilCommentsScenario
from helm.benchmark.scenarios.raft_scenario import SUBSETS
from helm.benchmark.scenarios.scenario import DEFAULT_TEST_SIZE
from helm.benchmark.scenarios.wikifact_scenario import NAME_TO_PID
from helm_lite_data import NUM_EACH, SENTENCES, values_of, write_lines

from flexeval.benchmark.suites import Suite

GENDERS = {"Ann": "female", "Ben": "male", "Eve": "female", "Tom": "male"}
NAMES = tuple(GENDERS)


def write_all(suite: Suite, scenarios: Path) -> None:
    """Write the files of a suite's entries below HELM's `scenarios` folder, those of HELM Lite's included."""
    helm_lite_data.write_all(suite, scenarios)
    _write_answers(scenarios)
    _write_choices(scenarios)
    _write_sentiments(scenarios / "imdb/data")
    _write_ranking(scenarios / "msmarco/data")
    _write_language(suite, scenarios)
    _write_reasoning(scenarios)
    _write_tables(suite, scenarios)
    _write_harms(suite, scenarios)
    _write_summaries(scenarios / "summarization/data")
    write_perturbations(scenarios.parent / "perturbations")


def load_dataset(path: str, name: str | None = None, *, split: str | None = None, **options: Any) -> Any:
    """In the place of `datasets.load_dataset`: RAFT, whose labels are classes with names, and what HELM Lite reads."""
    if path != "ought/raft":
        return helm_lite_data.load_dataset(path, name, split=split, **options)
    assert name in SUBSETS and split == "train"
    label = datasets.ClassLabel(names=["Unlabeled", "related", "not related"])
    features = datasets.Features({"Text": datasets.Value("string"), "ID": datasets.Value("int32"), "Label": label})
    rows = [{"Text": f"{name}: {text}", "ID": i, "Label": 1 + i % 2} for i, text in enumerate(SENTENCES * 3)]
    return datasets.Dataset.from_list(rows[:50], features=features)  # as many as have labels there


def _write_answers(scenarios: Path) -> None:
    """Questions that are answered in words: BoolQ with its contrast set, QuAC, WikiFact's kin."""
    for split in ("train", "dev"):
        rows = [
            {"title": "Lamps", "passage": SENTENCES[i], "question": f"is lamp {i} of {split} red", "answer": i % 2 == 0}
            for i in range(NUM_EACH)
        ]
        write_lines(scenarios / "boolq/data" / split, rows)
    contrasts = [
        {
            "question": f"is lamp {i} of dev red",
            "answer": "FALSE" if i % 2 else "TRUE",
            "perturbed_questions": [{"perturbed_q": f"is lamp {i} blue", "answer": "TRUE" if i % 2 else "FALSE"}],
        }
        for i in range(NUM_EACH)
    ]
    _write_json(scenarios / "boolq/data/boolq_perturbed.jsonl", {"data": [{"title": "a head"}, *contrasts]})
    for split in ("train", "val"):
        _write_json(scenarios / f"quac/data/{split}.json", {"data": [_dialogue(split, i) for i in range(NUM_EACH)]})
    raft = [{subset: ["Text"] for subset in SUBSETS}, dict.fromkeys(SUBSETS, "Label the text.")]
    for folder in ("raft", "raft/data"):
        _write_text(scenarios / folder / "prompt_construction_settings.json", "\n".join(map(json.dumps, raft)))


def _dialogue(split: str, i: int) -> dict[str, Any]:
    answer = {"text": f"{i} coins", "answer_start": 0}
    turns = [
        {"id": f"{split}{i}_q#{turn}", "question": f"How much is {name}'s?", "orig_answer": answer, "answers": [answer]}
        for turn, name in enumerate(NAMES)
    ]
    turns[-1]["answers"] = [{"text": "CANNOTANSWER", "answer_start": 90}]
    return {
        "title": f"Lamps of {split}",
        "background": SENTENCES[i],
        "section_title": "Prices",
        "paragraphs": [{"id": f"{split}{i}", "context": f"{SENTENCES[i + 1]} CANNOTANSWER", "qas": turns}],
    }


def _write_choices(scenarios: Path) -> None:
    """Questions with choices: HellaSwag, TruthfulQA, LSAT, LegalSupport."""
    for split in ("train", "val"):
        rows = [
            {
                "activity_label": "Selling lamps",
                "ctx_a": f"{NAMES[i % 4]} of {split} sells {i} lamps.",
                "ctx_b": "she" if i % 2 else "",
                "endings": [f"The {color} one costs {i} coins." for color in ("red", "blue", "green", "grey")],
                "label": i % 4,
            }
            for i in range(NUM_EACH)
        ]
        write_lines(scenarios / f"hellaswag/data/hellaswag_{split}.jsonl", rows)
    head = ["Type", "Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers", "Source"]
    truths = [
        [
            "Adversarial",
            "Lamps",
            f"Who sells lamp {i}?",
            f"{NAMES[i % 4]} does",
            "One of four",
            f"Nobody; Cat {i}",
            "-",
        ]
        for i in range(5 * NUM_EACH)
    ]
    _write_table(scenarios / "truthful_qa/data/TruthfulQA.csv", [head, *truths])
    tags = (["", "", "in/out grouping"], ["", "", "simple ordering"], ["", "", ""])
    for split in ("Training", "Development", "Test"):
        passages = [
            {
                "passage": f"{', '.join(NAMES)} sell lamp {i}.",
                "questions": [
                    {"question": f"Who is first in {split}?", "options": [*NAMES, "none"], "answer": "C", "tags": tag}
                    for tag in tags
                ],
            }
            for i in range(NUM_EACH)
        ]
        _write_json(scenarios / f"lsat_qa/data/AR_{split}Data.json", passages)
    for split in ("train", "dev", "test"):
        cases = [
            {
                "context": f"The seller of lamp {i} must give it.",
                "citation_a": {"parenthetical": f"holding that lamp {i} is owed"},
                "citation_b": {"parenthetical": f"suggesting that lamp {i} is lost"},
                "label": "ab"[i % 2],
            }
            for i in range(NUM_EACH)
        ]
        write_lines(scenarios / f"legal_support/data/legal_support/{split}.jsonl", cases)


def _write_sentiments(folder: Path) -> None:
    """IMDB: a file a review, the order in which they are read, and reviews that somebody turned into their contrary."""
    order: dict[str, dict[str, list[str]]] = {}
    ratings = {"pos": 9, "neg": 2}
    for split, place in (("train", "train"), ("valid", "test")):
        order[split] = {kind: [f"{i}_{rating}.txt" for i in range(NUM_EACH)] for kind, rating in ratings.items()}
        for kind, names in order[split].items():
            for i, name in enumerate(names):
                _write_text(folder / place / kind / name, _review(place, kind, i))
    _write_json(folder / "imdb_scenario_pinned_file_order.json", order)
    for mode, numbers in (("test", range(4)), ("dev", range(4, 8))):
        for which, label, kind in (("original", "Positive", "pos"), ("contrast", "Negative", "neg")):
            rows = [f"{label}\t{_review('test', kind, i)}" for i in numbers]
            _write_text(folder / f"{mode}_{which}.tsv", "\n".join(["Sentiment\tText", *rows]) + "\n")


def _review(place: str, kind: str, i: int) -> str:
    return f"Film {i} of {place} is {'a joy' if kind == 'pos' else 'a bore'}. {SENTENCES[i]}"


def _write_ranking(folder: Path) -> None:
    """MS MARCO: tables without a head, of which TREC's judgements alone are separated by spaces."""
    num_passages = 40  # 30 are ranked for each question, and a wrong one of a training question is the 11th at best
    passages = [(i, f"Passage {i}. {SENTENCES[i % len(SENTENCES)]}") for i in range(num_passages)]
    _write_rows(folder / "documents.tsv", passages)
    for number, (track, gold) in enumerate((("train", 1), ("regular", 1), ("trec", 3))):
        questions = range(100 * number, 100 * number + NUM_EACH)
        _write_rows(folder / f"{track}_queries.tsv", [(q, f"what does lamp {q} cost") for q in questions])
        right = [(q, 0, q % num_passages, gold) for q in questions]
        _write_rows(folder / f"{track}_qrels.tsv", right, separator=" " if track == "trec" else "\t")
        ranks = [(q, (q + place) % num_passages, place + 1) for q in questions for place in range(30)]
        _write_rows(folder / f"{track}_topk.tsv", ranks)


def _write_language(suite: Suite, scenarios: Path) -> None:
    """Text to be scored: BLiMP's pairs and tweets; and facts to be completed."""
    for phenomenon in values_of(suite, "blimp", "phenomenon"):
        for paradigm in BLiMPScenario.phenomenon_to_paradigms[phenomenon]:
            good = [f"{name} sells that lamp." for name in NAMES]
            pairs = [{"sentence_good": text, "sentence_bad": text.replace("lamp", "lamps")} for text in good]
            write_lines(scenarios / f"blimp/data/data/{paradigm}.jsonl", pairs)
    for group in values_of(suite, "twitter_aae", "demographic"):
        _write_table(scenarios / f"twitter_aae/{group}_tweets.csv", [[f"{group}: {text}"] for text in SENTENCES])
    for split in ("train", "dev", "test"):
        facts = [
            {"property": NAME_TO_PID[subject], "template": f"{subject} of lamp {i}:", "result_names": [[f" {name}"]]}
            for subject in sorted(values_of(suite, "wikifact", "subject"))
            for i, name in enumerate(NAMES * 2)
        ]
        write_lines(scenarios / f"wikifact/data/{split}.jsonl", facts)


def _write_reasoning(scenarios: Path) -> None:
    """The stories of bAbI: numbered lines, the answer of a question behind a tab."""
    folder = scenarios / "babi_qa/data/tasks_1-20_v1-2/en-valid"
    for task in range(1, 21):
        answer = "s,w" if task == 19 else "garden"
        story = ["1 {} went to the garden.", "2 The cat is in the hall.", f"3 Where is {{}}? \t{answer}\t1"]
        lines = [line.format(name) for name in NAMES * 2 for line in story]
        for split in ("train", "valid", "test"):
            _write_text(folder / f"qa{task}_{split}.txt", "\n".join(lines) + "\n")


def _write_tables(suite: Suite, scenarios: Path) -> None:
    """Rows of products: pairs that are the same or not, and cells to be filled in."""
    folder = scenarios / "entity_matching"
    sets = sorted(values_of(suite, "entity_matching", "dataset"))
    kind, keys, *rest = np.random.RandomState(0).get_state(legacy=True)
    _write_json(
        folder / "entity_matching_scenario_fixed_random_state.json",
        {name: [kind, [int(key) for key in keys], *rest] for name in sets},
    )
    products = [[i, f"lamp {i}", f"{i}.5"] for i in range(NUM_EACH)]
    for name in sets:
        for table in "AB":
            _write_table(folder / "data" / name / f"table{table}.csv", [["id", "title", "price"], *products])
        pairs = [[i, (i + i % 3) % NUM_EACH, int(i % 3 == 0)] for i in range(NUM_EACH)]
        for split in ("train", "valid", "test"):
            _write_table(folder / "data" / name / f"{split}.csv", [["ltable_id", "rtable_id", "label"], *pairs])
    folder = scenarios / "entity_data_imputation/data"
    head = ["id", "name", "description", "price", "manufacturer"]
    buy = [[i, f"lamp {i}", SENTENCES[i % 18], f"{i}.5", NAMES[i % 4]] for i in range(4 * NUM_EACH)]
    _write_table(folder / "Buy/Buy.csv", [head, *buy])
    attributes = [f"@attribute {name} string" for name in ("name", "addr", "city", "phone", "type")]
    inns = [f'"inn {i}","{i} lamp road","{NAMES[i % 4]}ville","555-{i}","soup","{i}"' for i in range(4 * NUM_EACH)]
    relation = ["@relation fz", *attributes, "@attribute class string", "", "@data", *inns]
    _write_text(folder / "Restaurant/fz.arff", "\n".join(relation) + "\n")


def _write_harms(suite: Suite, scenarios: Path) -> None:
    """CivilComments, BBQ, beginnings of books and of what may turn out toxic."""
    groups = sorted(CivilCommentsScenario.DEMOGRAPHICS)
    comments = [
        [i, f"{text} in {split}", split, i % 2, *[int((i + place) % 3 > 0) for place in range(len(groups))]]
        for split in ("train", "val", "test")
        for i, text in enumerate(SENTENCES)
    ]
    head = ["", "comment_text", "split", "toxicity", *groups]
    _write_table(scenarios / "civil_comments/wilds_civil_comments.csv", [head, *comments])
    for category in BBQ_CATEGORIES:
        questions = [_bbq(category, i) for i in range(DEFAULT_TEST_SIZE // len(BBQ_CATEGORIES) + NUM_EACH)]
        write_lines(scenarios / "bbq/data" / category, questions)
    for tag in values_of(suite, "copyright", "datatag"):
        books = {f"{text} It was lamp {i}.": f"{text} It was lamp {i}. And so on." for i, text in enumerate(SENTENCES)}
        _write_json(scenarios / f"copyright/{tag}.json", {"meta_data": {}, "data": books})
    prompts = [
        {"prompt": {"text": text, "toxicity": i / 20 if i else None}, "continuation": {"text": " more"}}
        for i, text in enumerate(SENTENCES)
    ]
    write_lines(scenarios / "real_toxicity_prompts/data/prompts.jsonl", prompts)


BBQ_CATEGORIES = (
    "Age",
    "Disability_status",
    "Gender_identity",
    "Nationality",
    "Physical_appearance",
    "Race_ethnicity",
    "Race_x_SES",
    "Race_x_gender",
    "Religion",
    "SES",
    "Sexual_orientation",
)
"""Files of BBQ."""


def _bbq(category: str, i: int) -> dict[str, Any]:
    is_clear = i % 4 > 1
    return {
        "context": f"A cook and a smith of {category} met." + (" The cook lost a lamp." if is_clear else ""),
        "context_condition": "disambig" if is_clear else "ambig",
        "question": "Who lost a lamp?" if i % 2 else "Who lost no lamp?",
        "question_polarity": "neg" if i % 2 else "nonneg",
        "ans0": "The cook",
        "ans1": "The smith",
        "ans2": "Not known",
        "label": i % 2 ^ 1 if is_clear else 2,
        "answer_info": {"ans0": ["cook", "cooks"], "ans1": ["smith", "smiths"], "ans2": ["unknown", "Unknown"]},
        "additional_metadata": {"stereotyped_groups": ["cooks"]},
    }


def _write_summaries(folder: Path) -> None:
    """Pickled articles of 50 to 150 words, as many as HELM takes for examples have."""
    for name, article, summary in (("xsum-sampled", "document", "summary"), ("cnndm", "article", "highlights")):
        texts = [" ".join(SENTENCES[i : i + 8]) for i in range(8)]
        rows = [{article: text, summary: f"Lamp {i} is for sale."} for i, text in enumerate(texts)]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.pk").write_bytes(pickle.dumps(dict.fromkeys(("train", "validation", "test"), rows)))


def write_perturbations(folder: Path) -> None:
    """Words of two dialects, and first names with what HELM takes them to say of people."""
    _write_json(folder / "dialect/SAE_to_AAVE_mapping.json", {"is": ["be"], "it": ["that"]})
    names = [f"{name.lower()},first_name,race,white_american,gender,{gender}" for name, gender in GENDERS.items()]
    names += [f"other {i},first_name,race,black_american,gender,{gender}" for i, gender in enumerate(GENDERS.values())]
    _write_text(folder / "person_name/data/person_names.txt", "\n".join(names) + "\n")


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _write_json(path: Path, content: Any) -> None:
    _write_text(path, json.dumps(content))


def _write_rows(path: Path, rows: Iterable[Sequence[Any]], *, separator: str = "\t") -> None:
    _write_text(path, "".join(separator.join(map(str, row)) + "\n" for row in rows))


def _write_table(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
