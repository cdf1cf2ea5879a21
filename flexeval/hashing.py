"""Numbers that look random, the same on every machine. Knows no meaning of what it mixes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(values: npt.ArrayLike) -> npt.NDArray[np.uint64]:
    """64 bits for each integer, any of which changes about half of them: SplitMix64 (Steele, Lea and Flood 2014)."""
    z = (np.asarray(values).astype(np.uint64) + np.uint64(1)) * _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)), dtype=np.uint64)
