"""The journal gives back what was written, loses at most a line that was being written, and never invents one."""

from __future__ import annotations

import dataclasses
import json
import resource
import signal
from pathlib import Path

import numpy as np
import pytest

from flexeval.distributions import row_type
from flexeval.errors import DiskError
from flexeval.journal import Journal
from flexeval.request import Completion, FinishReason, Request

FIRST, SECOND = Request(prompt="one"), Request(prompt=(1, 2), max_tokens=3, stop=("\n", "é"), temperature=0.5)
PLAIN = Completion(
    text="né\ud800",
    token_ids=(5, 6),
    tokens=("n", "bytes:\\xc3"),
    logprobs=(-0.1, -2.5e-7),
    finish_reason=FinishReason.STOP,
    num_prompt_tokens=3,
    num_generated_tokens=4,
    top_logprobs=({"n": -0.1, " ": -3.0}, {}),
    elapsed_s=0.25,
)
FORKED = dataclasses.replace(PLAIN, alternatives=(dataclasses.replace(PLAIN, finish_reason=FinishReason.LENGTH),))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "deep" / "journal.jsonl"
    with Journal(path) as journal:
        journal.add([(FIRST, PLAIN)])
        journal.add_usage({"load_s": 1.5})
        journal.add([(SECOND, FORKED)])
    return path


def test_answers_come_back_as_they_were(path: Path) -> None:
    with Journal(path) as journal:
        assert journal[FIRST] == PLAIN
        assert journal[SECOND] == FORKED
        assert Request(prompt="three") not in journal
        assert journal.usages == [{"load_s": 1.5}]


def test_distributions_come_back_as_they_were(path: Path) -> None:
    rows = np.zeros(3, row_type(2))
    rows["context"], rows["logprob"], rows["top_tokens"] = 2**64 - 1, [-0.1, -np.inf, -1e-30], [[1, 2], [3, -1], [5, 6]]
    kept = Request(prompt="kept", keep_top=2)
    answer = dataclasses.replace(
        PLAIN, distributions=rows, alternatives=(dataclasses.replace(PLAIN, distributions=rows[:1]),)
    )
    with Journal(path) as journal:
        journal.add([(kept, answer)])
    with Journal(path) as journal:
        back = journal[kept]
        assert back.distributions is not None and (back.distributions == rows).all()
        assert back.alternatives[0].distributions is not None and (back.alternatives[0].distributions == rows[:1]).all()
        assert journal[FIRST].distributions is None
        assert [len(one) for one in journal.rows(2)] == [3, 1]
        assert journal.rows(5) == []


def test_answers_are_on_disk_when_add_returns(path: Path) -> None:
    with Journal(path) as journal:
        journal.add([(Request(prompt="three"), PLAIN)])
        with Journal(path.with_name("copy")) as copy:  # as another process would find the bytes
            assert FIRST not in copy
        path.with_name("copy").write_bytes(path.read_bytes())
    with Journal(path.with_name("copy")) as copy:
        assert copy[Request(prompt="three")] == PLAIN


def test_a_torn_last_line_is_dropped_wherever_it_tore(path: Path, tmp_path: Path) -> None:
    whole = path.read_bytes()
    last_line = whole.rindex(b"\n", 0, -1) + 1
    for end in range(last_line, len(whole)):
        torn = tmp_path / "torn.jsonl"
        torn.write_bytes(whole[:end])
        with Journal(torn) as journal:
            assert journal[FIRST] == PLAIN
            assert SECOND not in journal
            journal.add([(SECOND, FORKED)])
        assert torn.read_bytes() == whole


@pytest.mark.parametrize(
    "rubbish", [b"\0" * 9, b"{", b"3", b"null", b"[]", b'"usage"', b"{}", b'{"key": "k", "completion": {"text": 1}}']
)
def test_a_line_that_cannot_be_read_is_passed_over(path: Path, rubbish: bytes) -> None:
    first, rest = path.read_bytes().split(b"\n", 1)
    path.write_bytes(first + b"\n" + rubbish + b"\n" + rest)
    with Journal(path) as journal:
        assert (journal[FIRST], journal[SECOND], len(journal.usages)) == (PLAIN, FORKED, 1)
    assert path.read_bytes().endswith(rest)


def test_a_line_that_was_changed_anywhere_is_passed_over(path: Path) -> None:
    """A digit that rots would be another answer, and nobody would see it."""
    whole = path.read_bytes()
    end = whole.index(b"\n")
    for place in range(end):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with Journal(path) as journal:
            assert FIRST not in journal and journal[SECOND] == FORKED, place


def test_lines_of_earlier_versions_are_read(path: Path) -> None:
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text(
        "".join(json.dumps({key: entry[key] for key in entry if key != "digest"}) + "\n" for entry in entries)
    )
    with Journal(path) as journal:
        assert (journal[FIRST], journal[SECOND], len(journal.usages)) == (PLAIN, FORKED, 1)


def test_a_fresh_journal_forgets_what_was_there(path: Path) -> None:
    with Journal(path, fresh=True) as journal:
        assert FIRST not in journal and journal.usages == []
        journal.add([(SECOND, FORKED)])
    with Journal(path) as journal:
        assert FIRST not in journal and journal[SECOND] == FORKED


def test_a_full_disk_is_said_with_the_path_and_costs_no_answer(path: Path) -> None:
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 30, hard))
    try:
        with Journal(path) as journal:
            with pytest.raises(DiskError, match="journal"):
                journal.add([(Request(prompt="three"), PLAIN)])
            with pytest.raises(DiskError, match="journal"):
                journal.add_usage({"load_s": 1.5})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert path.read_bytes() == before, "what of the line was written is taken back"
    with Journal(path) as journal:
        assert (journal[FIRST], journal[SECOND]) == (PLAIN, FORKED)
        assert Request(prompt="three") not in journal
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [None, b"", b'{"key": "to'])
def test_a_journal_without_answers_leaves_no_file(path: Path, content: bytes | None) -> None:
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with Journal(path):
        pass
    assert not path.exists()


def test_different_requests_are_different(path: Path) -> None:
    with Journal(path) as journal:
        for field, value in {"max_tokens": 4, "stop": ("\n",), "temperature": 0.0, "seed": 1, "echo": True}.items():
            assert dataclasses.replace(SECOND, **{field: value}) not in journal, field


def test_a_journal_is_not_written_through_a_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("a line\nand no end")
    (tmp_path / "journal.jsonl").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"), Journal(tmp_path / "journal.jsonl"):
        raise AssertionError
    assert victim.read_text() == "a line\nand no end"
