"""By how much a run under way differs from what the cost model says of it: a factor a lane and phase, and a phase.

Plain numbers; knows neither where they come from (`measured.py`) nor what they are applied to (`cost.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """Factors of the cost model's seconds; 1 where nothing was measured."""

    lanes: Mapping[tuple[str, str], float] = field(default_factory=dict)
    """(phase, lane): of the seconds that the lane is busy."""
    waiting: Mapping[str, float] = field(default_factory=dict)
    """Phase: of what a sweep takes by its busiest lane, for lanes wait for each other."""
    cutting: Mapping[str, float] = field(default_factory=dict)
    """Phase: of what its sweeps take as planned, for they are smaller than that."""

    def of_lane(self, phase: str, lane: str) -> float:
        """What the seconds of a lane in a phase are multiplied by."""
        return self.lanes.get((phase, lane), 1.0)

    def of_phase(self, phase: str) -> float:
        """What the seconds of a phase's sweeps are multiplied by, once those of its lanes are."""
        return self.waiting.get(phase, 1.0) * self.cutting.get(phase, 1.0)


NO_CORRECTION = Correction()
"""Of a run that nothing was measured of."""
