"""`ds4jax capture`: activations of prompts into a folder of safetensors files."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ds4jax.cli import console, options
from ds4jax.errors import DS4Error


def capture(
    model: options.Model,
    sites: Annotated[
        list[str] | None, typer.Argument(metavar="[SITES]...", help="Names or globs, such as 'layers.*.ffn_out'.")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", metavar="TEXT", help="A prompt; may be given several times.")
    ] = None,
    file: Annotated[str | None, typer.Option("--file", "-f", metavar="FILE", help="A prompt on each line.")] = None,
    out: Annotated[
        str | None,
        typer.Option("--out", "-o", metavar="FOLDER", help="Where to write; an interrupted run goes on there."),
    ] = None,
    positions: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="Positions such as 0,5,-1 or 10: or -8:-1; negative from the end. [all]"),
    ] = None,
    reduce: Annotated[str | None, typer.Option(metavar="NAME", help="Keep one row per prompt: mean or last.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Each prompt is a message to answer.")] = False,
    batch: Annotated[int | None, typer.Option(min=1, metavar="N", help="Prompts in one pass. [default: 8]")] = None,
    shard: Annotated[int, typer.Option(min=1, metavar="MB", help="About how large the files become.")] = 256,
    list_sites: Annotated[
        bool, typer.Option("--list", help="Only list the sites that the names stand for, with shapes.")
    ] = False,
    steer: Annotated[
        str | None, typer.Option(metavar="FILE", help="Directions to steer with meanwhile, everywhere.")
    ] = None,
    context: options.Context = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    kernels: options.Kernels = "auto",
    no_cache_quant: options.NoCacheQuant = False,
    quiet: options.Quiet = False,
) -> None:
    """Write activations of prompts to a folder.

    \b
    Examples:
      ds4jax capture nano --list                                        every site, with its shape
      ds4jax capture nano "layers.*.ffn_out" -p "Once upon a time" -o acts
      ds4jax capture model.gguf "layers.{3,7}.router.*" "final.hidden" --file prompts.txt -o acts --reduce last

    Python reads the folder with ds4jax.interp.open_capture("acts").
    """
    if list_sites:
        _list(options.checkpoint_path(model), sites or ["**"])
        return
    if not sites:
        raise DS4Error("name the sites to capture, such as 'layers.*.ffn_out'; --list shows them")
    if out is None:
        raise DS4Error("say where to write: --out FOLDER")
    prompts = list(prompt or [])
    if file is not None:
        prompts += options.prompt_lines(file)
    if not prompts:
        raise DS4Error("no prompt: give --prompt or --file")
    if reduce not in (None, "mean", "last"):
        raise DS4Error(f"--reduce {reduce}: choose mean or last")
    where = parse_positions(positions)
    options.model_path(model)

    lm = options.load(
        model, context=context, dtype=dtype, device=device, kernels=kernels, cache_quant=not no_cache_quant,
        quiet=quiet,
    )  # fmt: skip
    steering = None
    if steer is not None:
        from ds4jax.interp import Steering

        steering = Steering.load(steer)
    done = lm.capture(
        options.asked(prompts, chat), sites, positions=where, reduce=reduce, steering=steering, batch_size=batch,
        out=out, shard_bytes=shard << 20, progress=not quiet and console.is_terminal(sys.stderr),
    )  # fmt: skip
    if not quiet:
        console.note(f"{out}: {len(done)} prompts, {len(done.sites)} sites")


def parse_positions(text: str | None) -> list[int] | slice | None:
    """What `positions=` takes."""
    if text is None:
        return None
    try:
        if ":" in text:
            first, end = text.split(":")
            return slice(int(first) if first.strip() else None, int(end) if end.strip() else None)
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise DS4Error(f"--positions {text}: give numbers such as 0,5,-1 or a range such as -8:") from None


def _list(path, patterns: list[str]) -> None:
    from ds4jax.model import match_sites
    from ds4jax.weights import open_checkpoint

    options.host_only()
    with open_checkpoint(path) as ckpt:
        found = match_sites(patterns, ckpt.config)
    rows = [
        (s.name, "[" + ", ".join(["entries" if s.per_entry else "T", *map(str, s.shape)]) + "]", s.doc,
         "" if s.editable else "read only")
        for s in found
    ]  # fmt: skip
    console.table(("site", "shape", "what it is", ""), rows)
