"""What we touch of HELM beyond its documented entry points. When HELM changes, this says where to look."""

import dataclasses
import inspect
from pathlib import Path

import pytest
from helm.benchmark import runner
from helm.benchmark.executor import Executor
from helm.benchmark.presentation.run_entry import read_run_entries
from helm.common import general
from helm.common.request import GeneratedOutput, RequestResult
from helm.common.request import Request as HelmRequest

from flexeval.benchmark.helm.convert import UNSUPPORTED_FIELDS
from flexeval.benchmark.helm.missing import diagnose
from flexeval.benchmark.suites import load_suite

HONOURED = {
    "model_deployment",
    "model",
    "prompt",
    "messages",
    "temperature",
    "num_completions",
    "top_k_per_token",
    "max_tokens",
    "stop_sequences",
    "echo_prompt",
    "top_p",
    "random",
}


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A closed port of this machine is asked directly."""
    monkeypatch.setenv("no_proxy", "*")


def fields(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def test_every_field_of_a_request_is_honoured_or_refused() -> None:
    assert fields(HelmRequest) == HONOURED | set(UNSUPPORTED_FIELDS)
    defaults = HelmRequest()
    assert [name for name in UNSUPPORTED_FIELDS if getattr(defaults, name)] == []


def test_every_field_of_a_result_is_known() -> None:
    assert fields(GeneratedOutput) == {"text", "logprob", "tokens", "finish_reason", "multimodal_content", "thinking"}
    assert fields(RequestResult) == {
        "success",
        "embedding",
        "completions",
        "cached",
        "request_time",
        "request_datetime",
        "error",
        "error_flags",
        "batch_size",
        "batch_request_time",
    }


def test_the_runner_makes_an_executor_and_shares_its_context() -> None:
    source = inspect.getsource(runner.Runner.__init__)
    assert "self.executor = Executor(execution_spec)" in source
    assert "TokenizerService(self.executor.context)" in source
    assert "self.executor.execute(scenario_state)" in inspect.getsource(runner.Runner.run_one)
    assert "self.execution_spec" in inspect.getsource(Executor.__init__)


def test_the_path_of_a_failed_download_is_in_its_traceback(tmp_path: Path) -> None:
    target = tmp_path / "file"
    with pytest.raises(OSError) as caught:
        general.ensure_file_downloaded("http://127.0.0.1:9/file", str(target))
    found = diagnose(caught.value)
    assert found is not None
    assert found.path == str(target)
    assert found.reason.startswith("http://127.0.0.1:9/file: URLError")


def test_the_cause_of_an_error_is_looked_at_too(tmp_path: Path) -> None:
    target = tmp_path / "file"
    with pytest.raises(RuntimeError) as caught:
        try:
            general.ensure_file_downloaded("http://127.0.0.1:9/file", str(target))
        except OSError as error:
            raise RuntimeError("cannot prepare") from error
    found = diagnose(caught.value)
    assert found is not None and found.path == str(target)


def test_a_file_that_is_not_there_is_missing_data_and_a_bug_is_not(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as missing:
        (tmp_path / "absent").read_text()
    found = diagnose(missing.value)
    assert found is not None and found.path == str(tmp_path / "absent")
    assert diagnose(KeyError("answer")) is None


def test_what_the_package_requests_could_not_have_is_named_by_its_address() -> None:
    class Request:
        url = "https://example.org/model"

    error = ConnectionError("no route")
    error.request = Request()  # type: ignore[attr-defined]
    found = diagnose(error)
    assert found is not None and found[:2] == ("https://example.org/model", "ConnectionError: no route")


@pytest.mark.parametrize(
    "name", ["demo", "helm-classic", "helm-lite", "helm-lite-full", "helm-lite-instruct", "perplexity"]
)
def test_helm_reads_our_suite_files(name: str) -> None:
    suite = load_suite(name)
    entries = read_run_entries([str(suite.path)]).entries
    assert tuple(entry.description for entry in entries) == suite.entries
    assert all(entry.priority in (1, 2, 3, 4) for entry in entries)
