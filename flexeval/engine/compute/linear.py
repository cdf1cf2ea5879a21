"""Linear layers that multiply by a matrix as it rests, and activate what they make. Knows modules, not codes.

Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flexeval.engine.codecs.coded import CodedMatrix
from flexeval.engine.compute.few_tokens import multiply_few
from flexeval.engine.compute.fusion import Fusion

_aten = torch.ops.aten
_IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": _aten.silu_,
    "gelu_tanh": partial(_aten.gelu_, approximate="tanh"),
    "gelu": _aten.gelu_,
    "relu": _aten.relu_,
}
"""`ACTIVATIONS` that overwrite what they are given."""


class Activation(NamedTuple):
    """What a linear layer does to its results."""

    kind: str
    """Its name in `ACTIVATIONS`."""
    fusion: Fusion
    """Which operations are one."""

    def is_in_products(self, x: Tensor) -> bool:
        """Whether a product of such tokens can do it to what it is about to write: a GPU's library knows ReLU."""
        return self.kind == "relu" and self.fusion.is_on_gpu(x)


class CodedLinear(nn.Linear):
    """`nn.Linear` whose weight may be a coded matrix; the parameter is None then, so that nobody reads a stale one."""

    coded: CodedMatrix | None = None
    """What to multiply by; None where the parameter holds the weight."""
    activation: Activation | None = None
    """What is done to results before anybody sees them."""

    def forward(self, x: Tensor) -> Tensor:
        """`activation(x @ W.T + bias)`."""
        if self.coded is not None:
            out = self.coded.multiply(x.reshape(-1, x.shape[-1]), self.bias).view(*x.shape[:-1], self.out_features)
        elif self.activation is not None and self.bias is not None and self.activation.is_in_products(x):
            out_TO = torch._addmm_activation(self.bias, x.reshape(-1, x.shape[-1]), self.weight.t())
            return out_TO.view(*x.shape[:-1], self.out_features)
        elif (few := multiply_few(x, self.weight, self.bias)) is not None:
            out = few
        else:
            out = super().forward(x)
        return out if self.activation is None else _IN_PLACE[self.activation.kind](out)


def make_coded(root: nn.Module) -> frozenset[str]:
    """Let the linear layers under `root` take coded matrices; return the names of their weights."""
    linears = {name: module for name, module in root.named_modules() if type(module) is nn.Linear}
    for module in linears.values():
        module.__class__ = CodedLinear
    return frozenset(f"{name}.weight" for name in linears)
