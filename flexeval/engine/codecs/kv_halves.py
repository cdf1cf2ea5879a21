"""Keys and values in logs of their own: each as a format that keeps one half of a token and gives nothing of the other.

They are coded in the same groups as together, so what comes back is the same. Knows heads and bytes; no log.

Shapes: T new tokens, C tokens of a log, B bytes of a token, R rows, K KV heads, H size of a key, W size of a value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexeval.engine.codecs.kv_format import KeysValues, KVCoding, KVShape, Places, group_size_of, make_format


class KeysFormat:
    """The keys of a token, one head after the other."""

    def __init__(self, shape: KVShape, dtype: torch.dtype, coding: KVCoding | None):
        """Raises `UnsupportedModelError` where the setting cannot code them."""
        self.shape = shape
        self._half = make_format(KVShape(shape.num_heads, shape.key_size, 0), dtype, _alike(shape, coding))
        self.token_bytes = self._half.token_bytes
        self.is_lossy = self._half.is_lossy

    def write(self, keys_TKH: Tensor, values_TKW: Tensor, out_TB: Tensor) -> None:
        """Fill the bytes of tokens."""
        self._half.write(keys_TKH, values_TKW[..., :0], out_TB)

    def append(self, keys_TKH: Tensor, values_TKW: Tensor, data_CB: Tensor, places_T: Tensor) -> None:
        """Fill the bytes of the tokens at `places_T`."""
        self._half.append(keys_TKH, values_TKW[..., :0], data_CB, places_T)

    def read(self, data_CB: Tensor, places: Places) -> KeysValues:
        """Keys, and values of no size."""
        return self._half.read(data_CB, places)


class ValuesFormat:
    """The values of a token: a row of bytes for each head, so that a head's can be fetched alone."""

    def __init__(self, shape: KVShape, dtype: torch.dtype, coding: KVCoding | None):
        """Raises `UnsupportedModelError` where the setting cannot code them."""
        self.shape = shape
        self._row = make_format(KVShape(1, 0, shape.value_size), dtype, _alike(shape, coding))
        self.row_bytes = self._row.token_bytes
        """Of one head of a token: row k of token c is row c K + k of the log."""
        self.token_bytes = shape.num_heads * self.row_bytes
        self.is_lossy = self._row.is_lossy

    def write(self, keys_TKH: Tensor, values_TKW: Tensor, out_TB: Tensor) -> None:
        """Fill the bytes of tokens."""
        rows_R1W = values_TKW.flatten(0, 1)[:, None]
        self._row.write(rows_R1W[..., :0], rows_R1W, self._rows(out_TB))

    def append(self, keys_TKH: Tensor, values_TKW: Tensor, data_CB: Tensor, places_T: Tensor) -> None:
        """Fill the bytes of the tokens at `places_T`."""
        rows_R1W = values_TKW.flatten(0, 1)[:, None]
        self._row.append(rows_R1W[..., :0], rows_R1W, self._rows(data_CB), self.rows_of(places_T).flatten())

    def read(self, data_CB: Tensor, places: Places) -> KeysValues:
        """Values, and keys of no size."""
        found_CB = data_CB[places] if isinstance(places, slice) else data_CB.index_select(0, places.reshape(-1))
        leading = [len(found_CB)] if isinstance(places, slice) else places.shape
        values_RW = self.read_rows(self._rows(found_CB))
        values_CKW = values_RW.view(*leading, self.shape.num_heads, self.shape.value_size)
        return KeysValues(values_CKW[..., :0], values_CKW)

    def read_rows(self, rows_RB: Tensor) -> Tensor:
        """Values `[R, W]` of single heads."""
        return self._row.read(rows_RB, slice(None)).values_CKW[:, 0]

    def rows_of(self, places_T: Tensor) -> Tensor:
        """Rows `[T, K]` of tokens."""
        heads_K = torch.arange(self.shape.num_heads, device=places_T.device)
        return places_T[:, None] * self.shape.num_heads + heads_K

    def _rows(self, data_CB: Tensor) -> Tensor:
        return data_CB.view(-1, self.row_bytes)


def _alike(shape: KVShape, coding: KVCoding | None) -> KVCoding | None:
    """The coding with the groups that keys and values have together."""
    return None if coding is None else KVCoding(coding.bits, group_size_of(shape, coding))
