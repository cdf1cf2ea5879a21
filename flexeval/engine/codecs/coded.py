"""Matrices that are multiplied as they rest. Knows what they are asked for; not how numbers are coded.

Shapes: T tokens, I inputs, O outputs, G groups of a matrix's row, P bytes of a group's codes, X experts, S choices of
experts by tokens, R rows that are multiplied.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, TypeAlias

from torch import Tensor


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
    """A matrix of 4-bit codes as it rests on a GPU."""

    packed_OGP: Tensor
    """Codes of each row's groups."""
    affine_OG2: Tensor
    """Scale and minimum of each."""

    def multiply(self, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        """`x @ W.T + bias`."""
        from flexeval.engine.codecs import product_kernel

        return product_kernel.multiply(x_TI, self.packed_OGP, self.affine_OG2, bias_O)


class Int4Matrices(NamedTuple):
    """Experts' matrices of 4-bit codes as they rest on a GPU."""

    packed_XOGP: Tensor
    """Codes of each row's groups."""
    affine_XOG2: Tensor
    """Scale and minimum of each."""

    def multiply(self, x_RI: Tensor, route: Route) -> Tensor:
        """Each choice's row by its expert's matrix."""
        from flexeval.engine.codecs import grouped_kernel

        return grouped_kernel.multiply(x_RI, self.packed_XOGP, self.affine_XOG2, *route)
