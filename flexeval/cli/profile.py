"""`flexeval profile`: options, and what is printed. Nothing is imported before it is needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from flexeval.cli.options import Device, Disk, Dtype

if TYPE_CHECKING:  # opening it would import more than options need
    from flexeval.policy.profile import Profile


def profile(
    device: Device = "auto",
    dtype: Dtype = "auto",
    disk: Disk = None,
    repeat: Annotated[int, typer.Option(metavar="N", min=1, max=100, help="Measurements; their medians count.")] = 20,
) -> None:
    """Measure this machine at leisure: later runs plan with these figures, not with those of one second."""
    from flexeval.backends.loading import dtypes_of, pick_device
    from flexeval.backends.options import read_limits
    from flexeval.policy.hardware import machine_of
    from flexeval.policy.profile import path_of, save, summarize
    from flexeval.policy.rates.machine import measure
    from flexeval.progress import choose_progress

    console = Console()
    place, folder = pick_device(device), read_limits(None, None, disk).disk_dir
    kind: Literal["cuda", "cpu"] = "cuda" if place.type == "cuda" else "cpu"
    for number_type in dtypes_of(dtype, place):
        machine, measured = machine_of(kind, number_type, folder), []
        with choose_progress(console).activity(f"measuring {kind}, {machine['dtype']}") as update:
            for num_done in range(repeat):
                measured.append(measure(kind, number_type, folder))
                update(num_done + 1, repeat)
        found = summarize(machine, measured)
        save(found, path_of(machine))
        _show(found, console)
        console.print(f"Kept for later runs: {path_of(machine)}", soft_wrap=True, highlight=False)


def _show(found: Profile, console: Console) -> None:
    from flexeval.policy.profile import BUSY_SPREAD
    from flexeval.report import format as show

    table = Table(box=SIMPLE_HEAD)
    table.add_column("rate", no_wrap=True)
    for name in ("median", "spread"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, rate in found.rates.items():
        if rate:
            words, factor, unit = _WORDS[name]
            table.add_row(words, f"{show.digits(rate * factor)} {unit}", f"{found.spreads[name]:.0%}")
    console.print(table)
    if any(spread > BUSY_SPREAD for spread in found.spreads.values()):
        console.print("Some vary widely: measure again when the machine has nothing else to do.", highlight=False)


_WORDS = {
    "to_gpu_bytes_per_s": ("copies to the GPU", 1e-9, "GB/s"),
    "from_gpu_bytes_per_s": ("copies from the GPU", 1e-9, "GB/s"),
    "disk_read_bytes_per_s": ("reads from disk", 1e-9, "GB/s"),
    "disk_write_bytes_per_s": ("writes to disk", 1e-9, "GB/s"),
    "flops_per_s": ("matrix products", 1e-12, "TFLOP/s"),
    "cold_speedup": ("the same after a rest", 1.0, "times as fast"),
    "single_product_bytes_per_s": ("matrices times one token", 1e-9, "GB/s"),
    "few_product_bytes_per_s": ("matrices times few tokens", 1e-9, "GB/s"),
    "product_s": ("any product of few tokens", 1e6, "us"),
    "attention_flops_per_s": ("attention in prompts", 1e-12, "TFLOP/s"),
    "attention_part_s": ("a token and head in attention", 1e9, "ns"),
    "single_attention_flops_per_s": ("attention of one token", 1e-12, "TFLOP/s"),
    "elementwise_per_s": ("simple operations", 1e-9, "billion numbers/s"),
    "softmax_per_s": ("log-softmax", 1e-9, "billion logits/s"),
    "ranking_per_s": ("the most probable tokens", 1e-9, "billion logits/s"),
    "memory_bytes_per_s": ("memory, read and written", 1e-9, "GB/s"),
    "launch_s": ("a small operation", 1e6, "us"),
}
"""By the name of a rate: what it is, and the unit it is shown in."""
