"""`ds4jax bench`: how fast a model, or its kernels alone, run here."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ds4jax.cli import console, options
from ds4jax.errors import DS4Error

if TYPE_CHECKING:
    from collections.abc import Iterable


def bench(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="GGUF file or checkpoint folder.")] = None,
    synthetic: Annotated[
        str | None,
        typer.Option(metavar="KIND", help="Random weights: flash-q2, flash-q4, flash-iq3 or flash-mxfp4."),
    ] = None,
    layers: Annotated[int, typer.Option(min=1, max=43, metavar="N", help="Layers of a synthetic model.")] = 43,
    contexts: Annotated[
        str, typer.Option(metavar="N,…", help="Prefill to each of these, then decode there; empty for none.")
    ] = "2048,4096,8192,16384,32768",
    batch: Annotated[str, typer.Option(metavar="N,…", help="Decode this many sequences at once; empty for none.")] = "",
    batch_context: Annotated[int, typer.Option(min=1, metavar="N", help="How far those sequences are.")] = 1024,
    steps: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens decoded at a time.")] = 64,
    table: Annotated[bool, typer.Option("--table", help="Time each product of a synthetic model, too.")] = False,
    only_table: Annotated[bool, typer.Option("--only-kernels", help="Time the products and nothing else.")] = False,
    timeline: Annotated[
        bool, typer.Option("--timeline", help="Show what a decoded token spends its time on, kernel by kernel.")
    ] = False,
    tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Rows of activations in that table.")] = 1,
    out: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write .json, .csv (rates) or .svg (rates).")
    ] = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    kernels: options.Kernels = "auto",
) -> None:  # fmt: skip
    """Measure prefill, decode, batches and kernels.

    \b
    Examples:
      ds4jax bench model.gguf
      ds4jax bench --synthetic flash-q2 --layers 8 --batch 1,16,64 -o bench.json
      ds4jax bench --synthetic flash-q2 --only-kernels
      ds4jax bench --synthetic flash-q2 --layers 8 --contexts "" --timeline
    """
    if (model is None) == (synthetic is None):
        raise DS4Error("bench: give a MODEL, or --synthetic with one of its kinds")
    if (table or only_table) and synthetic is None:
        raise DS4Error("the table of kernels is of a synthetic model: add --synthetic flash-q2")
    contexts, batch = _numbers("--contexts", contexts), _numbers("--batch", batch)
    if out is not None and out.suffix not in (".json", ".csv", ".svg"):
        raise DS4Error(f"--output {out}: the name must end in .json, .csv or .svg")

    import jax

    from ds4jax import runtime
    from ds4jax.quant.api import set_kernels
    from ds4jax.runtime import bench as measure

    runtime.use_compilation_cache()
    platform = runtime.choose(device=device, dtype=dtype, kernels=kernels)
    set_kernels(platform.kernels)
    result: dict[str, Any] = {**measure.describe(), "computes": str(platform), "kernels": [], "rates": []}
    print(f"{result['device']}, jax {result['jax']}; {platform}")
    with jax.default_device(platform.device):
        bandwidth = measure.copy_bandwidth(1 << (30 if platform.kind == "cuda" else 26))
        result["copy_bytes_per_s"] = bandwidth
        print(f"copies move {bandwidth / 1e9:.0f} GB/s")
        if table or only_table:
            config, experts = _synthetic(synthetic, 43 if only_table else layers)
            how = None if platform.kernels == "pallas" else "xla"
            for row in measure.kernel_table(config, experts, tokens, implementation=how, bandwidth=bandwidth):
                result["kernels"].append(row)
                print("{kernel:18} {format:8} {shape:16} {microseconds:9.1f} µs {gigabytes_per_s:7.0f} GB/s "
                      "{of_copy:5.0%} of copies {per_step_ms:8.3f} ms a step".format(**row))  # fmt: skip
        if not only_table:
            config, programs = _programs(model, synthetic, layers, platform)
            rows = measure.frontiers(programs, config, platform.dtype, contexts, steps=steps, device=platform.device)
            _show(rows if contexts else [], result["rates"])
            _show(
                measure.batches(programs, config, platform.dtype, batch, context=batch_context, steps=steps,
                                device=platform.device),
                result["rates"],
            )  # fmt: skip
            if timeline:
                rows, token = measure.timeline(programs, config, platform.dtype, device=platform.device)
                result["timeline"] = {"kernels": rows, "token": token}
                _show_timeline(rows, token)
    if out is not None:
        _write(out, result)


def _numbers(option: str, text: str) -> list[int]:
    try:
        found = [int(n) for n in text.replace(" ", "").split(",") if n]
    except ValueError:
        raise DS4Error(f"{option} {text!r}: give whole numbers with commas between them") from None
    if any(n < 1 for n in found):
        raise DS4Error(f"{option} {text!r}: must be at least 1")
    return found


def _synthetic(kind: str, layers: int) -> tuple[Any, tuple[str, str]]:
    from ds4jax.weights import synthetic

    if kind not in synthetic.KINDS:
        raise DS4Error(f"--synthetic {kind!r}: choose one of {', '.join(synthetic.KINDS)}")
    return synthetic.flash_config(layers), synthetic.KINDS[kind]


def _programs(model: str | None, kind: str | None, layers: int, platform) -> tuple[Any, Any]:
    from ds4jax import runtime

    if model is not None:
        from ds4jax import weights

        with weights.open_checkpoint(options.checkpoint_path(model)) as ckpt:
            config, progress = ckpt.config, console.is_terminal(sys.stderr)
            arrays = weights.load_arrays(ckpt, platform.device, progress=progress)
    else:
        from ds4jax.weights import synthetic

        config, _ = _synthetic(kind, layers)
        arrays = synthetic.make_arrays(config, kind, platform.device)
    graphdef, state = runtime.build_model(config, arrays, dtype=platform.dtype, cache_quant=True)
    return config, runtime.Programs(graphdef, state)


def _show(rows: Iterable[dict[str, Any]], kept: list[dict[str, Any]]) -> None:
    for row in rows:
        kept.append(row)
        prefill = row["prefill_tokens_per_s"]
        before = "" if prefill is None else f"prefill {prefill:9.1f} tokens/s   "
        after = f"decode {row['decode_tokens_per_s']:9.1f} tokens/s"
        print(f"context {row['context']:8}  slots {row['slots']:4}  {before}{after}")
        sys.stdout.flush()


def _show_timeline(rows: list[dict[str, Any]], token: dict[str, float]) -> None:
    print("a token: {wall:.0f} µs, of which {launches:.0f} kernels run {busy:.0f} µs".format(**token))
    for row in rows:
        if row["share"] >= 0.002:
            print("{microseconds:9.1f} µs {share:6.1%} {runs:7.1f} runs  {kernel}".format(**row))


def _write(path: Path, result: dict[str, Any]) -> None:
    if path.suffix == ".json":
        path.write_text(json.dumps(result, indent=1) + "\n")
    elif path.suffix == ".csv":
        with path.open("w", newline="") as f:
            writer = csv.DictWriter(f, ["context", "slots", "prefill_tokens_per_s", "decode_tokens_per_s"])
            writer.writeheader()
            writer.writerows(result["rates"])
    else:
        path.write_text(plot(result))


def plot(result: dict[str, Any]) -> str:
    """An SVG of prefill and decode rates by context, both axes logarithmic."""
    import math

    rows = [r for r in result["rates"] if r["slots"] == 1]
    lines = []
    for name, colour in (("prefill", "#1f77b4"), ("decode", "#d62728")):
        key = f"{name}_tokens_per_s"
        lines.append((name, colour, [(r["context"], r[key]) for r in rows if r.get(key)]))
    points = [p for _, _, line in lines for p in line]
    if not points:
        raise DS4Error("nothing to plot: measure contexts of one sequence")
    xs, ys = [math.log2(x) for x, _ in points], [math.log10(y) for _, y in points]
    left, right, low, high = min(xs) - 0.2, max(xs) + 0.2, math.floor(min(ys)), math.ceil(max(ys) + 1e-9)
    at = lambda x, y: (  # noqa: E731
        70 + 520 * (math.log2(x) - left) / (right - left), 330 - 290 * (math.log10(y) - low) / max(1, high - low)
    )  # fmt: skip
    out = ['<svg xmlns="http://www.w3.org/2000/svg" width="640" height="390" font-family="sans-serif" font-size="12">']
    out.append(f'<rect width="640" height="390" fill="white"/><text x="70" y="22">{result["device"]}: tokens/s</text>')
    for e in range(low, high + 1):
        y = at(2**left, 10.0**e)[1]
        out.append(f'<path d="M70 {y:.1f}H590" stroke="#ddd"/><text x="8" y="{y + 4:.1f}">{10**e:g}</text>')
    for x in sorted({x for x, _ in points}):
        out.append(f'<text x="{at(x, 1)[0]:.1f}" y="352" text-anchor="middle">{x}</text>')
    for i, (name, colour, line) in enumerate(lines):
        if not line:
            continue
        path = " ".join(f"{'M' if j == 0 else 'L'}{x:.1f} {y:.1f}" for j, (x, y) in enumerate(at(*p) for p in line))
        out.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in (at(*p) for p in line)]
        out.append(f'<text x="{480 + 60 * i}" y="22" fill="{colour}">{name}</text>')
    return "\n".join([*out, '<text x="320" y="378" text-anchor="middle">context, tokens</text></svg>']) + "\n"
