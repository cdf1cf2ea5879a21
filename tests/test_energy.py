"""What a GPU says of its energy: read where there is one, passed over where anything is missing."""

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from synthetic_results import synthetic

from flexeval.backends.backend import Usage, add_up
from flexeval.engine.energy import gpu_energy_j
from flexeval.report.compare import compare
from flexeval.report.render.html import page
from flexeval.report.render.markdown import summary

GPU = torch.device("cuda", 0)


class NVML(ModuleType):
    """The bindings, for a GPU that has used 2.5 kJ."""

    class NVMLError(Exception):
        pass

    def __init__(self, fails: str = ""):
        super().__init__("pynvml")
        self.fails, self.asked, self.num_open = fails, "", 0

    def _go(self, step: str) -> None:
        if self.fails == step:
            raise self.NVMLError(step)

    def nvmlInit(self) -> None:
        self._go("init")
        self.num_open += 1

    def nvmlShutdown(self) -> None:
        self.num_open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self._go("handle")
        self.asked = uuid
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        self._go("energy")
        return 2_500_000


@pytest.fixture(autouse=True)
def properties(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="12-34"))


def test_the_counter_of_torchs_device_is_read_in_joules(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = NVML()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert gpu_energy_j(GPU) == 2500.0
    assert nvml.asked == "GPU-12-34" and nvml.num_open == 0


@pytest.mark.parametrize("fails", ["init", "handle", "energy"])
def test_a_driver_that_does_not_tell_is_passed_over(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = NVML(fails)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert gpu_energy_j(GPU) is None
    assert nvml.num_open == 0


def test_without_a_gpu_or_bindings_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpu_energy_j(torch.device("cpu")) is None and gpu_energy_j(GPU) is None


def test_sessions_add_up_where_all_are_known() -> None:
    usage = Usage(load_s=0, num_prompt_tokens=0, num_computed_prompt_tokens=0, num_generated_tokens=0, energy_j=3.0)
    assert add_up([usage, usage]).energy_j == 6.0
    assert add_up([usage, replace(usage, energy_j=None)]).energy_j is None
    assert add_up([]).energy_j is None


def test_energy_is_shown_a_question_where_it_is_known_of_all() -> None:
    results = synthetic(settings=["none", "w4"], num_questions=5)
    told = replace(results, settings=[replace(results.settings[0], energy_j=660.0), results.settings[1]])
    assert "22.0 J a question" in page(compare(told)) and "22.0 J a question" in summary(compare(told))
    resumed = replace(told.settings[0], num_resumed=2)
    for unknown in (results, replace(told, settings=[resumed, told.settings[1]])):
        assert "J a question" not in page(compare(unknown)) + summary(compare(unknown))
