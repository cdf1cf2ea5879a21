"""HELM's own tools on what we write: `helm-summarize` makes the tables, `helm-server` serves them."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import URLError
from urllib.parse import quote
from urllib.request import ProxyHandler, build_opener

import pytest
from helm_support import build_card, build_suite, run_suite

from flexeval.benchmark.helm import Scored

SERVE_ON_LOOPBACK = """
import sys
from helm.benchmark import server
run = server.app.run
server.app.run = lambda host, port: run(host="127.0.0.1", port=port, quiet=True)
server.main()
"""
ENTRIES = ("simple_mcqa:model=text", "hellaswag_packaged:model=text,method=multiple_choice_separate_original")


class Summarized(NamedTuple):
    """A folder that `helm-summarize` has been over."""

    output: Path
    scored: dict[str, Scored]
    """By the display name that HELM shows for the model under a setting."""

    def read(self, name: str) -> Any:
        return json.loads((self.output / "runs/test" / name).read_text())


@pytest.fixture(scope="module")
def summarized(tmp_path_factory: pytest.TempPathFactory) -> Summarized:
    output = tmp_path_factory.mktemp("helm")
    scored = {}
    for setting, shown in (("none", "shown"), ("w4", "shown (w4)")):
        card = build_card(name="flexeval/shown", setting=setting)
        scored[shown] = run_suite(build_suite(*ENTRIES), output, card)[2]
    command = [sys.executable, "-m", "helm.benchmark.presentation.summarize"]
    command += ["--output-path", str(output), "--suite", "test", "--num-threads", "1"]
    command += ["--local-path", str(output / "prod_env"), "--schema-path", str(output / "schema.yaml")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "Could not find model metadata" not in result.stdout + result.stderr
    return Summarized(output, scored)


@pytest.fixture(scope="module")
def server(summarized: Summarized) -> Iterator[str]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-c", SERVE_ON_LOOPBACK, "--port", str(port), "--suite", "test"]
    process = subprocess.Popen(
        [*command, "--output-path", str(summarized.output)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            assert process.poll() is None, process.stderr and process.stderr.read()
            try:
                fetch(f"{address}/config.js")
                break
            except URLError:
                time.sleep(0.1)
        yield address
    finally:
        process.kill()
        process.communicate()


def fetch(address: str) -> str:
    with build_opener(ProxyHandler({})).open(address, timeout=10) as response:
        assert response.status == 200
        return str(response.read().decode())


def test_the_overview_shows_every_setting_with_our_means(summarized: Summarized) -> None:
    (table, *_) = summarized.read("groups/core_scenarios.json")
    header = [cell["value"] for cell in table["header"]]
    rows = {row[0]["value"]: [cell.get("value") for cell in row] for row in table["rows"]}
    assert rows.keys() == summarized.scored.keys()
    for shown, scored in summarized.scored.items():
        for task in scored.tasks:
            (column,) = [place for place, title in enumerate(header) if title.startswith(f"{task.group} - ")]
            own = [result.score for result in scored.instances if result.task == task.name]
            assert rows[shown][column] == pytest.approx(sum(own) / len(own)), (shown, task.name)


def test_the_schema_names_our_tasks_and_models(summarized: Summarized) -> None:
    schema = summarized.read("schema.json")
    groups = {group["name"]: group for group in schema["run_groups"]}
    assert groups["core_scenarios"]["subgroups"] == ["simple_mcqa", "hellaswag_packaged"]
    assert groups["hellaswag_packaged"]["environment"] == {"main_name": "exact_match", "main_split": "valid"}
    assert {model["display_name"] for model in schema["models"]} == summarized.scored.keys()


def test_pages_are_served(server: str) -> None:
    assert "<div id=" in fetch(server)
    assert 'window.SUITE = "test"' in fetch(f"{server}/config.js")


def test_a_run_is_served_with_its_questions_and_answers(server: str, summarized: Summarized) -> None:
    names = sorted(run["run_spec"]["name"] for run in summarized.read("runs.json"))
    assert len(names) == 4
    (name,) = [name for name in names if name.startswith("simple_mcqa") and name.endswith("shown-w4")]
    folder = f"{server}/benchmark_output/runs/test/{quote(name)}"
    predictions = json.loads(fetch(f"{folder}/display_predictions.json"))
    own = [result for result in summarized.scored["shown (w4)"].instances if result.task == "simple_mcqa"]
    assert [one["predicted_text"] for one in predictions] == [result.output for result in own]
    requests = json.loads(fetch(f"{folder}/display_requests.json"))
    assert [one["request"]["prompt"] for one in requests] == [result.prompt for result in own]
