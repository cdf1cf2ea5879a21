"""The tiers of one engine: which there are, and which of them items rest on. Knows placements; not what rests there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from flexeval.engine.memory.disk import DiskTier
from flexeval.engine.memory.tier import MemoryTier, Tier
from flexeval.errors import CapacityError
from flexeval.planning.logs import Crossing
from flexeval.policy.policy import KINDS, Policy, Split
from flexeval.policy.policy import Tier as TierName


class Tiers(Mapping[TierName, Tier]):
    """By name: host memory, the GPU's where there is one, and disk where there is a folder."""

    def __init__(self, device: torch.device, disk: DiskTier | None):
        """Tiers for layers that are computed on `device`."""
        self._device = device
        self.disk = disk
        """None where the run has no folder."""
        self.host = MemoryTier(TierName.CPU, torch.device("cpu"), compute_device=device)
        """Host memory."""
        self._tiers: dict[TierName, Tier] = {TierName.CPU: self.host}
        if device.type == "cuda":
            self._tiers[TierName.GPU] = MemoryTier(TierName.GPU, device, compute_device=device)
        if disk is not None:
            self._tiers[TierName.DISK] = disk
        self.home = self._tiers[TierName.GPU if device.type == "cuda" else TierName.CPU]
        """The compute device's own."""

    def __getitem__(self, name: TierName) -> Tier:
        """The tier of that name. Raises `CapacityError`."""
        if name not in self._tiers:
            mend = "Name a folder with --disk" if name is TierName.DISK else "Choose a policy without a GPU share"
            raise CapacityError(f"the policy puts data on {name}, which this run does not have", mend=mend)
        return self._tiers[name]

    def __iter__(self) -> Iterator[TierName]:
        return iter(self._tiers)

    def __len__(self) -> int:
        return len(self._tiers)

    def check(self, policy: Policy) -> None:
        """Raise `CapacityError` where a policy wants a tier that there is not."""
        for kind in KINDS:
            for name in TierName:
                if getattr(getattr(policy, kind), name):
                    _ = self[name]

    def spread(self, split: Split, num_items: int) -> list[Tier]:
        """The tier of each of `num_items` layers."""
        return [self[name] for name in split.spread(num_items)]

    def spread_sizes(self, split: Split, sizes: Sequence[int]) -> list[Tier]:
        """The tier of each of some rows of these sizes."""
        return [self[name] for name in split.spread_sizes(sizes)]

    def is_home(self, split: Split) -> bool:
        """Whether nothing of a kind is anywhere else than where it is computed."""
        return bool(getattr(split, self.home.name) == 1)

    def crossing(self, policy: Policy) -> Crossing:
        """Where logs of KV are not read in place: away from home, but where the CPU attends beside it."""
        num_away = 1 - getattr(policy.kv, self.home.name)
        in_host_memory = policy.kv.cpu if self.home.name is not TierName.CPU else 0.0
        return Crossing(num_away - policy.host_attention * in_host_memory, num_away)

    def peak_bytes(self) -> dict[str, int]:
        """The most that was used of each: on a GPU everything, elsewhere what was handed out."""
        handed_out = {name: tier.peak_bytes for name, tier in self._tiers.items()}
        return self._with_all(handed_out, torch.cuda.max_memory_allocated)

    def used_bytes(self) -> dict[str, int]:
        """What is in use of each now, as `peak_bytes` counts it."""
        handed_out = {name: tier.used_bytes for name, tier in self._tiers.items()}
        return self._with_all(handed_out, torch.cuda.memory_allocated)

    def _with_all(self, handed_out: Mapping[TierName, int], on_gpu: Callable[[torch.device], int]) -> dict[str, int]:
        """With what files pass through; of a GPU all that its allocator says."""
        num_bytes = {str(name): count for name, count in handed_out.items()}
        if self.disk is not None:
            num_bytes[TierName.CPU] += self.disk.staging.num_bytes
        if self._device.type == "cuda":
            num_bytes[TierName.GPU] = on_gpu(self._device)
        return num_bytes

    def close(self) -> None:
        """Give everything back."""
        for tier in self._tiers.values():
            tier.close()
