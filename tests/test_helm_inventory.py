"""What a suite reads is found by having it read: there, missing, fetched, and carried to another machine."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import datasets
import helm.common.general
import pytest
from helm.benchmark.scenarios import gsm_scenario
from helm_support import build_suite
from typer.testing import CliRunner

import flexeval.assets
from flexeval.benchmark.helm.inventory import Need, take_inventory
from flexeval.cli import app

GSM = '{"question": "1 + 1?", "answer": "2 #### 2"}\n'


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Serves the files of GSM8K from the loopback interface."""
    for name in ("train", "test"):
        (tmp_path / "served").mkdir(exist_ok=True)
        (tmp_path / "served" / f"{name}.jsonl").write_text(GSM * 8)
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "served"))
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def needs(*entries: str, data: Path, downloads: bool = False) -> list[Need]:
    return take_inventory(build_suite(*entries), data, downloads=downloads)


def test_tasks_that_make_their_questions_need_nothing(tmp_path: Path) -> None:
    assert needs("simple_mcqa:model=text", "dyck_language:num_parenthesis_pairs=2,model=text", data=tmp_path) == []


def test_what_is_missing_is_named_with_its_source_and_nothing_is_downloaded(tmp_path: Path) -> None:
    found = needs(
        "gsm:model=text", "mmlu:subject=anatomy,model=text", "mmlu:subject=virology,model=text", data=tmp_path
    )
    assert [need.is_there for need in found] == [False, False]
    gsm, mmlu = found
    assert gsm.path == tmp_path / "scenarios/gsm/gsm_data_train"
    assert gsm.source.startswith("https://raw.githubusercontent.com/openai/grade-school-math/")
    assert gsm.licence == "MIT"
    assert mmlu.path == tmp_path / "scenarios/mmlu/data"
    assert mmlu.tasks == ("mmlu: anatomy", "mmlu: virology")


def test_a_dataset_of_the_hub_and_the_tokenizer_of_bleu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nltk.data.path", [str(tmp_path / "nltk")])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    found = needs("wmt_14:language_pair=de-en,model=text", data=tmp_path)
    assert [(need.source, need.is_there) for need in found] == [
        ("Hugging Face dataset wmt14", False),
        ("NLTK's punkt_tab", False),
    ]
    assert found[0].path == tmp_path / "datasets/wmt14/de-en"
    (tmp_path / "nltk/tokenizers/punkt_tab").mkdir(parents=True)
    assert needs("wmt_14:language_pair=de-en,model=text", data=tmp_path)[1].is_there


def test_instructions_that_are_data_themselves(tmp_path: Path) -> None:
    (found,) = needs("legalbench:subset=abercrombie,model=text", data=tmp_path)
    assert found.path == tmp_path / "scenarios/legalbench/prompt_construction_settings.json"


def test_helm_downloads_when_it_may(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gsm_scenario.GSM8KScenario, "get_instances", fetching_from(server))
    data = tmp_path / "data"
    (missing,) = needs("gsm:model=text", data=data)
    assert not missing.is_there
    fetched = needs("gsm:model=text", data=data, downloads=True)
    assert [(need.path.name, need.is_there) for need in fetched] == [("train.jsonl", True), ("test.jsonl", True)]
    assert all(need.num_bytes == 8 * len(GSM) for need in fetched)
    assert needs("gsm:model=text", data=data) == fetched, "and are there from now on"


def test_a_download_that_fails_is_said_and_leaves_nothing(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gsm_scenario.GSM8KScenario, "get_instances", fetching_from(server, "absent"))
    (failed,) = needs("gsm:model=text", data=tmp_path / "data", downloads=True)
    assert not failed.is_there and failed.reason
    assert failed.source == f"{server}absent.jsonl"
    assert not failed.path.exists()


def fetching_from(server: str, *more: str):  # type: ignore[no-untyped-def]
    """A scenario of the same name whose files lie on our server."""

    def get_instances(self, output_path: str):  # type: ignore[no-untyped-def]
        for name in (*more, "train", "test"):
            target = Path(output_path) / f"{name}.jsonl"
            target.parent.mkdir(parents=True, exist_ok=True)
            gsm_scenario.ensure_file_downloaded(source_url=f"{server}{name}.jsonl", target_path=str(target))
        return []

    return get_instances


def test_everything_is_as_before_afterwards(tmp_path: Path) -> None:
    before = (helm.common.general.ensure_file_downloaded, datasets.load_dataset, flexeval.assets.fetch)
    needs("gsm:model=text", "med_qa:model=text", data=tmp_path)
    assert (helm.common.general.ensure_file_downloaded, datasets.load_dataset, flexeval.assets.fetch) == before
    assert gsm_scenario.ensure_file_downloaded is before[0]


def test_from_one_machine_to_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """check, export, import, check: on the command line."""
    suite = tmp_path / "small.conf"
    suite.write_text('entries: [{description: "gsm:model=text"}, {description: "simple_mcqa:model=text"}]')
    runner, archive = CliRunner(), tmp_path / "data.tar.gz"
    monkeypatch.setenv("FLEXEVAL_CACHE", str(tmp_path / "here"))
    missing = runner.invoke(app, ["data", "check", "--suite", str(suite), "--json"])
    assert missing.exit_code == 1
    (need,) = json.loads(missing.stdout)
    assert need["tasks"] == ["gsm"] and need["licence"] == "MIT" and not need["is_there"]
    folder = tmp_path / "here/helm/scenarios/gsm"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train", "test"):
        (folder / f"gsm_data_{name}").write_text(GSM * 3)
    there = runner.invoke(app, ["data", "check", "--suite", str(suite)])
    assert there.exit_code == 0 and "2 of 2 are there" in there.stdout
    exported = runner.invoke(app, ["data", "export", "--suite", str(suite), "-o", str(archive)])
    assert exported.exit_code == 0 and "Exported: 2 files" in exported.stdout
    monkeypatch.setenv("FLEXEVAL_CACHE", str(tmp_path / "there"))
    assert runner.invoke(app, ["data", "check", "--suite", str(suite)]).exit_code == 1
    imported = runner.invoke(app, ["data", "import", str(archive)])
    assert imported.exit_code == 0 and "Imported: 2 files" in imported.stdout
    assert runner.invoke(app, ["data", "check", "--suite", str(suite)]).exit_code == 0
