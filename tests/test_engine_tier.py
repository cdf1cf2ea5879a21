"""Every tier keeps bytes, counts them, says clearly when it is full, and leaves nothing behind."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from flexeval.engine.memory import tier as tier_module
from flexeval.engine.memory.disk import DiskTier
from flexeval.engine.memory.tier import MemoryTier, Tier
from flexeval.errors import CapacityError
from flexeval.policy.policy import Tier as TierName

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
TIERS = {
    "cpu": lambda folder: MemoryTier(TierName.CPU, CPU, compute_device=CPU),
    "disk": DiskTier,
    "gpu": lambda folder: MemoryTier(TierName.GPU, CUDA, compute_device=CUDA),
    "cpu-beside-gpu": lambda folder: MemoryTier(TierName.CPU, CPU, compute_device=CUDA),
}
every_tier = pytest.mark.parametrize(
    "tier", [pytest.param(name, marks=pytest.mark.gpu) if "gpu" in name else name for name in TIERS], indirect=True
)


@pytest.fixture
def tier(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Tier]:
    tier = TIERS[request.param](tmp_path)
    yield tier
    tier.close()
    # What is page-locked and not given back fails whoever is handed the same pages next.
    assert isinstance(tier, DiskTier) or tier.used_bytes == 0


def numbers(num_bytes: int) -> torch.Tensor:
    return (torch.arange(num_bytes) * 7 % 251).to(torch.uint8)


def open_files(folder: Path) -> list[str]:
    links = [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return [str(link) for link in links if link.is_relative_to(folder) and link.is_file()]


@every_tier
def test_bytes_come_back_from_where_they_were_put(tier: Tier) -> None:
    one, other = tier.allocate(5000), tier.allocate(3000)
    one.write(numbers(5000))
    other.write(torch.zeros(3000, dtype=torch.uint8))
    one.write(torch.full((700,), 255, dtype=torch.uint8), offset=4000)
    expected = numbers(5000)
    expected[4000:4700] = 255
    for start, stop in ((0, 5000), (3999, 4701), (4999, 5000), (0, 0)):
        out = torch.zeros(stop - start, dtype=torch.uint8)
        one.read(out, start)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        assert torch.equal(out, expected[start:stop])
    assert (one.num_bytes, other.num_bytes) == (5000, 3000)
    one.free()
    other.free()


@every_tier
def test_parts_come_to_the_same_places_and_nothing_else_does(tier: Tier) -> None:
    extent = tier.allocate(50_000)
    extent.write(numbers(50_000))
    parts = [slice(0, 64), slice(4000, 9000), slice(9000, 9064), slice(49_999, 50_000)]
    out = torch.full((60_000,), 255, dtype=torch.uint8)
    expected = out.clone()
    for part in parts:
        expected[part] = numbers(50_000)[part]
    extent.read_parts(out, parts, give_way=lambda: None)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    assert torch.equal(out, expected)
    extent.free()


@every_tier
def test_a_view_is_the_bytes_themselves_and_only_where_the_device_can_address_them(tier: Tier) -> None:
    extent = tier.allocate(1000)
    view = extent.view()
    if isinstance(tier, DiskTier) or not tier.is_addressable:
        assert view is None
        extent.free()
        return
    assert view is not None and view.shape == (1000,)
    extent.write(numbers(1000))
    assert torch.equal(view.cpu(), numbers(1000))
    view[10] = 99
    out = torch.zeros(1, dtype=torch.uint8)
    extent.read(out, 10)
    assert out.item() == 99
    extent.free()


def test_host_memory_is_not_addressable_from_another_device() -> None:
    tier = MemoryTier(TierName.CPU, CPU, compute_device=torch.device("meta"))
    assert tier.allocate(8).view() is None


@every_tier
def test_use_is_counted_and_goes_back_to_nothing(tier: Tier) -> None:
    first, second = tier.allocate(1 << 16), tier.allocate(300)
    assert tier.used_bytes == tier.peak_bytes == (1 << 16) + 300
    first.free()
    third = tier.allocate(1 << 16)
    assert tier.peak_bytes == (1 << 16) + 300
    second.free()
    third.free()
    empty = tier.allocate(0)
    empty.write(torch.empty(0, dtype=torch.uint8))
    empty.free()
    tier.close()
    assert tier.used_bytes == 0
    assert tier.peak_bytes == (1 << 16) + 300


@pytest.mark.parametrize("tier", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True)
def test_memory_that_is_full_says_what_is_in_use_and_how_to_go_on(tier: Tier) -> None:
    kept = tier.allocate(1 << 20)
    with pytest.raises(CapacityError, match=r"no room for 1024\.0 TiB more in .pu memory \(1\.0 MiB in use\).*--disk"):
        tier.allocate(1 << 50)
    assert tier.used_bytes == 1 << 20
    kept.free()


def test_a_disk_that_is_full_says_where_and_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    tier = DiskTier(tmp_path)
    kept = tier.allocate(10)
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(CapacityError) as caught:
        tier.allocate(3 << 30)
    assert "no room for 3.0 GiB on disk: No space left on device" in str(caught.value)
    assert str(tmp_path) in str(caught.value) and "--disk" in str(caught.value)
    assert tier.used_bytes == 10
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1
    kept.free()


def test_room_on_disk_is_taken_at_once_not_when_it_is_written(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path)
    tier.allocate(1 << 20)
    (path,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert path.stat().st_blocks * 512 >= 1 << 20
    tier.close()


def test_the_folder_on_disk_goes_with_the_tier(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "on demand"
    tier = DiskTier(folder)
    freed, kept = tier.allocate(100), tier.allocate(100)
    freed.free()
    assert len([path for path in folder.rglob("*") if path.is_file()]) == 1
    kept.write(numbers(100))
    tier.close()
    assert list(folder.iterdir()) == []


def test_thousands_of_extents_on_disk_hold_no_file_open(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path)
    extents = [tier.allocate(16) for _ in range(50)]
    for extent in extents:
        extent.write(numbers(16))
        extent.read(torch.empty(16, dtype=torch.uint8))
    assert open_files(tmp_path) == []
    tier.close()


def test_two_runs_share_a_disk_folder(tmp_path: Path) -> None:
    one, other = DiskTier(tmp_path), DiskTier(tmp_path)
    extents = [tier.allocate(4) for tier in (one, other)]
    for value, extent in enumerate(extents):
        extent.write(torch.full((4,), value, dtype=torch.uint8))
    other.close()
    out = torch.full((4,), 9, dtype=torch.uint8)
    extents[0].read(out)
    assert out.tolist() == [0] * 4
    one.close()


@pytest.fixture
def locked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """What is page-locked, and by which thread, as if there were a GPU."""
    locked: list[tuple[int, str]] = []

    def forget(data: torch.Tensor) -> None:
        locked.remove(next(entry for entry in locked if entry[0] == data.numel()))

    monkeypatch.setattr(
        "flexeval.engine.memory.tier.pin", lambda data: locked.append((data.numel(), threading.current_thread().name))
    )
    monkeypatch.setattr("flexeval.engine.memory.tier.unpin", forget)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return locked


def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_what_is_expected_is_made_beside_the_caller_and_made_once(locked: list[tuple[int, str]]) -> None:
    tier = MemoryTier(TierName.CPU, CPU, compute_device=CUDA)
    for _ in range(2):  # a second batch finds what the first one has left
        tier.expect([500, 900, 500, 70])
        until(lambda: len(locked) == 4)
        extents = [tier.allocate(size) for size in (900, 500, 500)]
        assert [extent.num_bytes for extent in extents] == [900, 500, 500]
        assert len(locked) == 4 and all(thread.startswith("page_lock") for _, thread in locked)
        for extent in extents:
            extent.free()
        tier.expect_no_more()
        assert tier.used_bytes == tier.peak_bytes == 1970
    tier.close()
    assert locked == [] and tier.used_bytes == 0


def test_what_is_expected_and_not_begun_is_made_by_whoever_asks(
    locked: list[tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    pin = tier_module.pin

    def wait(data: torch.Tensor) -> None:
        if threading.current_thread().name.startswith("page_lock"):
            begun.set()
            assert go_on.wait(10)
        pin(data)

    monkeypatch.setattr("flexeval.engine.memory.tier.pin", wait)
    tier = MemoryTier(TierName.CPU, CPU, compute_device=CUDA)
    tier.expect([300, 80, 80])
    assert begun.wait(10)
    tier.allocate(80).free()
    assert [size for size, _ in locked] == [80], "while the first is being made"
    go_on.set()
    assert tier.allocate(300).num_bytes == 300
    tier.expect_no_more()
    assert {(size, thread.split("_0")[0]) for size, thread in locked if size == 300} == {(300, "page_lock")}
    assert len(locked) in (2, 3), "the second one of 80 may have been begun"
    tier.close()
    assert tier.used_bytes == 300, "which is in use"


def test_what_cannot_be_made_ahead_is_told_to_whoever_asks_for_it(
    locked: list[tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(data: torch.Tensor) -> None:
        raise CapacityError("the host memory could not be page-locked", tier="cpu")

    monkeypatch.setattr("flexeval.engine.memory.tier.pin", fail)
    tier = MemoryTier(TierName.CPU, CPU, compute_device=CUDA)
    tier.expect([300, 300])
    with pytest.raises(CapacityError, match="page-locked"):
        tier.allocate(300)
    tier.expect_no_more()
    tier.close()
    assert tier.used_bytes == 0


@pytest.mark.gpu
def test_page_locked_buffers_are_used_again() -> None:
    tier = MemoryTier(TierName.CPU, CPU, compute_device=CUDA)
    tier.allocate(1 << 20).free()
    again = tier.allocate((1 << 20) - 4096)
    assert tier.peak_bytes == tier.used_bytes == 1 << 20
    again.free()
    tier.allocate(1 << 22).free()  # does not fit what is idle: that is given back first
    assert tier.used_bytes == 1 << 22
    tier.close()
    assert tier.used_bytes == 0


def test_idle_buffers_make_room_one_by_one(locked: list[tuple[int, str]]) -> None:
    tier = MemoryTier(TierName.CPU, CPU, compute_device=CUDA)

    def batch(*sizes: int) -> list[int]:
        """A batch's logs and one sweep's hidden states; what stays page-locked when all have been given back."""
        for extent in [tier.allocate(size) for size in sizes]:
            extent.free()
        return sorted(size for size, _ in locked)

    assert batch(9000, 7000, 300) == [300, 7000, 9000]
    assert batch(9000, 7000, 300) == [300, 7000, 9000]
    assert tier.allocate(100).num_bytes == 100  # neither fits what is idle nor beside it: the smallest gives way
    assert sorted(size for size, _ in locked) == [100, 7000, 9000]
    assert (tier.used_bytes, tier.peak_bytes) == (16100, 16300)
    tier.close()
    assert [size for size, _ in locked] == [100]
