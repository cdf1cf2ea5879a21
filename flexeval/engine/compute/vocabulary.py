"""Embedding and head as they rest in codes. Knows modules and matrices; not how numbers are coded.

A row of the embedding is unpacked when a token asks for it, the head a part of the vocabulary at a time. Tied ones are
one matrix, coded once. In the model, parameters without memory stand in their place.

Shapes: T tokens, V vocabulary, D width of an embedding, U rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flexeval.engine.codecs.codec import Codec
from flexeval.engine.compute.linear import CodedLinear, make_coded
from flexeval.errors import UnsupportedModelError

PART_VALUES = 2**25
"""Numbers of a matrix that are unpacked at a time."""


class CodedVocabulary:
    """A matrix `[V, D]` in codes, along D; rows are filled up to whole groups."""

    def __init__(self, weight_VD: Tensor, codec: Codec, device: torch.device):
        """Code it on `device`, a bounded part at a time. Raises `ModelError` for numbers that cannot be coded."""
        self._num_rows, self._width = weight_VD.shape
        self._dtype = weight_VD.dtype
        self._codec = codec
        self._padded = _padded(self._width, codec)
        self._few_tokens = codec.few_tokens(device, self._dtype)
        self._coded = torch.empty(_coded_bytes(weight_VD, codec), dtype=torch.uint8, device=device)
        for first in range(0, self._num_rows, self._rows_at_once):
            part = weight_VD[first : first + self._rows_at_once].to(device)
            part = nn.functional.pad(part, (0, self._padded - self._width))
            codec.encode_part(part.flatten(), first * self._padded, self._coded)

    def rows(self, which: slice | Tensor) -> Tensor:
        """Rows `[U, D]`, unpacked, that a slice or an index `[U]` names."""
        num = len(range(self._num_rows)[which]) if isinstance(which, slice) else len(which)
        out_UD = torch.empty(num, self._padded, dtype=self._dtype, device=self._coded.device)
        self._codec.decode_rows(self._coded, self._num_rows, which, out_UD)
        return out_UD[:, : self._width]

    def multiply(self, x_TD: Tensor, bias_V: Tensor | None) -> Tensor:
        """`x @ W.T + bias`, `[T, V]`: few tokens with the matrix as it rests, where there is a kernel for it."""
        if len(x_TD) <= self._few_tokens:
            return self._codec.matrix(self._coded, 0, (self._num_rows, self._padded)).multiply(x_TD, bias_V)
        out_TV = x_TD.new_empty(len(x_TD), self._num_rows)
        for first in range(0, self._num_rows, self._rows_at_once):
            part = slice(first, min(first + self._rows_at_once, self._num_rows))
            bias = None if bias_V is None else bias_V[part]
            out_TV[:, part] = nn.functional.linear(x_TD, self.rows(part), bias)
        return out_TV

    @property
    def _rows_at_once(self) -> int:
        return max(1, PART_VALUES // self._padded)


class Vocabulary:
    """Where a model looks tokens up, and where it scores them."""

    def __init__(self, model: PreTrainedModel):
        self._modules = {
            f"{name}.weight": module
            for name, module in model.named_modules()
            if module is model.get_input_embeddings() or module is model.get_output_embeddings()
        }
        self._embedding = model.get_input_embeddings()
        if (head := model.get_output_embeddings()) is not None:
            make_coded(head)
        self._coded: CodedVocabulary | None = None  # of the embedding

    def num_bytes(self, name: str, weight: Tensor, codec: Codec | None) -> int:
        """What a tensor of the model takes, where the codec is for those of the vocabulary."""
        return weight.nbytes if codec is None or name not in self._modules else _coded_bytes(weight, codec)

    def as_coded(self, tensors: Mapping[str, Tensor], codec: Codec) -> dict[str, Tensor]:
        """The weights of both as they come back from a codec; tied ones stay one tensor. Raises `ModelError`."""
        coded = self._code(tensors, codec, torch.device("cpu"))
        found = {matrix: matrix.rows(slice(None)) for matrix in set(coded.values())}
        return {name: found[matrix] for name, matrix in coded.items()}

    def bind(self, tensors: Mapping[str, Tensor], codec: Codec, device: torch.device) -> frozenset[str]:
        """Have both compute with codes of their weights, which are among `tensors`; the names of these.

        Raises:
            ModelError: A weight cannot be coded.
            UnsupportedModelError: The model looks tokens up, or scores them, in a way of its own.
        """
        coded = self._code(tensors, codec, device)
        for name, matrix in coded.items():
            module = self._modules[name]
            if isinstance(module, nn.Embedding):
                module.padding_idx = None  # for gradients only, and the rows that it is given are not the vocabulary's
                self._coded = matrix
            else:
                if not isinstance(module, CodedLinear):
                    what = f"a head of the kind {type(module).__name__} cannot be coded"
                    raise UnsupportedModelError(what, mend="Use the setting without -embed")
                module.coded = matrix
        return frozenset(coded)

    def _code(self, tensors: Mapping[str, Tensor], codec: Codec, device: torch.device) -> dict[str, CodedVocabulary]:
        """Both weights by their names; tied ones are one."""
        coded: dict[int, CodedVocabulary] = {}
        for name in self._modules:
            place = tensors[name].data_ptr()
            if place not in coded:
                coded[place] = CodedVocabulary(tensors[name], codec, device)
        return {name: coded[tensors[name].data_ptr()] for name in self._modules}

    @contextmanager
    def looking_up(self, ids_1T: Tensor) -> Iterator[Tensor]:
        """What to call the model with instead of these tokens: the embedding may have but their rows for now."""
        if self._coded is None:
            yield ids_1T
            return
        weight = self._embedding._parameters["weight"]
        self._embedding._parameters["weight"] = nn.Parameter(self._coded.rows(ids_1T[0]), requires_grad=False)
        try:
            yield torch.arange(ids_1T.shape[1], device=ids_1T.device)[None]
        finally:
            self._embedding._parameters["weight"] = weight


def _coded_bytes(weight_VD: Tensor, codec: Codec) -> int:
    num_rows, width = weight_VD.shape
    return codec.num_bytes(num_rows * _padded(width, codec))


def _padded(width: int, codec: Codec) -> int:
    return math.ceil(width / codec.group_size) * codec.group_size
