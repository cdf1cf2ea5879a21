"""Our two halves of a run against HELM's own runner, and a document scored whichever way the tokenizer begins."""

import json
from pathlib import Path
from typing import Any

import pytest
from helm.benchmark.executor import ExecutionSpec
from helm.benchmark.run_spec import RunSpec
from helm.benchmark.runner import set_benchmark_output_path
from helm.common.authentication import Authentication
from helm_support import FakeEngine, build_card, build_suite, run_suite

import flexeval
from flexeval.benchmark.helm.entries import build_run_specs
from flexeval.helm_plugin import FlexevalRunner

FILES = ("run_spec.json", "scenario.json", "scenario_state.json", "stats.json", "per_instance_stats.json")
ENTRIES = (
    "simple_mcqa:model=text",
    "simple_classification:model=text,data_augmentation=typo_medium",
    "synthetic_reasoning_natural:model=text,difficulty=easy,num_outputs=2,temperature=1",
    "hellaswag_packaged:model=text,method=multiple_choice_separate_calibrated",
    "document:model=text",
)
BATCH_DEPENDENT = {"request_datetime", "batch_size", "batch_request_time"}
BATCH_DEPENDENT_STATS = {"batch_size", "inference_runtime", "inference_denoised_runtime"}

pytestmark = pytest.mark.filterwarnings("ignore:unknown class")  # the fake engine answers what it likes


def contents(folder: Path) -> dict[str, Any]:
    """A run's files, without the clock and the size of the batch."""
    return {name: strip(json.loads((folder / name).read_text())) for name in FILES}


def strip(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: strip(inner) for key, inner in value.items() if key not in BATCH_DEPENDENT}
    if isinstance(value, list):
        return [strip(inner) for inner in value if not is_about_the_batch(inner)]
    return value


def is_about_the_batch(value: Any) -> bool:
    name = value.get("name") if isinstance(value, dict) else None
    return isinstance(name, dict) and name.get("name") in BATCH_DEPENDENT_STATS


def run_with_helms_runner(specs: list[RunSpec], output: Path) -> None:
    local = str(output / "prod_env")
    spec = ExecutionSpec(url=None, auth=Authentication(""), local_path=local, parallelism=2)
    FlexevalRunner(spec, str(output), "test", False, False, False, False, True).run_all(specs)


@pytest.mark.parametrize("num_train_trials", [1, 2])
def test_merged_runs_write_what_helms_runner_writes_run_by_run(
    num_train_trials: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged, single = tmp_path / "merged", tmp_path / "single"
    suite = build_suite(*ENTRIES, max_eval_instances=6, num_train_trials=num_train_trials)
    card = build_card()
    requests, _, _ = run_suite(suite, merged, card)

    engine = FakeEngine(card.tokenizer_dir)
    engine_class = type("Engine", (), {"load": staticmethod(lambda model, **options: engine)})
    monkeypatch.setitem(vars(flexeval), "Engine", engine_class)
    set_benchmark_output_path(str(single))
    specs = [spec for entry in ENTRIES for spec in build_run_specs(entry, suite, card.deployment, None)]
    run_with_helms_runner(specs, single)

    names = {path.parent.name for path in (merged / "runs/test").glob("*/run_spec.json")}
    assert names == {spec.name for spec in specs} and len(names) == len(ENTRIES)
    for name in names:
        assert contents(merged / "runs/test" / name) == contents(single / "runs/test" / name), name
    assert len(engine.batches) == len(ENTRIES)
    assert {request for batch in engine.batches for request in batch} == set(requests)


@pytest.mark.parametrize("adds_bos", [False, True])
def test_every_token_of_a_document_is_scored_once(adds_bos: bool, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    card = build_card(adds_bos=adds_bos)
    requests, completions, scored = run_suite(build_suite("document:model=text"), tmp_path, card)
    assert len(requests) > 2, "the first document does not fit in one window"
    assert [task.metric for task in scored.tasks] == ["bits_per_byte"]
    assert not scored.tasks[0].higher_is_better
    assert len(scored.instances) == 2

    tokenizer = AutoTokenizer.from_pretrained(card.tokenizer_dir)
    state = json.loads(next((tmp_path / "runs/test").glob("document*/scenario_state.json")).read_text())
    stats = json.loads(next((tmp_path / "runs/test").glob("document*/per_instance_stats.json")).read_text())
    texts = {one["instance"]["id"]: one["instance"]["input"]["text"] for one in state["request_states"]}
    for identity, text in texts.items():
        counted = sum(
            stat["sum"]
            for item in stats
            if item["instance_id"] == identity
            for stat in item["stats"]
            if stat["name"]["name"] == "num_perplexity_tokens"
        )
        assert counted == len(tokenizer.encode(text, add_special_tokens=False))
    for one in state["request_states"]:
        (completion,) = one["result"]["completions"]
        assert completion["text"] == one["request"]["prompt"]
    firsts = [completion.tokens[0] == "<s>" for completion in completions]
    assert all(firsts) if adds_bos else not all(firsts)
