"""Matrices that are multiplied as they rest. Knows what they are asked for; not how numbers are coded.

Shapes: T tokens, I inputs, O outputs, G groups of a matrix's row, P bytes of a group's codes, X experts, S choices of
experts by tokens, R rows that are multiplied.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, TypeAlias

from torch import Tensor

from flexeval.engine.compute.host_products import multiply_codes


class CodedMatrix(Protocol):
    """A weight `[O, I]` that is not unpacked."""

    def multiply(self, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        """`x @ W.T + bias`, `[T, O]`."""
        ...


class Route(NamedTuple):
    """Which rows meet which expert: C choices of each token, side by side, and their order by expert."""

    order_S: Tensor
    """Choices, those of one expert after those of another."""
    end_X: Tensor
    """int32, where each expert's end in that order."""


class CodedMatrices(Protocol):
    """Experts' weights `[X, O, I]` that are not unpacked."""

    def multiply(self, x_RI: Tensor, route: Route) -> Tensor:
        """What each choice makes of its row, `[S, O]`: there is a row for each choice, or one for all of a token's."""
        ...


Coded: TypeAlias = CodedMatrix | CodedMatrices


class Int4Matrix(NamedTuple):
    """A matrix of 4-bit codes as it rests."""

    packed_OGP: Tensor
    """Codes of each row's groups."""
    affine_OG2: Tensor
    """Scale and minimum of each."""

    def multiply(self, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        """`x @ W.T + bias`."""
        if x_TI.device.type == "cpu":
            x_TI = x_TI if x_TI.stride(1) == 1 else x_TI.contiguous()
            return multiply_codes(x_TI, self.packed_OGP, self.affine_OG2, bias_O)
        from flexeval.engine.codecs import product_kernel

        return product_kernel.multiply(x_TI, self.packed_OGP, self.affine_OG2, bias_O)


class Int4Matrices(NamedTuple):
    """Experts' matrices of 4-bit codes as they rest."""

    packed_XOGP: Tensor
    """Codes of each row's groups."""
    affine_XOG2: Tensor
    """Scale and minimum of each."""

    def multiply(self, x_RI: Tensor, route: Route) -> Tensor:
        """Each choice's row by its expert's matrix."""
        if x_RI.device.type == "cpu":
            return self._multiply_in_turn(x_RI, route)
        from flexeval.engine.codecs import grouped_kernel

        return grouped_kernel.multiply(x_RI, self.packed_XOGP, self.affine_XOG2, *route)

    def _multiply_in_turn(self, x_RI: Tensor, route: Route) -> Tensor:
        """One expert after the other."""
        x_SI = x_RI.index_select(0, route.order_S // (len(route.order_S) // len(x_RI)))
        out_SO = x_RI.new_empty(len(x_SI), self.packed_XOGP.shape[1])
        first = 0
        for expert, end in enumerate(route.end_X.tolist()):
            if first < end:
                matrix = Int4Matrix(self.packed_XOGP[expert], self.affine_XOG2[expert])
                out_SO[route.order_S[first:end]] = matrix.multiply(x_SI[first:end], None)
            first = end
        return out_SO
