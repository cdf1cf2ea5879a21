"""`flexeval bench`: options, and what is printed. Nothing is imported before it is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from flexeval.cli.options import CpuMemory, Device, Disk, Dtype, GpuMemory, Policy, command_line


def bench(
    model: Annotated[
        str,
        typer.Option(metavar="REF", help="As for run; dummy:NAME has random weights of a published model's sizes."),
    ],
    suite: Annotated[
        str | None, typer.Option(metavar="NAME|FILE.conf", help="Ask a suite's questions, instead of random tokens.")
    ] = None,
    prompt_len: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Random tokens of a prompt.", show_default="512")
    ] = None,
    gen_len: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Tokens to generate for each.", show_default="32")
    ] = None,
    shared_prefix: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Of a prompt's tokens, the first N are the same in all.")
    ] = None,
    score: Annotated[bool, typer.Option("--score", help="Score the prompts instead of generating.")] = False,
    ragged: Annotated[
        bool, typer.Option("--ragged", help="Random lengths, from a sixteenth of these on, as questions have them.")
    ] = False,
    num_requests: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Requests; else as many as make each of them no cheaper."),
    ] = None,
    scale: Annotated[
        str | None, typer.Option(metavar="1,4,16", help="Measure multiples of the requests as well.")
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Of the random tokens.", show_default="0")] = None,
    max_eval_instances: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Of a suite: questions per task.")
    ] = None,
    skip_missing: Annotated[bool, typer.Option("--skip-missing", help="Run without tasks that have no data.")] = False,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="What to measure: none, w8, w4, kv4, w4kv4, topk10, quest10, w4kv4-topk10, ... Repeatable.",
        ),
    ] = None,
    policy: Policy = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    gpu_memory: GpuMemory = None,
    cpu_memory: CpuMemory = None,
    disk: Disk = None,
    repeat: Annotated[int, typer.Option(metavar="N", min=1, help="Measured runs; the median one counts.")] = 1,
    warm_up: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Requests to answer beforehand.", show_default="all")
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Measure transformers, accelerate or deepspeed as well. Repeatable."),
    ] = None,
    peer_batch_size: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="A peer's batch.", show_default="1 for transformers, else what fits"),
    ] = None,
    peer_requests: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Ask peers N only, spread evenly.", show_default="all")
    ] = None,
    peer_gen_len: Annotated[
        int | None, typer.Option(metavar="N", min=2, help="Let peers generate N tokens only.", show_default="all")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE.json", help="Write every figure here.")] = None,
) -> None:
    """Measure how fast the engine and its peers answer, and how near the machine's bounds it comes."""
    from flexeval.bench.run import BenchOptions, run_bench
    from flexeval.bench.table import print_bench
    from flexeval.bench.work import choose_work, parse_scale
    from flexeval.progress import choose_progress

    console = Console()
    options = BenchOptions(
        model=model,
        work=choose_work(
            suite=suite,
            prompt_len=prompt_len,
            gen_len=gen_len,
            shared_prefix=shared_prefix,
            is_scoring=score,
            is_ragged=ragged,
            seed=seed,
            only_of_suites=(max_eval_instances, skip_missing),
        ),
        num_requests=num_requests,
        scale=parse_scale(scale) if scale is not None else (),
        max_eval_instances=max_eval_instances,
        skip_missing=skip_missing,
        settings=tuple(setting or ["none"]),
        policy=policy,
        device=device,
        dtype=dtype,
        gpu_memory=gpu_memory,
        cpu_memory=cpu_memory,
        disk=disk,
        num_repeats=repeat,
        num_warm_up=warm_up,
        peers=tuple(peer or []),
        peer_batch_size=peer_batch_size,
        peer_requests=peer_requests,
        peer_gen_len=peer_gen_len,
        command=command_line(),
    )
    results = run_bench(options, choose_progress(console))
    print_bench(results, console)
    if out is not None:
        results.save(out)
        console.print(f"Figures: {out}", soft_wrap=True, highlight=False)
