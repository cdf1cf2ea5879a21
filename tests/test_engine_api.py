"""The Python API: what `Engine` promises, and what every backend does with the same requests."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from tiny_directory import write_tiny_model

import flexeval
from flexeval import Engine, Request
from flexeval.backends.backend import Backend
from flexeval.backends.transformers import TransformersBackend
from flexeval.errors import CapacityError, ConfigError, RequestError
from flexeval.files import write_json
from flexeval.policy.policy import Policy
from flexeval.request import Completion

REQUESTS = [
    Request(prompt="Question: one Answer:", max_tokens=6, stop=("A",)),
    Request(prompt="Question: one", max_tokens=0, echo=True, top_logprobs=2),
    Request(prompt="Question: two Answer:", max_tokens=4, temperature=0.9, top_p=0.8, num_completions=3, seed=7),
    Request(prompt=(5, 6, 7), max_tokens=5, top_logprobs=3),
    Request(prompt="Question: one Answer:", max_tokens=6, stop=("A",)),
    Request(prompt="Question: one Answer: B", max_tokens=3, echo=True, ignore_eos=True),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("model")))


def open_backend(name: str, model: str, setting: str) -> Backend:
    if name == "transformers":
        return TransformersBackend(model, setting=setting, device="cpu", dtype="float32")
    return Engine.load(model, setting=setting, device="cpu", dtype="float32")


def without_time(completion: Completion) -> tuple[object, ...]:
    return (
        completion.text,
        completion.token_ids,
        completion.tokens,
        completion.finish_reason,
        completion.num_prompt_tokens,
        completion.num_generated_tokens,
        tuple(without_time(alternative) for alternative in completion.alternatives),
    )


@pytest.mark.parametrize("setting", ["none", "w4-g32"])
@pytest.mark.parametrize("name", ["flexeval", "transformers"])
def test_every_backend_gives_the_same_answers(name: str, setting: str, model: str) -> None:
    backend = open_backend(name, model, setting)
    told: dict[int, Completion] = {}

    def listen(completions: Sequence[tuple[int, Completion]]) -> None:
        told.update(completions)

    completions = backend.generate(REQUESTS, on_completions=listen)
    assert backend.name == name
    assert [told[index] for index in range(len(REQUESTS))] == completions
    expected = TransformersBackend(model, setting=setting, device="cpu", dtype="float32").generate(REQUESTS)
    assert list(map(without_time, completions)) == list(map(without_time, expected))
    for got, want in zip(completions, expected, strict=True):
        assert got.logprobs == pytest.approx(want.logprobs, abs=1e-4)
        assert [sorted(top.values()) for top in got.top_logprobs] == [
            pytest.approx(sorted(top.values()), abs=1e-4) for top in want.top_logprobs
        ]
    usage = backend.usage()
    assert usage.num_generated_tokens > 0 and usage.load_s > 0
    backend.close()


def test_a_limit_that_limits_nothing_is_refused(model: str) -> None:
    with pytest.raises(ConfigError, match="computed on the CPU"):
        Engine.load(model, device="cpu", gpu_memory="16GiB")


def test_equal_requests_are_computed_once(model: str) -> None:
    with Engine.load(model) as engine:
        one, other = engine.generate([REQUESTS[0], REQUESTS[0]])
        assert one == other
        assert engine.usage().num_prompt_tokens == one.num_prompt_tokens


def test_a_new_placement_forgets_no_figure(model: str) -> None:
    small, large = REQUESTS[:1], [Request(prompt=(5, n), max_tokens=2) for n in range(40)]
    with Engine.load(model, policy="row-tokens=64", cpu_memory="4MB") as engine:
        engine.generate(small)
        before = engine.usage()
        engine.close()  # as when the next requests do not fit
        assert engine.usage() == before
        engine.generate(large)
        after = engine.usage()
    assert after.num_prompt_tokens == before.num_prompt_tokens + 80
    assert after.num_generated_tokens >= before.num_generated_tokens + 40
    assert after.load_s > before.load_s
    assert after.peak_bytes["cpu"] >= before.peak_bytes["cpu"]
    assert engine.usage() == after, "also when it is closed"


def test_nothing_is_computed_if_one_request_is_wrong(model: str) -> None:
    with Engine.load(model) as engine, pytest.raises(RequestError, match="request 1"):
        engine.generate([REQUESTS[0], Request(prompt="x", max_tokens=5000)])
    with Engine.load(model) as engine:
        assert engine.generate([]) == []


def test_an_engine_answers_again_and_more(model: str) -> None:
    with Engine.load(model, dtype="float32") as engine:
        engine.place(REQUESTS[:1])
        first = engine.generate(REQUESTS[:1])
        many = [Request(prompt=f"Question: {n} Answer:", max_tokens=7) for n in range(70)]
        assert len(engine.generate(many)) == 70
        assert without_time(engine.generate(REQUESTS[:1])[0]) == without_time(first[0])
        shares = sum(completion.elapsed_s for completion in engine.generate(many))
        assert shares > 0


def test_a_policy_can_be_given_in_three_ways(model: str, tmp_path: Path) -> None:
    policy = Policy(row_tokens=64, sweep_tokens=128, group_sequences=2)
    path = tmp_path / "policy.json"
    write_json(path, policy.to_json())
    text = "row-tokens=64,sweep-tokens=128,group-sequences=2"
    for given in (policy, str(path), text):
        with Engine.load(model, policy=given) as engine:
            engine.generate(REQUESTS[:1])
            assert engine.usage().policy == policy.to_json()


def test_weights_go_to_disk_where_memory_is_short(model: str, tmp_path: Path) -> None:
    with Engine.load(model, dtype="float32") as engine:
        expected = engine.generate(REQUESTS)
        room = engine.usage().peak_bytes["cpu"]
    with Engine.load(model, dtype="float32", cpu_memory="100KB") as engine, pytest.raises(CapacityError, match="cpu"):
        engine.generate(REQUESTS)
    policy = "disk-weights=1,disk-kv=1,disk-hidden=1"
    with Engine.load(model, dtype="float32", disk=f"{tmp_path}:1GB", policy=policy) as engine:
        assert list(map(without_time, engine.generate(REQUESTS))) == list(map(without_time, expected))
        peak = engine.usage().peak_bytes
        assert peak["disk"] > 0 and peak["cpu"] < room
    assert [path.name for path in tmp_path.iterdir()] == ["prepared"], "for the next run"


def test_importing_is_instant_and_names_are_there() -> None:
    code = "import sys, flexeval; assert 'torch' not in sys.modules; print(flexeval.Engine, flexeval.load_results)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "Engine" in done.stdout, done.stderr
    with pytest.raises(AttributeError, match="no attribute"):
        _ = flexeval.nonsense
