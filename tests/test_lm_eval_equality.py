"""lm-evaluation-harness itself, on the same tasks and the same model: equal prompts, log-likelihoods and scores."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval_tasks import TASKS, write_tasks
from tiny_directory import write_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexeval import pipeline
from flexeval.asked import RunOptions
from flexeval.progress import LineProgress

lm_eval = pytest.importorskip("lm_eval", reason="pip install 'flexeval[dev]'")

NAMES = [name for name in TASKS if name != "_base"]
METRICS = {
    "capitals": ["acc", "acc_norm", "acc_bytes"],
    "letters": ["acc", "acc_norm"],
    "firsts": ["acc", "acc_norm"],
    "written": ["exact_match,letters", "exact_match,whole"],
    "several": ["exact_match"],
    "inputs": ["acc", "acc_norm"],
    "coded": ["acc", "acc_norm"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("lm_eval"))


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "bos"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny", adds_bos=request.param)


@pytest.fixture(scope="module")
def theirs(folder: Path, model: Path) -> dict[str, Any]:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    before = Path.cwd()
    os.chdir(folder)  # where it looks for data files
    try:
        network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        found = lm_eval.simple_evaluate(
            model=HFLM(pretrained=network, tokenizer=AutoTokenizer.from_pretrained(model), batch_size=1),
            tasks=NAMES,
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
            log_samples=True,
            bootstrap_iters=0,
        )
    finally:
        os.chdir(before)
    assert found is not None
    return dict(found)


@pytest.fixture(scope="module")
def ours(folder: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    options = RunOptions(
        suite=f"lm-eval:{folder}", model=str(model), out=out, dtype="float32", device="cpu", keep_top=0
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEXEVAL_ALLOW_TASK_CODE", "1")
        pipeline.run_suite(options, LineProgress(lambda line: None))
    return out


def read(out: Path, task: str, file: str) -> Any:
    (path,) = out.glob(f"helm/runs/*/lm_eval:task={task},*/{file}")
    return json.loads(path.read_text())


@pytest.mark.parametrize("task", NAMES)
def test_prompts_and_answers_are_equal(task: str, theirs: dict[str, Any], ours: Path, model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    states = iter(read(ours, task, "scenario_state.json")["request_states"])
    samples = sorted(theirs["samples"][task], key=lambda sample: (sample["filter"], sample["doc_id"]))
    seen: dict[int, dict[str, Any]] = {sample["doc_id"]: sample for sample in samples}
    assert len(seen) == 5
    for _, sample in sorted(seen.items()):
        for arguments, (answer,) in zip(sample["arguments"], sample["resps"], strict=True):
            state, (context, rest) = next(states), arguments
            (completion,) = state["result"]["completions"]
            if isinstance(rest, dict):
                assert state["request"]["prompt"] == context
                assert state["request"]["stop_sequences"] == (
                    [rest["until"]] if rest["until"] == "e" else rest["until"]
                )
                assert completion["text"].replace("<s>", "") == answer, "special tokens are not in their answers"
                continue
            assert state["request"]["prompt"] == context + rest
            num = len(tokenizer(context + rest)["input_ids"]) - len(tokenizer(context.rstrip())["input_ids"])
            logprob = sum(token["logprob"] for token in completion["tokens"][-num:])
            assert logprob == pytest.approx(answer[0], abs=1e-4)
    assert next(states, None) is None


@pytest.mark.parametrize("task", NAMES)
def test_scores_are_equal(task: str, theirs: dict[str, Any], ours: Path) -> None:
    stats = {
        stat["name"]["name"]: stat for stat in read(ours, task, "stats.json") if stat["name"].get("split") == "test"
    }
    for metric in METRICS[task]:
        key = metric if "," in metric else f"{metric},none"
        assert stats[metric]["mean"] == pytest.approx(theirs["results"][task][key])
    per_question = read(ours, task, "per_instance_stats.json")
    head, _, name = METRICS[task][0].partition(",")
    expected = {f"id{s['doc_id']}": s[head] for s in theirs["samples"][task] if s["filter"] == (name or "none")}
    found = {
        one["instance_id"]: stat["mean"]
        for one in per_question
        for stat in one["stats"]
        if stat["name"]["name"] == METRICS[task][0]
    }
    assert found == pytest.approx(expected)


def test_the_report_shows_them(ours: Path) -> None:
    results = json.loads((ours / "results.json").read_text())
    shown = {task["name"]: task["metric"] for task in results["tasks"]}
    assert shown == {f"lm_eval: {name}": METRICS[name][0] for name in NAMES}
    assert all("lm-evaluation-harness" in task["source"] for task in results["tasks"])
