"""What a GPU says of the energy it has used. Knows NVML; not what was computed meanwhile."""

from __future__ import annotations

import torch


def gpu_energy_j(device: torch.device) -> float | None:
    """Joules that a GPU has used since its driver was loaded, by its own counter, whoever had it work.

    NVML's `nvmlDeviceGetTotalEnergyConsumption`, which Volta and later have. None without a GPU, without a driver that
    tells, and without NVML's bindings (`nvidia-ml-py`).
    """
    if device.type != "cuda":
        return None
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"  # the driver's number is not torch's
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(pynvml.nvmlDeviceGetHandleByUUID(uuid))) / 1000
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()
