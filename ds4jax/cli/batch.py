"""`ds4jax batch`: files of requests to shards of results."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any

import typer

from ds4jax.cli import console, options
from ds4jax.errors import DS4Error


def batch(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(metavar="INPUT...", help='Files, globs or folders; "-": stdin; none: those of the job in OUT.'),
    ] = None,
    out: Annotated[str, typer.Option("--out", "-o", metavar="FOLDER", help="Where the job lives.")] = "",
    model: Annotated[
        str, typer.Option("--model", "-m", metavar="MODEL", help='GGUF file, checkpoint folder, or "nano".')
    ] = "nano",
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", min=1, metavar="N", help="Length at most.")] = 512,
    temperature: options.Temperature = 1.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.05,
    seed: Annotated[int, typer.Option(metavar="N", help="What requests without a seed draw from.")] = 0,
    slots: Annotated[int, typer.Option(min=1, metavar="N", help="Sequences that decode together, at most.")] = 64,
    cache: Annotated[
        float | None, typer.Option(metavar="GIB", help="Memory for the sequences' caches. [default: what is free]")
    ] = None,
    order: Annotated[str, typer.Option(metavar="NAME", help="arrival, or longest first.")] = "arrival",
    parquet: Annotated[bool, typer.Option("--parquet", help="Write Parquet shards instead of JSONL.")] = False,
    column: Annotated[
        list[str] | None, typer.Option(metavar="FIELD=NAME", help="Take a field from another column of a table.")
    ] = None,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Go on although input, model or options have changed.")
    ] = False,
    metrics_port: Annotated[
        int | None, typer.Option(min=0, max=65535, metavar="PORT", help="Serve Prometheus text there.")
    ] = None,
    ray: Annotated[int | None, typer.Option(min=1, metavar="N", help="Run on N workers of a Ray cluster.")] = None,
    context: options.Context = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    kernels: options.Kernels = "auto",
    mtp: options.Mtp = None,
    no_cache_quant: options.NoCacheQuant = False,
    quiet: options.Quiet = False,
) -> None:
    """Run files of requests, for days if need be.

    Each line of INPUT is {"id", "prompt" or "messages", and any option}, or a line of OpenAI's batch files. Each gives
    one record in OUT/results-*.jsonl, or in OUT/errors.jsonl with the reason. Run the same command again to go on after
    any interruption. Ctrl-C finishes what has begun; a second one stops now. The options here are for requests that do
    not give them. Exit codes: 0 where at least one request succeeded, 1 where all failed, 2 bad input, 130 interrupted.

    \b
    Examples:
      ds4jax batch jobs.jsonl -o out/ --model model.gguf
      ds4jax batch 'data/*.jsonl.zst' -o out/ -m model.gguf --max-tokens 300 --temperature 0
      ds4jax batch questions.parquet -o out/ --column prompt=question --parquet
      cat jobs.jsonl | ds4jax batch - -o out/
      ds4jax batch -o out/ -m model.gguf          go on with the job in out/
    """
    from ds4jax.jobs.job import Options, run_job
    from ds4jax.jobs.watch import summary

    if not out:
        raise DS4Error("no folder for the results: give one with -o")
    columns = dict(_pair(c) for c in column or ())
    options.model_path(model)
    how = Options(
        defaults=dict(max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p), seed=seed,
        columns=columns, order=order, parquet=parquet, accept_changes=accept_changes, metrics_port=metrics_port,
        display=False if quiet else None,
    )  # fmt: skip
    load = dict(context=context, dtype=dtype, device=device, kernels=kernels, mtp=mtp, cache_quant=not no_cache_quant)
    make = functools.partial(make_model, model, slots, None if cache is None else int(cache * 2**30), quiet, load)
    if ray is None:
        view = run_job(inputs or [], make, out, how)
    else:
        from ds4jax.jobs.cluster import run_on_ray

        view = run_on_ray(inputs or [], make, out, how, workers=ray)
    if not quiet:
        console.table(("", ""), summary(view))
    all_failed = view.errors > 0 and view.errors == view.done
    if view.errors:  # even when quiet: in a pipe nothing else would tell
        count = f"all {view.done:,}" if all_failed else f"{view.errors:,} of {view.done:,}"
        console.note(f"{count} requests failed: {Path(out) / 'errors.jsonl'} says why, line by line", "yellow")
    if view.state != "finished":
        console.note(f"stopped at {view.done:,} of {view.total:,}: run the same command again to go on")
        raise typer.Exit(130)
    if all_failed:
        raise typer.Exit(1)


def make_model(model: str, slots: int, budget: int | None, quiet: bool, load: dict[str, Any]) -> Any:
    """Load a model for a job; also on a worker."""
    from ds4jax.jobs.model import Local

    return Local(options.load(model, quiet=quiet, **load), slots=slots, budget=budget)


def _pair(text: str) -> tuple[str, str]:
    field, equals, name = text.partition("=")
    if not equals or not field or not name:
        raise DS4Error(f"--column {text!r}: write FIELD=NAME, such as prompt=question")
    return field, name
