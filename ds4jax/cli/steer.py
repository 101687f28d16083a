"""`ds4jax steer build | sweep | generate | show`: directions from contrasting prompts, and their use."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from ds4jax.cli import console, options
from ds4jax.errors import DS4Error

steer = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Build steering directions and try them out.")

Chat = Annotated[bool, typer.Option("--chat", help="Each line is a message to answer.")]


@steer.command()
def build(
    model: options.Model,
    target: Annotated[str, typer.Argument(metavar="TARGET", help="File of prompts to steer towards, one a line.")],
    control: Annotated[str, typer.Argument(metavar="CONTROL", help="File with the pair of each, line by line.")],
    out: Annotated[
        str, typer.Option("--out", "-o", metavar="FILE", help="x.f32 (ds4), x.gguf (llama.cpp) or x.safetensors.")
    ],
    site: Annotated[
        str | None, typer.Option(metavar="SITES", help="Name or glob. [layers.*.ffn_out; for .gguf streams_out]")
    ] = None,
    method: Annotated[str, typer.Option(metavar="NAME", help="mean or pca.")] = "mean",
    position: Annotated[str, typer.Option(metavar="WHERE", help="last, mean, or a number.")] = "last",
    no_pairs: Annotated[
        bool, typer.Option("--no-normalize", help="Do not give every pair's difference the same length.")
    ] = False,
    no_orthogonal: Annotated[
        bool, typer.Option("--no-orthogonal", help="Keep the component along the control prompts' mean.")
    ] = False,
    operation: Annotated[
        str | None, typer.Option(metavar="NAME", help="add or project; for .safetensors. [by the format]")
    ] = None,
    chat: Chat = False,
    context: options.Context = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    kernels: options.Kernels = "auto",
    no_cache_quant: options.NoCacheQuant = False,
    quiet: options.Quiet = False,
) -> None:
    """Build directions from pairs of prompts.

    \b
    Examples:
      ds4jax steer build nano scripture.txt manuals.txt -o style.gguf --position mean
      ds4jax steer build model.gguf polite.txt rude.txt -o polite.f32 --chat
    """
    pairs = [_lines(target), _lines(control)]
    if len(pairs[0]) != len(pairs[1]):
        raise DS4Error(f"{target} has {len(pairs[0])} prompts and {control} {len(pairs[1])}: they must be pairs")
    suffix = Path(out).suffix
    if suffix not in (".f32", ".gguf", ".safetensors"):
        raise DS4Error(f"{out}: name it .f32 (ds4), .gguf (llama.cpp) or .safetensors")
    fitting = {".f32": ("ffn_out", "attn_out"), ".gguf": ("streams_out",)}.get(suffix)
    if site is not None and fitting and not site.endswith(fitting):
        raise DS4Error(f"{out}: {suffix} files hold directions of {' or '.join(fitting)}; name it .safetensors")
    where: int | str = int(position) if re.fullmatch(r"-?\d+", position) else position
    options.model_path(model)
    from ds4jax.interp.build import build_directions

    lm = _load(model, context, dtype, device, kernels, no_cache_quant, quiet)
    if site is None:
        last = lm.config.num_hidden_layers - 1
        site = f"layers.{{1-{last}}}.streams_out" if suffix == ".gguf" else "layers.*.ffn_out"
    directions = build_directions(
        lm, *(options.asked(p, chat) for p in pairs), site=site, method=method, position=where,
        normalize_pairs=not no_pairs, orthogonal=not no_orthogonal, operation=operation,
    )  # fmt: skip
    directions.save(out)
    scores = directions.info["separation"]
    rows = [(name, f"{s['auc']:.3f}", f"{s['gap']:.2f}") for name, s in scores.items()]
    console.table(("site", "auc", "gap"), rows, numbers=(1, 2))
    if not quiet:
        console.note(f"{out}: {len(directions.vectors)} directions for {directions.words}")


@steer.command()
def sweep(
    model: options.Model,
    directions: Annotated[str, typer.Argument(metavar="DIRECTIONS", help="A .f32, .gguf or .safetensors file.")],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", metavar="TEXT", help="A prompt; may be given several times.")
    ] = None,
    file: Annotated[str | None, typer.Option("--file", "-f", metavar="FILE", help="A prompt on each line.")] = None,
    scales: Annotated[str, typer.Option(metavar="LIST", help="Strengths to try.")] = "-2,-1,0,1,2",
    count: Annotated[
        list[str] | None, typer.Option(metavar="REGEX", help="Measure how often this occurs, per 100 words.")
    ] = None,
    policy: Annotated[
        str | None, typer.Option(metavar="NAME", help="always, decoding, final-answer, thinking, prompt.")
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", "-o", metavar="FILE", help="Also write .html, .svg, .png or .json.")
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", min=1, metavar="N", help="Tokens each.")] = 60,
    temperature: options.Temperature = 0.0,
    seed: Annotated[int, typer.Option(metavar="N", help="Fixes the draws.")] = 0,
    chat: Chat = False,
    context: options.Context = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    kernels: options.Kernels = "auto",
    no_cache_quant: options.NoCacheQuant = False,
    quiet: options.Quiet = False,
) -> None:
    """Continue prompts at several strengths, side by side.

    \b
    Examples:
      ds4jax steer sweep nano style.gguf -p "After that, the" --scales=-4,-2,0,2,4 --count "LORD|king" -o sweep.html
    """
    prompts = list(prompt or []) + (_lines(file) if file is not None else [])
    if not prompts:
        raise DS4Error("no prompt: give --prompt or --file")
    try:
        strengths = [float(s) for s in scales.split(",")]
        patterns = {p: re.compile(p) for p in count or ()}
    except ValueError:
        raise DS4Error(f"--scales {scales}: give numbers such as -2,-1,0,1,2") from None
    except re.error as e:
        raise DS4Error(f"--count: no regular expression ({e})") from None
    if out is not None and Path(out).suffix not in (".html", ".svg", ".png", ".json"):
        raise DS4Error(f"{out}: name it .html, .svg, .png or .json")
    options.model_path(model)
    from ds4jax.interp import Steering
    from ds4jax.interp.build import sweep as run

    steering = Steering.load(directions, policy=policy)
    lm = _load(model, context, dtype, device, kernels, no_cache_quant, quiet)

    def rate(pattern):
        return lambda text: 100 * len(pattern.findall(text)) / max(1, len(text.split()))

    result = run(
        lm, steering, options.asked(prompts, chat), strengths, measures={name: rate(p) for name, p in patterns.items()},
        max_tokens=max_tokens, temperature=temperature, seed=seed,
    )  # fmt: skip
    head, *body = result.table()
    console.table(head, body, numbers=range(len(head)))
    texts = [
        (f"{s:g}", " ".join(r["text"].split()))
        for s in result.scales
        for r in result.rows
        if r["scale"] == s and r["prompt"] == 0
    ]
    console.table(("scale", f"after: {prompts[0]}"), texts, numbers=(0,))
    if out is not None:
        result.save(out)
        if not quiet:
            console.note(f"wrote {out}")


@steer.command()
def generate(
    model: options.Model,
    directions: Annotated[str, typer.Argument(metavar="DIRECTIONS", help="A .f32, .gguf or .safetensors file.")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to continue, or the message to answer.")],
    scale: Annotated[float | None, typer.Option(metavar="X", help="Strength of an addition. [1]")] = None,
    ffn: Annotated[float | None, typer.Option(metavar="X", help="Strength of a projection at ffn_out. [1]")] = None,
    attn: Annotated[float | None, typer.Option(metavar="X", help="Strength of a projection at attn_out. [0]")] = None,
    policy: options.SteerPolicy = None,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a message to answer.")] = False,
    think: options.Think = False,
    tools: options.Tools = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", min=1, metavar="N", help="Tokens to write.")] = 512,
    temperature: options.Temperature = 1.0,
    seed: options.Seed = None,
    context: options.Context = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    kernels: options.Kernels = "auto",
    no_cache_quant: options.NoCacheQuant = False,
    quiet: options.Quiet = False,
) -> None:
    """Continue a text, or answer a message, under steering.

    \b
    Examples:
      ds4jax steer generate nano style.gguf "After that, the" --scale 3
      ds4jax steer generate model.gguf polite.f32 "Weather in Rome?" --ffn 1 --tools tools.json
    """
    from ds4jax.cli.generate import _write_one
    from ds4jax.interp import Steering

    functions = None if tools is None else options.read_list(tools, "tools")
    given = {"scale": scale, "ffn": ffn, "attn": attn, "policy": policy}
    steering = Steering.load(directions, **{k: v for k, v in given.items() if v is not None})
    in_chat = chat or think or functions is not None
    (asked,) = options.asked([prompt], in_chat)
    rules = options.check_sampling(temperature=temperature, seed=seed)
    options.model_path(model)
    lm = _load(model, context, dtype, device, kernels, no_cache_quant, quiet)
    stream = lm.generate(
        asked, max_tokens=max_tokens, think=think, tools=functions, stream=True, steering=steering, **rules
    )
    _write_one(stream, "", in_chat)


@steer.command()
def show(
    directions: Annotated[str, typer.Argument(metavar="DIRECTIONS", help="A .f32, .gguf or .safetensors file.")],
) -> None:
    """Say what a file of directions holds and how it is applied."""
    import numpy as np

    from ds4jax.interp.directions import Directions

    d = Directions.load(directions)
    rows = [(name, v.size, f"{np.linalg.norm(v):.4f}") for name, v in d.vectors.items()]
    console.table(("site", "size", "length"), rows, numbers=(1, 2))
    console.note(f"for {d.words}")


def _lines(path: str) -> list[str]:
    lines = options.prompt_lines(path)
    if not lines:
        raise DS4Error(f"{path}: holds no prompt; write one on each line")
    return lines


def _load(model, context, dtype, device, kernels, no_cache_quant, quiet):
    return options.load(
        model, context=context, dtype=dtype, device=device, kernels=kernels, cache_quant=not no_cache_quant,
        quiet=quiet,
    )  # fmt: skip
