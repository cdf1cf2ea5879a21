"""Detection measures this machine, and stays within what the user allows."""

import pytest
import torch

from flexeval.config import Limits
from flexeval.errors import ConfigError
from flexeval.policy.hardware import detect
from flexeval.policy.memory import free_host_bytes
from flexeval.policy.policy import Tier


@pytest.fixture(scope="module")
def disk_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("disk") / "not" / "there" / "yet"


@pytest.fixture(scope="module")
def cpu_machine(disk_dir):
    return detect("cpu", Limits(disk_dir=disk_dir), torch.float32)


def test_cpu_machine(cpu_machine, disk_dir):
    assert cpu_machine.home is Tier.CPU
    assert cpu_machine.gpu_bytes == cpu_machine.to_gpu_bytes_per_s == cpu_machine.from_gpu_bytes_per_s == 0
    assert cpu_machine.host_attention_bytes_per_s == 0
    assert 0 < cpu_machine.cpu_bytes < free_host_bytes() * 1.5
    assert cpu_machine.disk_bytes > 0
    assert 1e8 < cpu_machine.flops_per_s < 1e14
    assert 1e8 < cpu_machine.memory_bytes_per_s < 1e13
    assert 1e-8 < cpu_machine.launch_s < 1e-2
    assert 0 <= cpu_machine.product_s < 1e-1
    assert 1e5 < cpu_machine.disk_write_bytes_per_s < 1e11
    assert 1e5 < cpu_machine.disk_read_bytes_per_s < 1e12
    assert list(disk_dir.iterdir()) == []  # the probe leaves nothing behind


def test_limits_bind(disk_dir):
    machine = detect("cpu", Limits(cpu_bytes=12345, disk_dir=disk_dir, disk_bytes=678), torch.bfloat16)
    assert [machine.capacity_bytes(tier) for tier in Tier] == [0, 12345, 678]


def test_no_disk_folder_keeps_off_the_disk():
    machine = detect("cpu", Limits(disk_bytes=10**9), torch.float32)
    assert machine.disk_bytes == machine.disk_read_bytes_per_s == machine.disk_write_bytes_per_s == 0


def test_disk_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write to the disk folder") as caught:
        detect("cpu", Limits(disk_dir=tmp_path / "file" / "folder"), torch.float32)
    assert "--disk DIR" in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.gpu
def test_gpu_machine():
    taken = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    machine = detect("cuda", Limits(), torch.float16)
    assert machine.home is Tier.GPU
    assert 0 < machine.gpu_bytes < torch.cuda.get_device_properties(0).total_memory - taken.numel()
    assert 1e9 < machine.to_gpu_bytes_per_s < 1e12
    assert 1e9 < machine.from_gpu_bytes_per_s < 1e12
    assert 1e12 < machine.flops_per_s < 1e16
    assert 1e10 < machine.memory_bytes_per_s < 1e14
    assert 1e-7 < machine.launch_s < 1e-3
    assert machine.host_attention_bytes_per_s == 0, "measured with the model's heads, by the engine"
    limited = detect("cuda", Limits(gpu_bytes=2**30), torch.float16)
    assert limited.gpu_bytes <= 2**30
