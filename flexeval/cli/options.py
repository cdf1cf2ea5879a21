"""Options that several commands take. Knows how they are written; not what they mean."""

import shlex
import sys
from typing import Annotated

import typer

from flexeval.errors import without_secrets

Device = Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="Where layers are computed.")]
Dtype = Annotated[str, typer.Option(metavar="auto|float32|bfloat16|float16", help="Type of the arithmetic.")]
GpuMemory = Annotated[str | None, typer.Option(metavar="SIZE", help="GPU memory at most: 16GiB.")]
CpuMemory = Annotated[str | None, typer.Option(metavar="SIZE", help="Host memory at most: 64GiB.")]
Disk = Annotated[str | None, typer.Option(metavar="DIR[:SIZE]", help="Folder for what fits nowhere else.")]
Policy = Annotated[
    str, typer.Option(metavar="auto|FILE|TEXT", help="Where everything rests: gpu-weights=0.2,cpu-kv=1,...")
]
ChatTemplate = Annotated[
    bool | None,
    typer.Option(
        "--chat-template/--no-chat-template",
        help="Ask in the model's chat template, or not.",
        show_default="as the suite says",
    ),
]
Deterministic = Annotated[
    bool,
    typer.Option("--deterministic", help="Compute each request apart, so that no answer depends on another; slower."),
]
KeepTop = Annotated[
    int,
    typer.Option(
        metavar="N", min=0, help="Keep N most probable tokens, by which settings are compared; 0: answers alone."
    ),
]
SuiteName = Annotated[
    str,
    typer.Option(
        "--suite",
        metavar="NAME|FILE.conf|lm-eval:PATH",
        help="What to ask: demo, helm-lite, a file of HELM run entries, or tasks of lm-evaluation-harness.",
    ),
]
Model = Annotated[
    str,
    typer.Option(
        metavar="REF",
        help="HF or prepared directory, hub name, GGUF file, smollm2, or dummy:NAME (random weights).",
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="What to compare: none, w8, w4, kv4, w4kv4, topk10, quest10, w4kv4-topk10, ... Repeatable.",
    ),
]
MaxEvalInstances = Annotated[int | None, typer.Option(metavar="N", min=1, help="Questions per task at most.")]
SkipMissing = Annotated[bool, typer.Option("--skip-missing", help="Run without tasks that have no data.")]


def command_line() -> str:
    """The command as it was called, for reports."""
    return without_secrets(shlex.join(["flexeval", *sys.argv[1:]]))
