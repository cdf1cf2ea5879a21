"""The end of a model, from its last layer's output to logits: as through the whole model, with fewer calls."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, tiny_config, tiny_model
from torch import nn

from flexeval.engine.compute.anatomy import Anatomy
from flexeval.engine.compute.tail import find_tail


def bound(family: str) -> Anatomy:
    """With weights, but for its layers."""
    anatomy, model = Anatomy(tiny_config(family), torch.float32), tiny_model(family)
    names = set(anatomy.model.state_dict())
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name in names}
    anatomy.bind_rest(tensors, torch.device("cpu"))
    return anatomy


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_whole_models(family: str) -> None:
    anatomy, hidden_1TD = bound(family), torch.randn(1, 7, 64)
    assert anatomy._tail is not None
    with torch.inference_mode():
        short = anatomy.head(hidden_1TD)
        anatomy._tail = None
        assert torch.equal(short, anatomy.head(hidden_1TD)) and short.shape == (1, 7, 200)


def test_nothing_else_is_called() -> None:
    anatomy, called = bound("gemma2"), []
    for name, module in anatomy.model.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    anatomy.head(torch.randn(1, 3, 64))
    assert called == ["model.norm", "model", "lm_head", ""]  # the second gives what it is told to


def test_the_model_embeds_as_before() -> None:
    anatomy, ids_1T = bound("llama"), torch.tensor([[5, 6, 7]])
    before = anatomy.embed(ids_1T, torch.arange(3)[None]).hidden_1TD
    anatomy.head(torch.randn(1, 3, 64))
    assert torch.equal(anatomy.embed(ids_1T, torch.arange(3)[None]).hidden_1TD, before)


def test_an_end_that_is_more_than_modules_is_left_to_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    anatomy = Anatomy(tiny_config("llama"), torch.float32)
    decoder = anatomy.model.get_decoder()
    given = anatomy._stubs[-1].replacement = torch.empty(1, 2, 64, device="meta")
    assert find_tail(anatomy.model, given) is not None

    plain = type(decoder).forward

    def forward(self: nn.Module, *args: object, **kwargs: object) -> object:
        output = plain(self, *args, **kwargs)
        output["last_hidden_state"] = 2 * output["last_hidden_state"]
        return output

    monkeypatch.setattr(type(decoder), "forward", forward)
    assert find_tail(anatomy.model, given) is None


def test_a_family_that_cannot_be_called_without_memory_is_left_as_it_is() -> None:
    assert Anatomy(tiny_config("bloom"), torch.float32)._tail is None
