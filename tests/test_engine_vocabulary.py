"""Embedding and head in codes: as transformers with what comes back of them, whatever the family."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

import pytest
import torch
from tiny_models import (
    FAMILIES,
    assert_equal_results,
    dequantized,
    ragged_requests,
    tiny_case,
    tiny_config,
    tiny_model,
)
from torch import Tensor
from transformers import PreTrainedModel

from flexeval.backends.transformers import answer
from flexeval.engine.checkpoint import SafetensorsCheckpoint, StateDictCheckpoint
from flexeval.engine.codecs.codec import Codec, IntegerCodec
from flexeval.engine.codecs.hqq import HqqCodec
from flexeval.engine.compute import vocabulary
from flexeval.engine.compute.anatomy import Anatomy
from flexeval.engine.compute.vocabulary import CodedVocabulary
from flexeval.engine.executor import Executor
from flexeval.engine.memory.disk import DiskTier
from flexeval.engine.sizes import model_shape
from flexeval.errors import UnsupportedModelError
from flexeval.policy.policy import Policy, Split
from flexeval.request import TokenResult

CPU = torch.device("cpu")
W4 = IntegerCodec(4, 32)
MIXED = Policy(weights=Split(cpu=0.5, disk=0.5), kv=Split(disk=1.0), row_tokens=30, group_sequences=4)


def row_by_row(weight_VD: Tensor, codec: Codec) -> Tensor:
    """What comes back of a matrix whose rows are coded one by one, each filled up to whole groups."""
    rows = []
    for row_D in weight_VD:
        filled = torch.nn.functional.pad(row_D, (0, -len(row_D) % codec.group_size))
        out = torch.empty_like(filled)
        codec.decode(codec.encode(filled), out)
        rows.append(out[: len(row_D)])
    return torch.stack(rows)


def with_coded_vocabulary(model: PreTrainedModel, codec: Codec) -> PreTrainedModel:
    lossy = copy.deepcopy(model)
    embedding, head = lossy.get_input_embeddings(), lossy.get_output_embeddings()
    is_tied = embedding.weight.data_ptr() == head.weight.data_ptr()
    embedding.weight.data = row_by_row(embedding.weight.data, codec)
    head.weight.data = embedding.weight.data if is_tied else row_by_row(head.weight.data, codec)
    return lossy


@cache
def expected_of(family: str) -> list[TokenResult]:
    model = with_coded_vocabulary(dequantized(tiny_model(family), W4), W4)
    return [answer(model, request) for request in ragged_requests()]


def run(family: str, policy: Policy, folder: Path, device: torch.device) -> list[TokenResult]:
    anatomy = Anatomy(tiny_config(family), torch.float32)
    checkpoint = StateDictCheckpoint(anatomy, tiny_model(family).state_dict())
    with Executor(
        anatomy, checkpoint, policy, codec=W4, vocabulary_codec=W4, device=device, disk_tier=DiskTier(folder)
    ) as executor:
        return executor.execute(ragged_requests())


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers_with_what_comes_back(family: str, tmp_path: Path) -> None:
    assert_equal_results(run(family, Policy(), tmp_path, CPU), expected_of(family))
    assert expected_of(family) != tiny_case(family).expected


def test_weights_and_kv_may_rest_elsewhere(tmp_path: Path) -> None:
    assert_equal_results(run("gemma2", MIXED, tmp_path, CPU), expected_of("gemma2"))


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers_on_gpu(family: str, tmp_path: Path) -> None:
    """Few tokens meet the head as it rests, many a part of it unpacked."""
    measured = run(family, Policy(weights=Split(gpu=0.5, cpu=0.5)), tmp_path, torch.device("cuda", 0))
    assert_equal_results(measured, expected_of(family))


@pytest.mark.parametrize("codec", [IntegerCodec(8, 64), W4, HqqCodec(4, 32)], ids=lambda codec: codec.name)
def test_a_matrix_is_coded_row_by_row_and_read_in_parts(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "PART_VALUES", 700)
    torch.manual_seed(0)
    weight_VD, x_TD, bias_V = torch.randn(101, 40), torch.randn(3, 40), torch.randn(101)
    coded, expected_VD = CodedVocabulary(weight_VD, codec, CPU), row_by_row(weight_VD, codec)
    index = torch.tensor([100, 0, 7, 7])
    torch.testing.assert_close(coded.rows(index), expected_VD[index], atol=0, rtol=0)
    torch.testing.assert_close(coded.rows(slice(90, None)), expected_VD[90:], atol=0, rtol=0)
    torch.testing.assert_close(coded.multiply(x_TD, bias_V), x_TD @ expected_VD.T + bias_V, atol=1e-5, rtol=0)
    torch.testing.assert_close(coded.multiply(x_TD, None), x_TD @ expected_VD.T, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "opt"])  # a head of its own, and a tied one
def test_its_bytes_are_known_beforehand_and_counted_once(family: str) -> None:
    model, anatomy = tiny_model(family), Anatomy(tiny_config(family), torch.float32)
    weights = {m.weight.data_ptr(): m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    plain, coded = (model_shape(anatomy, W4, CPU, vocabulary_codec=codec) for codec in (None, W4))
    saved = sum(weight.nbytes - W4.num_bytes(weight.numel()) for weight in weights.values())
    assert plain.resident_bytes - coded.resident_bytes == saved > 0
    assert (plain.unpacked_head_bytes, coded.unpacked_head_bytes) == (0, 4 * vocabulary.PART_VALUES)


def test_a_model_is_opened_again(tmp_path: Path) -> None:
    """As an engine does whose weights are to rest elsewhere: the weights are read anew."""
    tiny_model("llama").save_pretrained(tmp_path / "model")
    anatomy = Anatomy(tiny_config("llama"), torch.float32)
    checkpoint = SafetensorsCheckpoint(anatomy, tmp_path / "model")
    for _ in range(2):
        with Executor(
            anatomy, checkpoint, Policy(), codec=W4, vocabulary_codec=W4, device=CPU, disk_tier=None
        ) as executor:
            assert_equal_results(executor.execute(ragged_requests()), expected_of("llama"))


def test_a_head_of_another_kind_is_refused() -> None:
    anatomy = Anatomy(tiny_config("llama"), torch.float32)
    head = anatomy.model.get_output_embeddings()
    head.__class__ = type("OwnHead", (torch.nn.Linear,), {})
    with pytest.raises(UnsupportedModelError, match=r"OwnHead cannot be coded.*without -embed"):
        anatomy.bind_rest(tiny_model("llama").state_dict(), CPU, W4)
