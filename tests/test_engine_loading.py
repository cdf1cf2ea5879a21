"""Weights are packed once, kept whole, found again, and never mistaken for others; memory stays lean meanwhile."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from tiny_models import assert_equal_results, tiny_case, tiny_config, tiny_model

from flexeval.engine.checkpoint import SafetensorsCheckpoint
from flexeval.engine.codecs.codec import Codec, IntegerCodec
from flexeval.engine.codecs.hqq import HqqCodec
from flexeval.engine.compute.anatomy import Anatomy
from flexeval.engine.executor import Executor
from flexeval.engine.memory.disk import DiskExtent, DiskTier
from flexeval.engine.memory.slab import SlabLayout
from flexeval.engine.random_checkpoint import RandomCheckpoint
from flexeval.errors import CapacityError, DiskError, ModelError
from flexeval.policy.policy import Policy, Split
from flexeval.policy.policy import Tier as TierName
from flexeval.request import TokenResult

CPU = torch.device("cpu")
ON_DISK = Policy(weights=Split(disk=1.0), row_tokens=24)
HALF = Policy(weights=Split(cpu=0.5, disk=0.5), row_tokens=24)
IN_MEMORY = Policy(row_tokens=24)


class Checkpoint(RandomCheckpoint):
    """Says which layers were asked for."""

    def __init__(self, anatomy: Anatomy, *, seed: int = 0):
        super().__init__(anatomy, seed=seed)
        self.read: list[int] = []

    def layer(self, layer: int) -> dict[str, torch.Tensor]:
        self.read.append(layer)
        return super().layer(layer)


class Run:
    """One run of a tiny model of random weights with a disk folder."""

    def __init__(
        self,
        folder: Path,
        policy: Policy,
        *,
        codec: Codec | None = None,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        device: torch.device = CPU,
    ):
        anatomy = Anatomy(tiny_config("llama"), dtype)
        checkpoint = Checkpoint(anatomy, seed=seed)
        disk = DiskTier(folder)
        with Executor(anatomy, checkpoint, policy, codec=codec, device=device, disk_tier=disk) as executor:
            self.disk_bytes = disk.used_bytes
            self.results = executor.execute(tiny_case("llama").requests)
        assert disk.used_bytes == disk.kept_bytes == 0
        self.layers_read = checkpoint.read

    @property
    def plain(self) -> list[TokenResult]:
        return [dataclasses.replace(result, elapsed_s=0.0) for result in self.results]


def kept_layers(folder: Path) -> list[Path]:
    return sorted(folder.glob("prepared/*/layer-*.bin"))


@pytest.mark.parametrize("codec", [None, IntegerCodec(4, 32)], ids=["none", "w4"])
def test_what_rests_on_disk_is_packed_once(codec: Codec | None, tmp_path: Path) -> None:
    first = Run(tmp_path, ON_DISK, codec=codec)
    assert first.layers_read == [0, 1, 2, 3]
    written = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in kept_layers(tmp_path)}
    assert len(written) == 4
    again = Run(tmp_path, ON_DISK, codec=codec)
    assert again.layers_read == []
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in kept_layers(tmp_path)} == written
    in_memory = Run(tmp_path, IN_MEMORY, codec=codec)
    assert in_memory.layers_read == [], "a fast start"
    elsewhere = Run(tmp_path / "other", IN_MEMORY, codec=codec)
    assert elsewhere.layers_read == [0, 1, 2, 3]
    assert kept_layers(tmp_path / "other") == [], "only what rests on disk is kept there"
    assert first.plain == again.plain == in_memory.plain == elsewhere.plain
    layout = SlabLayout(Anatomy(tiny_config("llama"), torch.float32).layer_specs(0), codec)
    assert first.disk_bytes == again.disk_bytes == 4 * layout.num_bytes, "room is counted, kept or not"
    assert in_memory.disk_bytes == 0


def test_layers_that_an_earlier_run_did_not_need_are_added(tmp_path: Path) -> None:
    half = Run(tmp_path, HALF)
    assert len(kept_layers(tmp_path)) == 2
    whole = Run(tmp_path, ON_DISK)
    assert len(whole.layers_read) == 2 and len(kept_layers(tmp_path)) == 4
    assert half.plain == whole.plain


def test_other_weights_types_and_codecs_are_kept_apart(tmp_path: Path) -> None:
    variants = [
        {},
        {"seed": 1},
        {"dtype": torch.bfloat16},
        {"codec": IntegerCodec(4, 32)},
        {"codec": IntegerCodec(4, 64)},
        {"codec": HqqCodec(4, 64)},
    ]
    for number, variant in enumerate(variants, start=1):
        assert Run(tmp_path, ON_DISK, **variant).layers_read == [0, 1, 2, 3], variant
        assert len(list((tmp_path / "prepared").iterdir())) == number
    for variant in variants:
        assert Run(tmp_path, ON_DISK, **variant).layers_read == [], variant


def test_a_file_that_is_not_whole_is_made_anew(tmp_path: Path) -> None:
    expected = Run(tmp_path, ON_DISK).plain
    short, gone, *_ = kept_layers(tmp_path)
    os.truncate(short, 4096)
    gone.unlink()
    again = Run(tmp_path, ON_DISK)
    assert again.layers_read == [0, 1] and again.plain == expected
    assert Run(tmp_path, ON_DISK).layers_read == []


def test_a_byte_that_changed_is_named_with_its_layer(tmp_path: Path) -> None:
    """What lies on a disk for months may rot; a wrong weight shows nowhere."""
    expected = Run(tmp_path, ON_DISK).plain
    _, damaged, *_ = kept_layers(tmp_path)
    data = damaged.read_bytes()
    damaged.write_bytes(data[:999] + bytes([data[999] ^ 4]) + data[1000:])
    with pytest.raises(ModelError, match=rf"layer 1 \({damaged.name}\) is damaged: its SHA-256.*{damaged}"):
        Run(tmp_path, ON_DISK)
    assert [path.name for path in tmp_path.iterdir()] == ["prepared"]
    damaged.unlink()
    again = Run(tmp_path, ON_DISK)
    assert again.layers_read == [1] and again.plain == expected


def test_a_run_that_stops_while_it_prepares_leaves_whole_layers_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocate, num_allocated = DiskTier.allocate, 0

    def allocate_three(self: DiskTier, num_bytes: int) -> object:
        nonlocal num_allocated
        num_allocated += 1
        if num_allocated > 3:
            raise CapacityError("no room")
        return allocate(self, num_bytes)

    with monkeypatch.context() as patches:
        patches.setattr(DiskTier, "allocate", allocate_three)
        with pytest.raises(CapacityError, match="no room"):
            Run(tmp_path, ON_DISK)
    assert len(kept_layers(tmp_path)) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["prepared"]
    assert Run(tmp_path, ON_DISK).layers_read == [3]


def test_a_model_in_use_is_not_discarded_and_later_is(tmp_path: Path) -> None:
    anatomy = Anatomy(tiny_config("llama"), torch.float32)
    disk = DiskTier(tmp_path)
    with Executor(anatomy, RandomCheckpoint(anatomy), ON_DISK, codec=None, device=CPU, disk_tier=disk) as executor:
        assert not DiskTier(tmp_path).shelf.discard_oldest()
        assert executor.tiers[TierName.DISK].used_bytes > 0
    assert disk.shelf.discard_oldest() and kept_layers(tmp_path) == []


def save(directory: Path, *, scale: float = 1.0) -> None:
    model = tiny_model("llama")
    if scale != 1.0:
        model = type(model)(model.config)
        model.load_state_dict({name: scale * tensor for name, tensor in tiny_model("llama").state_dict().items()})
    model.save_pretrained(directory)


def identity(directory: Path) -> str:
    return SafetensorsCheckpoint(Anatomy(tiny_config("llama"), torch.float32), directory).identity


def test_files_are_told_apart_by_what_they_hold_not_by_where_they_lie(tmp_path: Path) -> None:
    save(tmp_path / "here")
    weights = tmp_path / "here" / "model.safetensors"
    first = identity(tmp_path / "here")
    assert identity(tmp_path / "here") == first
    (tmp_path / "here").rename(tmp_path / "there")
    assert identity(tmp_path / "there") == first, "moved"
    (tmp_path / "there").rename(tmp_path / "here")
    status = weights.stat()
    save(tmp_path / "here", scale=1.01)
    assert weights.stat().st_size == status.st_size
    changed = identity(tmp_path / "here")
    assert changed != first, "other weights of the same shapes"
    with weights.open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"\0" * 8)
    os.utime(weights, ns=(0, status.st_mtime_ns + 10**9))
    assert identity(tmp_path / "here") not in (first, changed), "written over in place"


def test_a_real_checkpoint_is_prepared_and_answers_like_transformers(tmp_path: Path) -> None:
    save(tmp_path / "model")
    case = tiny_case("llama")
    for _ in range(2):
        anatomy = Anatomy(tiny_config("llama"), torch.float32)
        checkpoint = SafetensorsCheckpoint(anatomy, tmp_path / "model")
        disk = DiskTier(tmp_path / "disk")
        with Executor(anatomy, checkpoint, ON_DISK, codec=None, device=CPU, disk_tier=disk) as executor:
            assert_equal_results(executor.execute(case.requests), case.expected)
    assert len(kept_layers(tmp_path / "disk")) == 4


def test_host_memory_holds_about_two_layers_while_all_is_put_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted in tensors that are alive: of the layer being packed, and of the one read meanwhile."""
    layer_bytes = SlabLayout(Anatomy(tiny_config("llama"), torch.float32).layer_specs(0), None).num_bytes
    alive: dict[int, Mapping[str, torch.Tensor]] = {}
    most = 0
    layer_of, pack_into = RandomCheckpoint.layer, SlabLayout.pack_into

    def read(self: RandomCheckpoint, layer: int) -> dict[str, torch.Tensor]:
        alive[layer] = layer_of(self, layer)
        return dict(alive[layer])

    def pack(self: SlabLayout, tensors: dict[str, torch.Tensor], slab: torch.Tensor, *, device: torch.device) -> None:
        nonlocal most
        layer = min(alive)
        deadline = time.monotonic() + 10
        while len(alive) < min(2, 4 - layer) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)  # enough to read yet another, were it begun
        most = max(most, sum(t.numel() * t.element_size() for of in alive.values() for t in of.values()))
        pack_into(self, tensors, slab, device=device)
        assert tensors == {}, "each tensor's memory can go as soon as it is packed"
        del alive[layer]

    monkeypatch.setattr(RandomCheckpoint, "layer", read)
    monkeypatch.setattr(SlabLayout, "pack_into", pack)
    Run(tmp_path, ON_DISK)
    assert most == 2 * layer_bytes


def test_a_layer_is_packed_while_the_one_before_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing the first waits for the second to be packed: one after the other, it would time out."""
    packed = [threading.Event() for _ in range(4)]
    pack_into, write, num_written = SlabLayout.pack_into, DiskExtent.write, 0

    def pack(self: SlabLayout, tensors: dict[str, torch.Tensor], slab: torch.Tensor, *, device: torch.device) -> None:
        pack_into(self, tensors, slab, device=device)
        next(event for event in packed if not event.is_set()).set()

    def wait_and_write(self: DiskExtent, data: torch.Tensor, offset: int = 0) -> None:
        nonlocal num_written
        num_written += 1
        assert packed[min(num_written, 3)].wait(timeout=30)
        write(self, data, offset)

    with monkeypatch.context() as patches:
        patches.setattr(SlabLayout, "pack_into", pack)
        patches.setattr(DiskExtent, "write", wait_and_write)
        beside = Run(tmp_path, ON_DISK, codec=IntegerCodec(4, 32))
    assert num_written == len(kept_layers(tmp_path)) == 4
    assert beside.plain == Run(tmp_path / "other", IN_MEMORY, codec=IntegerCodec(4, 32)).plain
    assert Run(tmp_path, ON_DISK, codec=IntegerCodec(4, 32)).layers_read == [], "each file's digest is its own"


@pytest.mark.parametrize("failing", [0, 2, 3])
def test_a_layer_that_cannot_be_written_ends_the_loading_and_leaves_whole_layers(
    failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, num_written = DiskExtent.write, 0

    def fail(self: DiskExtent, data: torch.Tensor, offset: int = 0) -> None:
        nonlocal num_written
        num_written += 1
        if num_written > failing:
            raise DiskError("broken sector")
        write(self, data, offset)

    with monkeypatch.context() as patches:
        patches.setattr(DiskExtent, "write", fail)
        with pytest.raises(DiskError, match="broken sector"):
            Run(tmp_path, ON_DISK)
    assert [path.name for path in kept_layers(tmp_path)] == [f"layer-{layer:04d}.bin" for layer in range(failing)]
    assert [path.name for path in tmp_path.iterdir()] == (["prepared"] if failing else [])
    assert Run(tmp_path, ON_DISK).layers_read == list(range(failing, 4))


@pytest.mark.gpu
@pytest.mark.parametrize("codec", [None, IntegerCodec(4, 32), HqqCodec(4, 32)], ids=["none", "w4", "w4-hqq"])
def test_a_gpu_packs_the_same_bytes_as_a_cpu(codec: Codec | None, tmp_path: Path) -> None:
    gpu = torch.device("cuda", 0)
    on_cpu = Run(tmp_path, ON_DISK, codec=codec)
    mixed = Policy(weights=Split(gpu=0.5, cpu=0.25, disk=0.25), row_tokens=24)
    started_fast = Run(tmp_path, mixed, codec=codec, device=gpu)
    assert started_fast.layers_read == []
    on_gpu = Run(tmp_path / "gpu", ON_DISK, codec=codec, device=gpu)
    for one, other in zip(kept_layers(tmp_path), kept_layers(tmp_path / "gpu"), strict=True):
        assert one.read_bytes() == other.read_bytes()
    assert_equal_results(started_fast.results, on_cpu.results)
    assert_equal_results(on_gpu.results, on_cpu.results)


@pytest.mark.parametrize("is_bound", [False, True])
def test_tied_tensors_are_in_memory_once_and_count_once(is_bound: bool) -> None:
    anatomy = Anatomy(tiny_config("opt"), torch.float32)
    state = anatomy.model.state_dict(keep_vars=True)
    head, embedding = state["lm_head.weight"], state["model.decoder.embed_tokens.weight"]
    expected = sum(tensor.numel() for tensor in state.values()) * 4 - head.numel() * 4
    assert head is embedding
    if is_bound:
        anatomy.bind_rest(RandomCheckpoint(anatomy).rest(), CPU)
        state = anatomy.model.state_dict(keep_vars=True)
        assert state["lm_head.weight"].data_ptr() == state["model.decoder.embed_tokens.weight"].data_ptr()
    assert anatomy.resident_bytes(None) == expected
