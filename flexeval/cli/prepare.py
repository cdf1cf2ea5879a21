"""`flexeval prepare-model`: options, and what is printed. Nothing is imported before it is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def prepare_model(
    model: Annotated[str, typer.Option(metavar="REF", help="As for run.")],
    setting: Annotated[
        str, typer.Option(metavar="NAME", help="Compression of the weights: w8, w4, w4-g128, w4-hqq, ...")
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A new directory, to be named with --model.", show_default="the cache"),
    ] = None,
    device: Annotated[
        str, typer.Option(metavar="auto|cpu|cuda", help="Where weights are packed; the bytes are the same.")
    ] = "auto",
    dtype: Annotated[
        str, typer.Option(metavar="auto|float32|bfloat16|float16", help="Type of the arithmetic, later.")
    ] = "auto",
) -> None:
    """Quantize a model once and write it, for all later runs: they read it instead of the original weights."""
    from flexeval.config import format_size
    from flexeval.preparation import PrepareOptions, prepare
    from flexeval.progress import choose_progress

    console = Console()
    options = PrepareOptions(model=model, setting=setting, out=out, device=device, dtype=dtype)
    done = prepare(options, choose_progress(console))
    found = done.manifest
    words = f"{found.setting}, {found.dtype}, {format_size(done.num_bytes)}" + ("" if done.is_new else ", as before")
    console.print(f"Prepared: {done.directory} ({words})", soft_wrap=True, highlight=False)
