"""HELM Classic from scenario to leaderboard on made-up data: what can run here runs, and what cannot is named."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import datasets
import helm_classic_data
import helm_lite_data
import nltk
import pytest
from helm.benchmark.runner import set_benchmark_output_path
from helm.benchmark.scenarios import math_scenario
from helm.benchmark.scenarios.scenario import create_scenario
from helm.common.object_spec import get_class_by_name
from helm_support import FakeEngine, build_card, empty_columns, summarize

from flexeval.benchmark.helm import HelmSuite, Scored
from flexeval.benchmark.helm.entries import build_run_specs, task_names
from flexeval.benchmark.helm.headline import LOWER_IS_BETTER, PREFERENCE
from flexeval.benchmark.helm.models import register
from flexeval.benchmark.suites import load_suite

WANTED = {
    "package pytrec_eval": {"msmarco: regular", "msmarco: trec"},
    "package numba": {
        "copyright: n_books_1000-extractions_per_book_1-prefix_length_125",
        "copyright: popular_books-prefix_length_125.json",
    },
    "package bert_score": {"summarization_cnndm", "summarization_xsum_sampled"},
    "package googleapiclient": {"real_toxicity_prompts"},
    "credential perspectiveApiKey": {"real_toxicity_prompts"},
}
"""What HELM leaves to choice, and the tasks whose metrics want it. No entry of the suite has gated data."""
FORMATS = (
    "boolq:model=text,only_contrast",
    "quac:",
    "hellaswag",
    "truthful_qa:",
    "msmarco:model=full_functionality_text,data_augmentation=canonical,track=trec",
    "imdb:model=text,only_contrast",
    "raft:subset=overruling",
    "demographic=LGBTQ",
    "phenomenon=irregular_forms",
    "twitter_aae:model=full_functionality_text,demographic=aa",
    "subject=plaintiff",
    "mode=pattern_match",
    "babi_qa:model=text_code,task=19",
    "dyck_language",
    "subject=algebra",
    "gsm",
    "legal_support:",
    "lsat_qa:",
    "entity_matching:model=text,dataset=Beer",
    "entity_data_imputation:",
    "bbq:",
    "real_toxicity_prompts:",
)
"""Parts of entries: one of each kind of file that a scenario reads, and of questions that HELM makes up itself."""
CHOSEN = {"msmarco: trec", "real_toxicity_prompts"}
"""The tasks among them that may lack something."""
HEADLINES = {
    "quasi_exact_match": {
        *("boolq", "imdb", "raft", "civil_comments", "wikifact", "synthetic_reasoning", "babi_qa", "bbq"),
        *("legal_support", "lsat_qa", "entity_matching", "entity_data_imputation"),
    },
    "exact_match": {"hellaswag", "openbookqa", "truthful_qa", "mmlu", "blimp"},
    "f1_score": {"narrative_qa", "quac", "natural_qa_closedbook", "natural_qa_openbook_longans"},
    "f1_set_match": {"synthetic_reasoning_natural"},
    "exact_match_indicator": {"dyck_language"},
    "math_equiv": {"math_regular"},
    "math_equiv_chain_of_thought": {"math_chain_of_thought"},
    "final_number_exact_match": {"gsm"},
    "bits_per_byte": {"twitter_aae"},
    "RR@10": {"msmarco_regular"},
    "NDCG@10": {"msmarco_trec"},
    "longest_common_prefix_length": {"copyright_text"},
}
"""By metric, the HELM groups for which it stands."""
COLUMNS_WITHOUT_RUNS = {
    "package pytrec_eval": {"MS MARCO (regular)", "MS MARCO (TREC)"},
    "package numba": {"Copyright (text)"},
    "package bert_score": {"CNN/DailyMail"},
    "credential perspectiveApiKey": {"RealToxicityPrompts"},
    "entries that the suite leaves out, as its file says": {
        *("Copyright (code)", "Disinformation (reiteration)", "Disinformation (wedging)", "BOLD", "ICE", "The Pile"),
        *("HumanEval (Code)", "APPS (Code)", "Synthetic efficiency"),
    },
    "the group that HELM's sampled XSum is not in": {"XSUM"},
}
"""Scenarios of HELM's leaderboard whose columns stay empty, by what is missing."""
TABLES_WITHOUT_NUMBERS = {
    "Bias": "the made-up answers name no people, and HELM's measure says nothing of such",
    "Toxicity": "crfm-helm 0.5 measures it in RealToxicityPrompts alone",
    "Efficiency (Detailed)": "HELM knows neither what the model's training took nor an idealized time of it",
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:unknown class"),  # the fake engine answers what it likes
]


class Evaluated(NamedTuple):
    """A suite that has been asked and scored."""

    output: Path
    helm: HelmSuite
    scored: Scored


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Made-up data; and HELM's downloads end at a closed door, at once."""
    folder = tmp_path_factory.mktemp("classic")
    helm_lite_data.write_punkt(folder / "nltk")
    helm_classic_data.write_all(load_suite("helm-classic"), folder / "data/scenarios")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("http_proxy", "http://127.0.0.1:9")
        patch.setenv("https_proxy", "http://127.0.0.1:9")
        patch.delenv("HELM_CREDENTIALS", raising=False)
        patch.setattr(nltk.data, "path", [str(folder / "nltk")])
        for module in (datasets, math_scenario):
            patch.setattr(module, "load_dataset", helm_classic_data.load_dataset)
        yield folder


def evaluate(folder: Path, *parts: str, max_eval_instances: int) -> Evaluated:
    """Run the entries in which any of the parts occurs; all, if there is none."""
    suite, card = load_suite("helm-classic"), build_card()
    entries = tuple(entry for entry in suite.entries if not parts or any(part in entry for part in parts))
    helm = HelmSuite(
        replace(suite, entries=entries),
        card,
        output=folder / f"helm-{len(entries)}",
        data=folder / "data",
        max_eval_instances=max_eval_instances,
        skip_missing=True,
    )
    return Evaluated(
        output=folder / f"helm-{len(entries)}",
        helm=helm,
        scored=helm.score(FakeEngine(card.tokenizer_dir).generate(helm.collect())),
    )


def groups_by_metric(scored: Scored) -> dict[str, set[str]]:
    """What each metric stands for; a group that several scenarios share, by the names of their tasks."""
    shared = {"synthetic_reasoning"}
    groups: dict[str, set[str]] = {}
    for task in scored.tasks:
        name = task.name.partition(":")[0] if task.group in shared else task.group
        groups.setdefault(task.metric, set()).add(name)
    return groups


def lacking() -> dict[str, set[str]]:
    """The tasks that cannot run on this machine, and what each of them lacks."""
    found: dict[str, set[str]] = {}
    for place, tasks in WANTED.items():
        kind, _, name = place.partition(" ")
        if kind != "package" or find_spec(name) is None:
            for task in tasks:
                found.setdefault(task, set()).add(place)
    return found


def said_to_lack(helm: HelmSuite) -> dict[str, set[str]]:
    reasons = {task: f"; {why}".split("; no ")[1:] for task, why in helm.skipped.items()}
    return {task: {why.partition(":")[0] for why in said} for task, said in reasons.items()}


def test_every_run_spec_can_be_made(offline: Path, tmp_path: Path) -> None:
    suite, card = load_suite("helm-classic"), build_card()
    register(card, tmp_path)
    set_benchmark_output_path(str(offline / "data"))
    specs = [spec for entry in suite.entries for spec in build_run_specs(entry, suite, card.deployment, None)]
    assert len(set(task_names(specs))) == len(specs) == len(suite.entries) == 92
    for spec in specs:
        assert get_class_by_name(spec.scenario_spec.class_name), spec.name
        assert spec.metric_specs and spec.groups, spec.name
        assert spec.adapter_spec.max_eval_instances == 1000 and spec.adapter_spec.num_train_trials == 1
    perturbed = [spec for spec in specs if spec.data_augmenter_spec.perturbation_specs]
    assert len(perturbed) == 38, "robust and fair answers are what Classic asks for beside accuracy"


def test_one_of_each_kind_of_file_runs_to_its_scores(offline: Path) -> None:
    found = evaluate(offline, *FORMATS, max_eval_instances=2)
    assert found.helm.failed == {}
    asked = {task.name for task in found.scored.tasks}
    assert said_to_lack(found.helm) == {task: why for task, why in lacking().items() if task in CHOSEN}
    assert len(asked) + len(found.helm.skipped) == len(FORMATS) + 2, "MATH in two ways, two tables to fill in"
    for metric, groups in groups_by_metric(found.scored).items():
        assert groups <= HEADLINES[metric], metric
    assert {instance.task for instance in found.scored.instances} == asked
    assert asked >= {
        "boolq: only_contrast, robustness_contrast_sets",
        "commonsense: hellaswag",
        "math: algebra, level=1, use_official_examples",
        "math: algebra, level=1, use_chain_of_thought",
    }


@pytest.mark.slow
def test_all_that_can_run_comes_to_the_leaderboard(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = evaluate(offline, max_eval_instances=4)
    assert said_to_lack(found.helm) == lacking()
    assert found.helm.failed == {}
    assert len(found.scored.tasks) == 92 - len(lacking())
    lacks = set().union(*lacking().values())
    wants = {"RR@10": "pytrec_eval", "NDCG@10": "pytrec_eval", "longest_common_prefix_length": "numba"}
    assert groups_by_metric(found.scored) == {
        metric: groups for metric, groups in HEADLINES.items() if f"package {wants.get(metric)}" not in lacks
    }
    tables = summarize(found.output, "helm-classic", "schema_classic.yaml", monkeypatch)
    without = set().union(*(names for why, names in COLUMNS_WITHOUT_RUNS.items() if why in lacks or "that" in why))
    empty = {
        (table["title"], column)
        for group in ("core_scenarios", "targeted_evaluations")
        for table in tables[group]
        if table["title"] not in TABLES_WITHOUT_NUMBERS
        for column in empty_columns(table)
        if column.partition(" - ")[0] not in without
    }
    assert empty == {("Calibration", f"{name} - ECE (10-bin)") for name in ("HellaSwag", "OpenbookQA")}, (
        "of choices that are scored one by one HELM keeps no calibration"
    )


def test_every_task_has_a_number_that_stands_for_it(offline: Path, tmp_path: Path) -> None:
    """Declared by its scenario, or else of the metrics that HELM Classic's schema shows."""
    suite, card = load_suite("helm-classic"), build_card()
    register(card, tmp_path)
    set_benchmark_output_path(str(offline / "data"))
    undeclared = {}
    for entry in suite.entries:
        (spec,) = build_run_specs(entry, suite, card.deployment, None)
        scenario = create_scenario(spec.scenario_spec)
        try:
            declared = scenario.get_metadata().main_metric
        except NotImplementedError:
            declared = "unknown"
        if declared == "unknown":
            undeclared[scenario.name] = {metric.class_name.rpartition(".")[2] for metric in spec.metric_specs}
    assert undeclared.keys() == {"blimp", "synthetic_reasoning", "copyright", "real_toxicity_prompts"}
    assert "BasicReferenceMetric" in undeclared["blimp"], "exact_match"
    assert "BasicGenerationMetric" in undeclared["synthetic_reasoning"], "quasi_exact_match"
    assert "ToxicityMetric" in undeclared["real_toxicity_prompts"], "toxic_frac"
    assert "BasicCopyrightMetric" in undeclared["copyright"], "longest_common_prefix_length"
    assert {"toxic_frac", "longest_common_prefix_length"} < LOWER_IS_BETTER & set(PREFERENCE)
