"""Where logs of KV are read in place, by where they rest and who attends."""

from __future__ import annotations

import pytest
import torch

from flexeval.engine.memory.tiers import Tiers
from flexeval.planning.logs import Crossing
from flexeval.policy.policy import Policy, Split


@pytest.mark.parametrize(
    ("device", "kv", "host_attention", "crossing"),
    [
        ("cpu", Split(cpu=1.0), 0.0, Crossing(0.0, 0.0)),
        ("cpu", Split(cpu=0.25, disk=0.75), 0.0, Crossing(0.75, 0.75)),
        ("cuda", Split(gpu=1.0), 0.0, Crossing(0.0, 0.0)),
        ("cuda", Split(gpu=0.5, cpu=0.25, disk=0.25), 0.0, Crossing(0.5, 0.5)),
        ("cuda", Split(gpu=0.5, cpu=0.25, disk=0.25), 0.5, Crossing(0.375, 0.5)),
        ("cuda", Split(cpu=1.0), 1.0, Crossing(0.0, 1.0)),
    ],
)
def test_logs_cross_where_nobody_attends_in_place(
    device: str, kv: Split, host_attention: float, crossing: Crossing
) -> None:
    tiers = Tiers(torch.device(device), None)
    assert tiers.crossing(Policy(kv=kv, host_attention=host_attention)) == pytest.approx(crossing)
