"""How the keys and values of a token rest: as they were computed, or coded. Knows heads and bytes; no tier.

A token's bytes are one run, so that a log of tokens can be appended to and read from any token on.

Shapes: T new tokens, C tokens of a log, B bytes of a token, K KV heads, H size of a key, W size of a value, X = H + W,
G groups.
"""

from __future__ import annotations

from math import gcd
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from flexeval.engine.codecs.codec import IntegerCodec
from flexeval.engine.kernels import has_triton
from flexeval.errors import UnsupportedModelError

Places = slice | Tensor
"""Tokens of a log: neighbours or evenly spaced ones, or an index of any shape."""


class ChosenKV(Protocol):
    """Keys of some tokens, and values of those that are chosen by them."""

    @property
    def keys_CKH(self) -> Tensor:
        """Of all."""
        ...

    def chosen_values(self, is_chosen_CK: Tensor) -> Tensor:
        """Values `[C, K, W]`, right where a KV head has chosen a token."""
        ...


class KeysValues(NamedTuple):
    """KV of some tokens at one layer; a token stands for as many dimensions as its places had."""

    keys_CKH: Tensor
    values_CKW: Tensor

    def chosen_values(self, is_chosen_CK: Tensor) -> Tensor:
        """All of them: they are at hand."""
        return self.values_CKW


class KVShape(NamedTuple):
    """What a layer gives for each token."""

    num_heads: int
    key_size: int
    value_size: int

    @classmethod
    def of(cls, keys_TKH: Tensor, values_TKW: Tensor) -> KVShape:
        """Of such keys and values."""
        _, num_heads, key_size = keys_TKH.shape
        return cls(num_heads, key_size, values_TKW.shape[-1])

    @property
    def num_values(self) -> int:
        """Numbers of a token."""
        return self.num_heads * (self.key_size + self.value_size)


class KVCoding(NamedTuple):
    """What a setting does to keys and values."""

    bits: int
    group_size: int
    """At most; see `group_size_of`."""


class KVFormat(Protocol):
    """How one layer's tokens rest."""

    shape: KVShape
    """What they consist of."""
    token_bytes: int
    """Exactly."""
    is_lossy: bool
    """Whether what is read is not what was written."""

    def write(self, keys_TKH: Tensor, values_TKW: Tensor, out_TB: Tensor) -> None:
        """Fill the bytes of tokens, uint8."""
        ...

    def append(self, keys_TKH: Tensor, values_TKW: Tensor, data_CB: Tensor, places_T: Tensor) -> None:
        """Fill the bytes of tokens of a log that lie at `places_T`, known to the device alone."""
        ...

    def read(self, data_CB: Tensor, places: Places) -> KeysValues:
        """Keys and values of the tokens at `places`; views where neither places nor bytes ask for more."""
        ...


class KVLog(NamedTuple):
    """Tokens where they lie."""

    format: KVFormat
    data_CB: Tensor
    """Their bytes."""

    def at(self, places: Places) -> KeysValues:
        """Keys and values of some of them."""
        return self.format.read(self.data_CB, places)


class PlainFormat:
    """As they were computed: of each head the key and then the value."""

    is_lossy = False

    def __init__(self, shape: KVShape, dtype: torch.dtype):
        self.shape = shape
        self.dtype = dtype
        self.token_bytes = shape.num_values * dtype.itemsize

    def write(self, keys_TKH: Tensor, values_TKW: Tensor, out_TB: Tensor) -> None:
        """One copy."""
        torch.cat([keys_TKH, values_TKW], dim=-1, out=self._numbers(out_TB))

    def append(self, keys_TKH: Tensor, values_TKW: Tensor, data_CB: Tensor, places_T: Tensor) -> None:
        """Put them side by side, and there."""
        self._numbers(data_CB).index_copy_(0, places_T, torch.cat([keys_TKH, values_TKW], dim=-1))

    def read(self, data_CB: Tensor, places: Places) -> KeysValues:
        """Views of a slice."""
        numbers = self._numbers(data_CB)
        if isinstance(places, slice):
            return _split(numbers[places], self.shape)
        return _split(numbers.index_select(0, places.reshape(-1)).unflatten(0, places.shape), self.shape)

    def views(self, data_CB: Tensor) -> KeysValues:
        """All of them where they lie."""
        return _split(self._numbers(data_CB), self.shape)

    def _numbers(self, data_CB: Tensor) -> Tensor:
        return data_CB.view(self.dtype).view(data_CB.shape[0], self.shape.num_heads, -1)


class CodedFormat:
    """A run of `IntegerCodec` for each token: of each head the key and then the value, in groups of their own."""

    is_lossy = True

    def __init__(self, shape: KVShape, dtype: torch.dtype, coding: KVCoding):
        """Raises `UnsupportedModelError` for sizes of heads that cannot be cut into groups."""
        self.shape = shape
        self.dtype = dtype
        self.codec = IntegerCodec(coding.bits, group_size_of(shape, coding))
        self.token_bytes = self.codec.num_bytes(shape.num_values)

    def write(self, keys_TKH: Tensor, values_TKW: Tensor, out_TB: Tensor) -> None:
        """Quantize; infinities and NaN come back as NaN."""
        if has_triton(out_TB.device):
            return self._pack(keys_TKH, values_TKW, out_TB, None)
        for part, coded in zip(self.codec.split(out_TB), self._encode(keys_TKH, values_TKW), strict=True):
            part.copy_(coded)

    def append(self, keys_TKH: Tensor, values_TKW: Tensor, data_CB: Tensor, places_T: Tensor) -> None:
        """Quantize to there."""
        if has_triton(data_CB.device):
            return self._pack(keys_TKH, values_TKW, data_CB, places_T)
        for part, coded in zip(self.codec.split(data_CB), self._encode(keys_TKH, values_TKW), strict=True):
            part.index_copy_(0, places_T, coded)

    def read(self, data_CB: Tensor, places: Places) -> KeysValues:
        """Unpack them."""
        if isinstance(places, slice):
            found_CB, leading = data_CB[places], None
        else:
            found_CB, leading = data_CB.index_select(0, places.reshape(-1)), places.shape
        numbers_CV = torch.empty(len(found_CB), self.shape.num_values, dtype=self.dtype, device=data_CB.device)
        self.codec.decode(found_CB, numbers_CV)
        numbers = numbers_CV.view(*(leading or [len(found_CB)]), self.shape.num_heads, -1)
        return _split(numbers, self.shape)

    def _pack(self, keys_TKH: Tensor, values_TKW: Tensor, data_CB: Tensor, places_T: Tensor | None) -> None:
        from flexeval.engine.codecs import pack_kernel

        bits, group_size = self.codec.bits, self.codec.group_size
        pack_kernel.pack(keys_TKH, values_TKW, data_CB, places_T, bits=bits, group_size=group_size)

    def _encode(self, keys_TKH: Tensor, values_TKW: Tensor) -> tuple[Tensor, Tensor]:
        """Codes `[T, G, P]`, scales and minima `[T, G, 2]`."""
        groups = torch.cat([keys_TKH, values_TKW], dim=-1).view(-1, self.codec.group_size)
        codes, affine = self.codec.encode_groups(groups)
        return codes.unflatten(0, (len(keys_TKH), -1)), affine.unflatten(0, (len(keys_TKH), -1))


def make_format(shape: KVShape, dtype: torch.dtype, coding: KVCoding | None) -> PlainFormat | CodedFormat:
    """How a layer's tokens rest. Raises `UnsupportedModelError` where the setting cannot code them."""
    return PlainFormat(shape, dtype) if coding is None else CodedFormat(shape, dtype, coding)


def group_size_of(shape: KVShape, coding: KVCoding) -> int:
    """Numbers of a group: the most that cut keys and values alike, up to what the setting says.

    Raises `UnsupportedModelError` where there are none.
    """
    both, step = gcd(shape.key_size, shape.value_size), 16 // coding.bits  # whole pairs of bytes
    sizes = [size for size in range(step, coding.group_size + 1, step) if both % size == 0]
    if not sizes:
        raise UnsupportedModelError(
            f"keys of {shape.key_size} and values of {shape.value_size} numbers cannot be coded in {coding.bits} bits",
            mend="Use a setting without kv",
        )
    return sizes[-1]


def _split(numbers: Tensor, shape: KVShape) -> KeysValues:
    return KeysValues(numbers[..., : shape.key_size], numbers[..., shape.key_size :])
