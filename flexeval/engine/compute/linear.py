"""Linear layers that multiply by a matrix as it rests. Knows modules; not how numbers are coded.

Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from torch import Tensor, nn

from flexeval.engine.codecs.coded import CodedMatrix
from flexeval.engine.compute.few_tokens import multiply_few


class CodedLinear(nn.Linear):
    """`nn.Linear` whose weight may be a coded matrix; the parameter is None then, so that nobody reads a stale one."""

    coded: CodedMatrix | None = None
    """What to multiply by; None where the parameter holds the weight."""

    def forward(self, x: Tensor) -> Tensor:
        """`x @ W.T + bias`."""
        if self.coded is None:
            out = multiply_few(x, self.weight, self.bias)
            return super().forward(x) if out is None else out
        return self.coded.multiply(x.reshape(-1, x.shape[-1]), self.bias).view(*x.shape[:-1], self.out_features)


def make_coded(root: nn.Module) -> frozenset[str]:
    """Let the linear layers under `root` take coded matrices; return the names of their weights."""
    linears = {name: module for name, module in root.named_modules() if type(module) is nn.Linear}
    for module in linears.values():
        module.__class__ = CodedLinear
    return frozenset(f"{name}.weight" for name in linears)
