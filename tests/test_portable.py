"""Files of prompts and answers: whole, or refused in one line."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from flexeval import portable
from flexeval.distributions import row_type
from flexeval.errors import ResultsError
from flexeval.portable import (
    AnswersInfo,
    PromptsInfo,
    read_answers,
    read_prompts,
    write_answers,
    write_prompts,
)
from flexeval.request import Completion, FinishReason, Message, Request
from flexeval.results import SettingResult

PROMPTS = PromptsInfo(
    suite="demo",
    model="smollm2",
    vocabulary=2**63 + 5,
    context_length=2048,
    max_eval_instances=None,
    skip_missing=False,
    is_chat=False,
)
COST = SettingResult(
    setting="w4",
    backend="flexeval",
    elapsed_s=1.5,
    load_s=0.5,
    num_requests=3,
    num_prompt_tokens=9,
    num_computed_prompt_tokens=9,
    num_generated_tokens=6,
    peak_bytes={"cpu": 5},
    policy={"block": {"size": 2}},
    lanes={"disk": {"busy_s": 0.5, "num_bytes": 7}},
)
ANSWERS = AnswersInfo(
    prompts="abc",
    setting="w4",
    model="smollm2",
    fingerprint="f",
    keep_top=2,
    cost=COST,
    machine={"processor": "x"},
    versions={"torch": "2"},
)
REQUESTS = [
    Request(prompt="Héllo\n\u2028世界 \x00", max_tokens=3, stop=("\n", "###"), temperature=0.7, top_p=0.9, seed=7),
    Request(prompt="1 + 1 =", max_tokens=0, echo=True, top_logprobs=2),
    Request(prompt="a", num_completions=2),
]


ROWS = np.zeros(3, row_type(2))
ROWS["position"], ROWS["logprob"] = [1, 2, 3], -0.25


def completion(text: str) -> Completion:
    return Completion(
        text=text,
        token_ids=(1, 2),
        tokens=("a", "bytes:\\xe2"),
        logprobs=(0.0, -0.1234567890123),
        finish_reason=FinishReason.STOP,
        num_prompt_tokens=4,
        num_generated_tokens=2,
        top_logprobs=({"a": -0.5},),
        elapsed_s=0.25,
        distributions=ROWS,
    )


def answers() -> list[Completion]:
    return [dataclasses.replace(completion(text), alternatives=(completion("other"),)) for text in ("x", "\ud800", "")]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.parquet"
    write_prompts(path, PROMPTS, REQUESTS)
    return path


@pytest.fixture
def answered(tmp_path: Path) -> Path:
    path = tmp_path / "answers.parquet"
    texts = [dataclasses.replace(answer, text=answer.text.replace("\ud800", "?")) for answer in answers()]
    write_answers(path, ANSWERS, REQUESTS, texts)
    return path


def test_prompts_come_back_as_they_were(prompts: Path) -> None:
    found = read_prompts(prompts)
    assert (found.info, found.requests) == (PROMPTS, REQUESTS)
    assert found.digest == read_prompts(prompts).digest
    assert write_prompts(prompts, PROMPTS, REQUESTS[:2]) != found.digest


def test_answers_come_back_as_they_were(answered: Path) -> None:
    found = read_answers(answered)
    assert found.info == ANSWERS
    assert list(found.completions) == [request.content_hash() for request in REQUESTS]
    first = found.completions[REQUESTS[0].content_hash()]
    assert first == answers()[0]
    assert first.distributions is not None and first.distributions.tobytes() == ROWS.tobytes()


def test_answers_of_before_they_said_how_they_were_computed_are_read(tmp_path: Path) -> None:
    path = tmp_path / "old.parquet"
    old = dataclasses.asdict(ANSWERS)
    del old["is_deterministic"]
    portable._write(path, "answers", old, {"request": [], "text": [], "answer": []})
    assert read_answers(path).info == ANSWERS


def test_other_tools_can_read_them(prompts: Path, answered: Path) -> None:
    assert parquet.read_table(prompts).column("prompt").to_pylist()[1] == "1 + 1 ="
    assert parquet.read_table(answered).column("text").to_pylist()[0] == "x"


def rewritten(path: Path, change: Callable[[pyarrow.Table], pyarrow.Table]) -> None:
    parquet.write_table(change(parquet.read_table(path)), path)


def with_cell(table: pyarrow.Table, name: str, row: int, value: str) -> pyarrow.Table:
    values = table.column(name).to_pylist()
    values[row] = value
    return table.set_column(table.column_names.index(name), name, pyarrow.array(values, pyarrow.string()))


def with_about(table: pyarrow.Table, **changes: object) -> pyarrow.Table:
    about = json.loads(table.schema.metadata[b"flexeval"]) | changes
    return table.replace_schema_metadata({b"flexeval": json.dumps(about)})


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda table: with_cell(table, "prompt", 1, "1 + 2 ="), "changed after it was written"),
        (lambda table: table.slice(0, 2), "changed after it was written"),
        (lambda table: table.take([1, 0, 2]), "changed after it was written"),
        (lambda table: with_about(table, info={"suite": "other"}), "changed after it was written"),
        (lambda table: with_about(table, version=2), "its form has version 2, this flexeval reads 1"),
        (lambda table: with_about(table, kind="answers"), "this is not a file of prompts"),
        (lambda table: table.replace_schema_metadata({}), "this is not a file of prompts"),
        (lambda table: table.replace_schema_metadata({b"flexeval": b"\xff"}), "cannot be read"),
        (lambda table: table.drop_columns(["options"]), "cannot be read"),
    ],
)
def test_what_was_changed_is_refused(
    change: Callable[[pyarrow.Table], pyarrow.Table], what: str, prompts: Path
) -> None:
    rewritten(prompts, change)
    with pytest.raises(ResultsError, match=what) as caught:
        read_prompts(prompts)
    assert str(prompts) in str(caught.value) and "\n" not in str(caught.value)


def test_files_of_another_kind_are_refused(prompts: Path, answered: Path, tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match=r"not a file of answers.*flexeval execute"):
        read_answers(prompts)
    with pytest.raises(ResultsError, match=r"not a file of prompts.*flexeval prepare"):
        read_prompts(answered)
    with pytest.raises(ResultsError, match="no such file"):
        read_prompts(tmp_path / "missing.parquet")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ResultsError, match="cannot be read"):
        read_prompts(tmp_path / "text")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(data=st.data())
def test_a_flipped_byte_is_found_or_changes_nothing(data: st.DataObject, answered: Path) -> None:
    """A byte of a checksum that nobody reads, or of padding, may flip."""
    whole = answered.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    damaged = answered.with_name("damaged.parquet")
    damaged.write_bytes(whole[:place] + bytes([whole[place] ^ data.draw(st.integers(1, 255))]) + whole[place + 1 :])
    expected = read_answers(answered)
    try:
        found = read_answers(damaged)
    except ResultsError:
        return
    assert found == expected


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_file_that_is_cut_short_is_refused(share: float, answered: Path) -> None:
    whole = answered.read_bytes()
    answered.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ResultsError, match="cannot be read"):
        read_answers(answered)


def test_conversations_travel(tmp_path: Path) -> None:
    said = (Message("system", "Be brief."), Message("user", "Is it?"))
    asked = Request(prompt="", messages=said, is_chat=True)
    write_prompts(tmp_path / "prompts.parquet", PROMPTS, [asked])
    (found,) = read_prompts(tmp_path / "prompts.parquet").requests
    assert found == asked and found.content_hash() == asked.content_hash()
