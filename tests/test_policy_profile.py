"""What was measured at leisure is what later runs plan with, as long as it is the same machine."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from flexeval.cli import main
from flexeval.config import Limits
from flexeval.policy import hardware
from flexeval.policy.hardware import detect, machine_of
from flexeval.policy.profile import load, path_of, summarize


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FLEXEVAL_CACHE", str(tmp_path / "cache"))
    hardware._rates.cache_clear()
    yield
    hardware._rates.cache_clear()


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["flexeval", "profile", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        main()
    return int(exit_.value.code or 0)


def never(*_: object) -> dict[str, float]:
    raise AssertionError("the machine was measured")


def test_a_profile_is_what_later_runs_plan_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = tmp_path / "disk"
    assert call(monkeypatch, "--device", "cpu", "--dtype", "float32", "--disk", disk, "--repeat", 3) == 0
    shown = capsys.readouterr().out
    assert "matrix products" in shown and "reads from disk" in shown and "copies to the GPU" not in shown
    profile = load(machine_of("cpu", torch.float32, disk))
    assert profile is not None and profile.num_repeats == 3
    monkeypatch.setattr(hardware, "measure", never)
    found = detect("cpu", Limits(disk_dir=disk, disk_bytes=10**9), torch.float32)
    assert {name: getattr(found, name) for name in profile.rates} == profile.rates
    assert found.cpu_bytes > 0 and found.disk_bytes == 10**9, "room is not a rate"
    for dtype, disk_dir in ((torch.bfloat16, disk), (torch.float32, None)):
        with pytest.raises(AssertionError, match="was measured"):
            detect("cpu", Limits(disk_dir=disk_dir), dtype)


def test_of_another_machine_or_a_damaged_one_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = machine_of("cpu", torch.float32, None)
    assert load(machine) is None
    assert call(monkeypatch, "--device", "cpu", "--dtype", "float32", "--repeat", 1) == 0
    path = path_of(machine)
    whole = path.read_text()
    assert load(machine) is not None and load(machine | {"cores": "999"}) is None
    for launch_s in ("fast", float("nan"), float("inf"), -1.0):
        rates = json.loads(whole)["rates"] | {"launch_s": launch_s}
        for broken in (whole[:-9], "[]", json.dumps(json.loads(whole) | {"rates": rates})):
            path.write_text(broken)
            assert load(machine) is None
    monkeypatch.setattr(hardware, "measure", never)
    for other in ("lunch_s", 'launch_s": 1.0, "more_s'):
        path.write_text(whole.replace("launch_s", other))
        with pytest.raises(AssertionError, match="was measured"):
            detect("cpu", Limits(), torch.float32)
    path.write_text(whole)
    path_of(machine | {"cores": "999"}).write_text(whole)
    assert load(machine | {"cores": "999"}) is None, "a file of another machine"


def test_medians_count_and_what_varies_is_said() -> None:
    found = summarize(
        {},
        [{"launch_s": 1.0, "flops_per_s": 0.0}, {"launch_s": 9.0, "flops_per_s": 0.0}] * 2
        + [{"launch_s": 2.0, "flops_per_s": 0.0}],
    )
    assert found.rates == {"launch_s": 2.0, "flops_per_s": 0.0}
    assert found.spreads == {"launch_s": 4.0, "flops_per_s": 0.0}
