"""Weights come out of checkpoints as transformers reads them, layer by layer; bad files are refused by name."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, tiny_config, tiny_model

from flexeval.engine.checkpoint import SafetensorsCheckpoint
from flexeval.engine.compute.anatomy import Anatomy
from flexeval.engine.random_checkpoint import RandomCheckpoint
from flexeval.errors import ModelError


@pytest.fixture
def llama_dir(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path)
    return tmp_path


def read(directory: Path, family: str = "llama") -> dict[str, torch.Tensor]:
    anatomy = Anatomy(tiny_config(family), torch.float32)
    checkpoint = SafetensorsCheckpoint(anatomy, directory)
    tensors = dict(checkpoint.rest())
    for layer in range(anatomy.num_layers):
        tensors |= {f"{anatomy.layers_name}.{layer}.{name}": t for name, t in checkpoint.layer(layer).items()}
    assert all(parameter.is_meta for module in anatomy.layers for parameter in module.parameters())
    return tensors


@pytest.mark.parametrize("family", FAMILIES)
def test_reads_what_transformers_saved(family: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    tensors = read(tmp_path, family)
    expected = tiny_model(family).state_dict()
    assert set(tensors) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor), name


def test_reads_several_files(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    tensors = read(tmp_path)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in tiny_model("llama").state_dict().items())


def test_a_truncated_file_is_named(llama_dir: Path) -> None:
    path = llama_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"corrupt or cut short.*model\.safetensors"):
        read(llama_dir)


def end_of(work: Callable[[], object]) -> str:
    """What a process of its own that does this says at its end: a file that fails under a memory map would kill it."""
    source, target = os.pipe()
    if not (process := os.fork()):
        try:
            work()
            os.write(target, b"it came to its end")
        except BaseException as error:
            os.write(target, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(target)
    with open(source, encoding="utf-8") as said:
        text = said.read()
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return text if code == 0 else f"killed by signal {-code}"


@pytest.mark.parametrize("family", ["llama", "mixtral"])  # the loader keeps to itself what goes wrong within a merge
@pytest.mark.parametrize("part", ["layer 2", "embedding, norms and head"])
def test_a_file_that_is_cut_short_while_it_is_in_use_is_named_with_the_layer(
    family: str, part: str, tmp_path: Path
) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    checkpoint = SafetensorsCheckpoint(Anatomy(tiny_config(family), torch.float32), tmp_path)
    os.truncate(tmp_path / "model.safetensors", 4096)
    said = end_of(checkpoint.rest if part.startswith("e") else lambda: checkpoint.layer(2))
    assert said.startswith(
        f"ModelError: {part}: model.safetensors cannot be read: it was cut short while it was in use"
    )


def test_a_disk_that_fails_under_the_weights_is_named_with_the_layer(
    llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = SafetensorsCheckpoint(Anatomy(tiny_config("llama"), torch.float32), llama_dir)

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(ModelError, match=r"layer 1: model\.safetensors cannot be read: Input/output error"):
        checkpoint.layer(1)


def test_a_file_of_rubbish_is_named(llama_dir: Path) -> None:
    (llama_dir / "model.safetensors").write_bytes(b"\xff" * 4096)
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        read(llama_dir)


def test_a_missing_tensor_is_named(llama_dir: Path) -> None:
    path = llama_dir / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.2\.mlp\.up_proj\.weight"):
        read(llama_dir)


def test_a_tensor_of_another_shape_is_named(llama_dir: Path) -> None:
    path = llama_dir / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is \[3, 3\].*asks for \[128, 64\]"):
        read(llama_dir)


def test_a_missing_shard_and_a_shard_elsewhere_are_named(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="100KB")
    victim = sorted(tmp_path.glob("*.safetensors"))[0]
    victim.unlink()
    with pytest.raises(ModelError, match=victim.name):
        read(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"] = dict.fromkeys(data["weight_map"], "../outside.safetensors")
    index.write_text(json.dumps(data))
    with pytest.raises(ModelError, match="outside"):
        read(tmp_path)


def test_a_broken_index_is_named(llama_dir: Path) -> None:
    (llama_dir / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ModelError, match=r"index\.json"):
        read(llama_dir)


def test_random_weights_have_the_right_shapes_and_differ_by_layer() -> None:
    anatomy = Anatomy(tiny_config("mixtral"), torch.float32)
    checkpoint = RandomCheckpoint(anatomy)
    first, second = checkpoint.layer(0), checkpoint.layer(1)
    for spec in anatomy.layer_specs(0):
        assert first[spec.name].shape == spec.shape
        if len(spec.shape) > 1:
            assert not torch.equal(first[spec.name], second[spec.name])
            assert first[spec.name].std().item() == pytest.approx(0.02, rel=0.2)
    rest = checkpoint.rest()
    assert set(rest) == set(anatomy.model.state_dict())


def test_random_weights_are_the_same_every_time() -> None:
    anatomy = Anatomy(tiny_config("opt"), torch.float32)
    one, other = RandomCheckpoint(anatomy).layer(2), RandomCheckpoint(anatomy).layer(2)
    assert all(torch.equal(one[name], other[name]) for name in one)
