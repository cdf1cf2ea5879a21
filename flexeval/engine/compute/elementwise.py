"""How many numbers a layer makes of a token beside its products: counted by calling it without memory.

Knows operations; neither what they are for nor how long they take.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flexeval.engine.compute.anatomy import Anatomy

NUM_TOKENS = 64
"""Of the call: enough for what does not grow with them to be little."""


def results_per_token(anatomy: Anatomy, device: torch.device, layer: int = 0) -> float:
    """Numbers that a layer's operations write for each token on `device`; products and attention do not count."""
    call = anatomy.without_memory(layer, NUM_TOKENS)
    with torch.inference_mode(), anatomy.fusion.counting(device), _Count() as count:
        call()
    num_results: int = count.num_results
    return num_results / NUM_TOKENS


class _Count(TorchDispatchMode):
    """Adds up what operations write, as long as it is entered."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_results: int = 0

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if operation is _aten._grouped_mm.default:  # which without memory knows but one type of numbers
            rows_SI, matrices_XIO = args[:2]
            return rows_SI.new_empty(len(rows_SI), matrices_XIO.shape[-1])
        out = operation(*args, **(kwargs or {}))
        aliases = [result.alias_info for result in operation._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        if isinstance(out, Tensor) and not is_view and operation not in _NOT_COUNTED:
            self.num_results += out.numel()
        return out


_aten = torch.ops.aten
_NOT_COUNTED = {
    _aten.linear.default,
    _aten.mm.default,
    _aten.bmm.default,
    _aten.addmm.default,
    _aten._addmm_activation.default,
    _aten.matmul.default,
    _aten.new_empty.default,
}
"""Products, whose results are little beside their arithmetic, and what makes room only."""
