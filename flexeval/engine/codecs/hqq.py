"""Better minima for groups of weights, found without data. Knows arithmetic on groups of numbers; nothing of models.

Half-quadratic quantization (Badri and Shaji 2023, https://mobiusml.github.io/hqq_blog): large errors of a few numbers
harm a model less than small ones of many, so a norm sum(|error|^p) with p < 1 is made small. On one core of a Xeon at
2.6 GHz it takes 0.14 s a million numbers, thirty times as long as plain rounding.

Shapes: G groups, E numbers of a group. Groups are columns here, so that every step is a pass over whole rows.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from flexeval.engine.codecs.codec import Affine, IntegerCodec, step_of

_NUM_STEPS = 20
_BETA, _GROWTH = 5.0, 1.01
"""Weight of the quadratic term and its growth, for errors in steps of their group: those below 0.28 count in full."""


class HqqCodec(IntegerCodec):
    """`IntegerCodec` with the same bytes and better numbers in them: each minimum lies where the norm is small."""

    def __init__(self, bits: int = 4, group_size: int = 64):
        super().__init__(bits, group_size)
        assert group_size & (group_size - 1) == 0, (group_size, "sums halve groups")
        self.name += "-hqq"

    def choose(self, groups_GE: Tensor) -> Affine:
        """Scales as they are, minima refined."""
        scale_G1, minimum_G1 = super().choose(groups_GE)
        minimum_1G = refine_minima(groups_GE.T.contiguous(), scale_G1.T, minimum_G1.T, top=self.top)
        return Affine(scale_G1, minimum_1G.T)


def refine_minima(groups_EG: Tensor, scale_1G: Tensor, minimum_1G: Tensor, *, top: int) -> Tensor:
    """Minima under which sum(|error|^(3/4)) is never larger than under the given ones, group by group.

    Alternates between the errors that may stay (the norm's proximal step) and the minimum that is best for the rest (a
    mean), and keeps the best minimum it comes across. p is 3/4 where the authors take 0.7: its powers are roots, and
    roots can be rounded alike on every device; sums have a fixed order. So the result is the same everywhere.

    Args:
        groups_EG: Numbers, float32.
        scale_1G: float16; it stays as it is.
        minimum_1G: float16, where to start from.
        top: The largest code.
    """
    step_1G = step_of(scale_1G)
    size = torch.full((), float(len(groups_EG)), device=groups_EG.device)  # a GPU would multiply by a plain number
    best_1G, least_1G = minimum_1G, torch.full_like(step_1G, torch.inf)
    for num_before in range(_NUM_STEPS):
        beyond_EG = (groups_EG - minimum_1G.float()).div_(step_1G)
        error_EG = beyond_EG - beyond_EG.round().clamp_(0, top)
        size_EG = error_EG.abs()
        root_EG = _root(_root(size_EG.clone()))
        norm_1G = _sum(root_EG * root_EG * root_EG)
        is_better_1G = norm_1G < least_1G  # not where it is no number
        best_1G, least_1G = minimum_1G.where(is_better_1G, best_1G), norm_1G.where(is_better_1G, least_1G)
        # Of each error |error|^(p - 1) / beta is pulled in; what is left of it, if anything, may stay.
        pull_EG = root_EG.mul_(_BETA * _GROWTH**num_before).reciprocal_()
        outlier_EG = size_EG.sub_(pull_EG).relu_().copysign_(error_EG)
        minimum_1G = (minimum_1G.float() + _sum(error_EG.sub_(outlier_EG)) / size * step_1G).half()
    return best_1G


def _root(numbers_EG: Tensor) -> Tensor:
    """Square roots, in place, rounded to the nearest number: on a CPU, torch's own are at times the one beside it."""
    if numbers_EG.device.type == "cpu":
        np.sqrt(numbers_EG.numpy(), out=numbers_EG.numpy())
        return numbers_EG
    return numbers_EG.sqrt_()


def _sum(numbers_EG: Tensor) -> Tensor:
    """Sums `[1, G]`, halves added to halves: in the same order on every device."""
    while len(numbers_EG) > 1:
        half = len(numbers_EG) // 2
        numbers_EG = numbers_EG[:half] + numbers_EG[half:]
    return numbers_EG
