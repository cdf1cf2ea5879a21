"""The perplexity task: windows that hold the whole text, and figures that transformers gives for the same windows."""

import json
import math
from pathlib import Path

import pytest
import torch
from helm_support import build_card, build_suite, run_suite
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexeval import pipeline
from flexeval.asked import RunOptions
from flexeval.benchmark.helm import HelmSuite
from flexeval.benchmark.resources import import_tasks
from flexeval.errors import DataError
from flexeval.models import ModelSource
from flexeval.progress import LineProgress

TEXT = "Wer reitet so spät durch Nacht und Wind?\nEs ist der Vater — mit seinem Kind;\n\n" * 40


@pytest.fixture(scope="module")
def task():
    return next(module for module in import_tasks() if module.__name__.endswith(".perplexity"))


@pytest.fixture
def poem(tmp_path: Path) -> Path:
    path = tmp_path / "poem.txt"
    path.write_text(TEXT.replace("—", "-").replace("ä", "ae"), encoding="utf-8")  # the fake engine splits characters
    return path


@pytest.mark.parametrize("num_bytes", [1, 100, 1000])
def test_windows_follow_one_another_and_are_of_one_size(task, num_bytes):
    windows = list(task.cut(TEXT, num_bytes))
    words = TEXT.split()
    assert [word for window in windows for word in window.split()] == words[: sum(len(w.split()) for w in windows)]
    longest = max(len(word.encode()) for word in words)
    sizes = [len(window.encode()) for window in windows]
    assert all(num_bytes - 2 <= size <= num_bytes + longest + 2 for size in sizes)
    assert len(TEXT.encode()) - sum(sizes) < num_bytes + 4 * len(windows), "the rest would be a window, too"
    assert list(task.cut(TEXT, len(TEXT.encode()) + 1)) == []


@pytest.mark.usefixtures("packaged_questions")
def test_the_factbook_is_plain_prose(task):
    text = task.read_factbook()
    assert text.startswith("Algeria\n\nAlgeria has known many empires and dynasties, including the ancient Numidians")
    assert len(list(task.cut(text, 4096))) == 113
    assert not set("<>\N{NO-BREAK SPACE}") & set(text) and "&nbsp;" not in text


def test_a_text_of_the_users_own_is_scored_token_by_token(poem: Path, tmp_path: Path):
    entry = f"perplexity:model=text,window_bytes=500,path={poem}"
    requests, completions, scored = run_suite(build_suite(entry), tmp_path, build_card())
    (info,) = scored.tasks
    assert (info.name, info.metric, info.group) == ("perplexity: poem", "bits_per_byte", "perplexity")
    assert not info.higher_is_better and info.source == f"The text {poem}"
    answers = {request.prompt: completion for request, completion in zip(requests, completions, strict=True)}
    assert len(scored.instances) == 6 and answers.keys() == {result.prompt for result in scored.instances}
    assert all(request.echo and request.max_tokens == 0 for request in requests)
    for result in scored.instances:
        completion = answers[result.prompt]
        num_bytes = len(result.prompt.encode()) - len(completion.tokens[0].encode())  # the first is the prefix token
        assert result.score == pytest.approx(-sum(completion.logprobs) / math.log(2) / num_bytes)


def test_a_text_that_is_not_there_is_missing_data(tmp_path: Path):
    suite = build_suite(f"perplexity:model=text,path={tmp_path}/nothing.txt")
    with pytest.raises(DataError, match=f"Expected: {tmp_path}/nothing.txt for perplexity"):
        HelmSuite(suite, build_card(), output=tmp_path).collect()


@pytest.mark.usefixtures("packaged_questions")
def test_bits_per_byte_and_perplexity_are_transformers(smollm2: ModelSource, tmp_path: Path):
    suite = tmp_path / "small.conf"
    suite.write_text('entries: [{description: "perplexity:model=text,window_bytes=1024", priority: 1}]')
    options = RunOptions(suite=str(suite), out=tmp_path / "out", max_eval_instances=3, dtype="float32")
    results = pipeline.run_suite(options, LineProgress(lambda line: None)).results
    assert results.tasks[0].source.startswith("Country histories of The World Factbook")

    tokenizer = AutoTokenizer.from_pretrained(smollm2.tokenizer_dir)
    model = AutoModelForCausalLM.from_pretrained(smollm2.directory, dtype=torch.float32)
    losses, num_tokens, num_bytes = [], 0, 0
    for instance in results.instances:
        ids = torch.tensor([tokenizer.encode(instance.prompt)])
        with torch.no_grad():
            loss = float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        size = len(instance.prompt.removeprefix(tokenizer.bos_token).encode())
        assert instance.score == pytest.approx(loss / math.log(2) / size, rel=1e-4)
        losses.append(loss)
        num_tokens += ids.shape[1] - 1
        num_bytes += size
    (folder,) = (tmp_path / "out/helm/runs/small").glob("perplexity*")
    stats = {stat["name"]["name"]: stat for stat in json.loads((folder / "stats.json").read_text())}
    assert stats["num_perplexity_tokens"]["mean"] * 3 == pytest.approx(num_tokens)
    assert stats["num_bytes"]["mean"] * 3 == pytest.approx(num_bytes)
    assert stats["perplexity"]["mean"] == pytest.approx(math.exp(sum(losses) / num_tokens), rel=1e-4)
    assert stats["bits_per_byte"]["mean"] == pytest.approx(sum(losses) / math.log(2) / num_bytes, rel=1e-4)
    mean = sum(instance.score for instance in results.instances) / len(results.instances)
    assert mean == pytest.approx(stats["bits_per_byte"]["mean"], rel=1e-3), "each window weighs the same"
