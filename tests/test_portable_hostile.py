"""Files of prompts and answers from strangers: refused in one line, whatever is wrong, and never with much memory.

HOSTILE_EXAMPLES=1000 looks longer than CI does.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from json_mutations import damaged, mutations
from pyarrow import parquet
from test_portable import ANSWERS, PROMPTS, REQUESTS, ROWS, completion

from flexeval import portable, remote
from flexeval.distributions import Answered, check, gather
from flexeval.errors import FlexevalError, ResultsError
from flexeval.journal import completion_to_json
from flexeval.parquet import load, save, save_texts
from flexeval.portable import AnswersFile, Prompts, read_answers, read_prompts
from flexeval.report.merge import distribution_path

EXAMPLES = settings(
    max_examples=int(os.environ.get("HOSTILE_EXAMPLES", "40")),
    suppress_health_check=list(HealthCheck),
    deadline=None,
)
PROMPT_COLUMNS = {
    "prompt": [request.prompt for request in REQUESTS],
    "options": [
        {name: value for name, value in dataclasses.asdict(request).items() if name != "prompt"} for request in REQUESTS
    ],
}
ANSWER_COLUMNS = {
    "request": [request.content_hash() for request in REQUESTS],
    "text": ["x", "y", "z"],
    "answer": [
        completion_to_json(
            dataclasses.replace(
                completion("x"), num_prompt_tokens=2, alternatives=(completion("x"),) * (request.num_completions - 1)
            )
        )
        for request in REQUESTS
    ],
}
PROMPTS_INFO, ANSWERS_INFO = (json.loads(json.dumps(dataclasses.asdict(info))) for info in (PROMPTS, ANSWERS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


def write(path: Path, kind: str, info: Any, columns: dict[str, list[Any]], about: dict[str, Any] | None = None) -> Path:
    """A file whose digest is right, whatever is in it."""
    texts = {
        name: [one if isinstance(one, str) else json.dumps(one) for one in cells] for name, cells in columns.items()
    }
    digest = portable._digest(kind, info, texts)
    facts = {"kind": kind, "version": portable.VERSION, "info": info, "digest": digest} | (about or {})
    save_texts(texts, path, metadata={b"flexeval": json.dumps(facts)})
    return path


def use(path: Path, kind: str) -> Prompts | AnswersFile | None:
    """Read a file, and do with it what `score` does: it serves, or is refused in one line that names it."""
    try:
        found = read_prompts(path) if kind == "prompts" else read_answers(path)
        if isinstance(found, AnswersFile):
            prompts = Prompts(info=PROMPTS, requests=REQUESTS, digest=found.info.prompts)
            remote._check(prompts, path, [found], [path])
            assert distribution_path(path.parent, found.info.setting).parent.parent == path.parent
            for answer in found.completions.values():
                assert answer.distributions is not None
                given = [Answered(1, answer.token_ids[: answer.num_prompt_tokens], True, answer.distributions)]
                gather(given, [answer.distributions], vocabulary=5)
    except ResultsError as error:
        line = str(error)
        assert str(path) in line and len(line) < 3000, line
        assert line.isprintable(), line
        return None
    return found


def test_what_is_not_changed_is_read(folder: Path) -> None:
    prompts = use(write(folder / "prompts.parquet", "prompts", PROMPTS_INFO, PROMPT_COLUMNS), "prompts")
    assert isinstance(prompts, Prompts) and (prompts.info, prompts.requests) == (PROMPTS, REQUESTS)
    found = use(write(folder / "answers.parquet", "answers", ANSWERS_INFO, ANSWER_COLUMNS), "answers")
    assert isinstance(found, AnswersFile) and found.info == ANSWERS


@pytest.mark.parametrize(
    ("kind", "changes", "what"),
    [
        ("prompts", {"vocabulary": "5"}, "vocabulary is '5', not a whole number"),
        ("prompts", {"vocabulary": -1}, "vocabulary -1"),
        ("prompts", {"context_length": 0}, "context_length 0"),
        ("prompts", {"context_length": True}, "context_length is True, not a whole number"),
        ("prompts", {"max_eval_instances": [3]}, "max_eval_instances is a list, not a whole number"),
        ("prompts", {"suite": None}, "suite is None, not a text"),
        ("prompts", {"is_chat": 1}, "is_chat is 1, not true or false"),
        ("prompts", {"colour": 1}, "colour is unknown"),
        ("answers", {"setting": "../../../tmp/x"}, r"unknown setting '\.\./\.\./\.\./tmp/x'"),
        ("answers", {"setting": "w8"}, "the cost of 'w4'"),
        ("answers", {"keep_top": 2**40}, "keep_top"),
        ("answers", {"cost": ANSWERS_INFO["cost"] | {"setting": "../x"}}, r"the cost of '\.\./x'"),
        ("answers", {"cost": ANSWERS_INFO["cost"] | {"num_requests": -3}}, r"cost\.num_requests is -3, less than 0"),
        (
            "answers",
            {"cost": ANSWERS_INFO["cost"] | {"elapsed_s": float("nan")}},
            r"elapsed_s is no number of s",
        ),
        ("answers", {"cost": ANSWERS_INFO["cost"] | {"peak_bytes": {"cpu": "5"}}}, r"cost\.peak_bytes\.cpu is '5'"),
        ("answers", {"cost": {}}, r"cost\.backend is missing"),
        ("answers", {"machine": {"processor": 5}}, r"machine\.processor is 5, not a text"),
    ],
)
def test_facts_of_the_wrong_kind_are_named(kind: str, changes: dict[str, Any], what: str, folder: Path) -> None:
    info, columns = (PROMPTS_INFO, PROMPT_COLUMNS) if kind == "prompts" else (ANSWERS_INFO, ANSWER_COLUMNS)
    path = write(folder / "facts.parquet", kind, info | changes, columns)
    with pytest.raises(ResultsError, match=rf"{what}.*facts\.parquet.*Copy it again, or make it anew"):
        read_prompts(path) if kind == "prompts" else read_answers(path)


def with_answer(**changes: Any) -> dict[str, list[Any]]:
    first, *others = ANSWER_COLUMNS["answer"]
    return ANSWER_COLUMNS | {"answer": [first | changes, *others]}


@pytest.mark.parametrize(
    "columns",
    [
        with_answer(token_ids=[-1, 2]),
        with_answer(logprobs=[0.0, float("nan")]),
        with_answer(logprobs=[0.0]),
        with_answer(logprobs=[0.0, 1e300]),
        with_answer(elapsed_s=1e308),
        with_answer(tokens=["a", "\ud800"]),
        with_answer(finish_reason="tired"),
        with_answer(num_generated_tokens=-2),
        with_answer(alternatives=[]) | {"request": ANSWER_COLUMNS["request"][::-1]},
        with_answer(alternatives=3),
        with_answer(distributions=None),
        with_answer(distributions={"num_top": 10**12, "rows": ""}),
        with_answer(distributions={"num_top": 2, "rows": "AAAA"}),
        with_answer(distributions={"num_top": 3, "rows": ""}),
        with_answer(text=None),
        ANSWER_COLUMNS | {"answer": ["[" * 100_000, *ANSWER_COLUMNS["answer"][1:]]},
        ANSWER_COLUMNS | {"answer": ["NaN", "3", "{"]},
        ANSWER_COLUMNS | {"request": ["x"] * 3},
    ],
)
def test_answers_that_are_none_are_refused(columns: dict[str, list[Any]], folder: Path) -> None:
    assert use(write(folder / "cells.parquet", "answers", ANSWERS_INFO, columns), "answers") is None


def test_rows_of_distributions_that_are_none_are_refused() -> None:
    check(ROWS)
    odd = {"logprob": np.nan, "top_logprobs": 0.5, "sampled_logprobs": np.inf, "threshold": np.nan}
    for name, value in odd.items():
        rows = ROWS.copy()
        rows[name][0] = value
        with pytest.raises(ValueError, match=name):
            check(rows)


@pytest.mark.parametrize(
    ("values", "what"),
    [
        (pyarrow.array([1, 2, 3]), "of type int64, not of texts"),
        (pyarrow.array(["a", None, "b"]), "cells are empty"),
        (pyarrow.array([b"a", b"\xff", b"c"]), "not of texts"),
        (pyarrow.array([["a"], [], ["b"]]), "not of texts"),
    ],
)
def test_columns_of_another_type_are_refused(values: pyarrow.Array, what: str, folder: Path) -> None:
    path = write(folder / "columns.parquet", "prompts", PROMPTS_INFO, PROMPT_COLUMNS)
    table = parquet.read_table(path)
    parquet.write_table(table.set_column(0, "prompt", values), path)
    with pytest.raises(ResultsError, match=rf"{what}.*columns\.parquet"):
        read_prompts(path)


@pytest.mark.parametrize(
    "values",
    [
        pyarrow.array([1, None, 3]),
        pyarrow.array(["a", "b", "c"]),
        pyarrow.array([[1, 2], None, [3, 4]], pyarrow.list_(pyarrow.int32(), 2)),
        pyarrow.array([[1, None], [2, 3], [3, 4]], pyarrow.list_(pyarrow.int32(), 2)),
        pyarrow.array([[1], [2, 3], []]),
        pyarrow.array([1, 2, 3], pyarrow.timestamp("s")),
    ],
)
def test_arrays_of_another_type_are_refused(values: pyarrow.Array, folder: Path) -> None:
    path = folder / "arrays.parquet"
    parquet.write_table(pyarrow.table({"a": values}), path)
    with pytest.raises(ResultsError, match=r"arrays\.parquet"):
        load(path)


BOMBS = {
    "nulls": lambda: parquet_table(pyarrow.nulls(2_000_000, pyarrow.string())),
    "repeated": lambda: parquet_table(
        pyarrow.DictionaryArray.from_arrays(pyarrow.array(np.zeros(100_000, np.int32)), pyarrow.array(["x" * 100_000]))
    ),
    "page": lambda: parquet_table(pyarrow.array(["x" * 70_000_000])),
    "prefixes": lambda: parquet_table(pyarrow.array(["x" * 100_000] * 700)),
    "numbers": lambda: pyarrow.table({"a": np.zeros(10_000_000)}),
}
WRITING = {
    "page": {"use_dictionary": False},
    "prefixes": {
        "use_dictionary": False,
        "column_encoding": dict.fromkeys(("prompt", "options"), "DELTA_BYTE_ARRAY"),
    },
}
READER = """
import resource, sys
from pathlib import Path
import pyarrow.compute, pyarrow.parquet
from flexeval.errors import ResultsError
from flexeval.parquet import load
from flexeval.portable import read_prompts
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in map(Path, sys.argv[1:]):
    for read in (load, read_prompts):
        try:
            read(path)
        except ResultsError as error:
            assert path.name in str(error)
            print(path.stem)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def parquet_table(values: pyarrow.Array) -> pyarrow.Table:
    about = json.dumps({"kind": "prompts", "version": 1, "info": PROMPTS_INFO, "digest": "x"})
    return pyarrow.table({"prompt": values, "options": values}).replace_schema_metadata({b"flexeval": about})


def test_small_files_that_stand_for_gigabytes_take_no_memory(folder: Path) -> None:
    paths = []
    for name, make in BOMBS.items():
        paths.append(folder / f"{name}.parquet")
        parquet.write_table(make(), paths[-1], compression="zstd", **WRITING.get(name, {}))
        assert paths[-1].stat().st_size < 100_000, name
    done = subprocess.run([sys.executable, "-c", READER, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *refused, num_kib = done.stdout.split()
    assert refused == [name for name in BOMBS for _ in range(2)]
    assert int(num_kib) < 150 * 2**10


@EXAMPLES
@given(data=st.data())
def test_damaged_files_are_refused_or_unchanged(data: st.DataObject, folder: Path) -> None:
    kind = data.draw(st.sampled_from(["prompts", "answers"]))
    columns, info = (PROMPT_COLUMNS, PROMPTS_INFO) if kind == "prompts" else (ANSWER_COLUMNS, ANSWERS_INFO)
    whole = write(folder / f"whole-{kind}.parquet", kind, info, columns)
    path = folder / "damaged.parquet"
    path.write_bytes(data.draw(damaged(whole.read_bytes())))
    assert use(path, kind) in (None, use(whole, kind))


@EXAMPLES
@given(data=st.data())
def test_facts_and_cells_with_something_odd_in_them_are_refused_or_serve(data: st.DataObject, folder: Path) -> None:
    kind = data.draw(st.sampled_from(["prompts", "answers"]))
    columns, info = (PROMPT_COLUMNS, PROMPTS_INFO) if kind == "prompts" else (ANSWER_COLUMNS, ANSWERS_INFO)
    about: dict[str, Any] = {}
    what = data.draw(st.sampled_from(["info", "about", "cell"]))
    if what == "info":
        info = data.draw(mutations(info))
    elif what == "about":
        about = {data.draw(st.sampled_from(["kind", "version", "info", "digest"])): data.draw(mutations(info))}
    else:
        name = "options" if kind == "prompts" else "answer"
        first, *others = columns[name]
        columns = columns | {name: [json.dumps(data.draw(mutations(json.loads(json.dumps(first))))), *others]}
    use(write(folder / "odd.parquet", kind, info, columns, about), kind)


@EXAMPLES
@given(data=st.data())
def test_damaged_distributions_are_refused_or_are_numbers(data: st.DataObject, folder: Path) -> None:
    path = folder / "rows.parquet"
    save(ROWS, path)
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    try:
        load(path)
    except FlexevalError as error:
        assert "rows.parquet" in str(error)
