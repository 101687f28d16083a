"""`ds4jax inspect`: what a file holds and the memory it needs, without loading it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ds4jax.cli import console, options
from ds4jax.errors import DS4Error

if TYPE_CHECKING:
    from ds4jax.model import Config
    from ds4jax.weights import Checkpoint, Contents

KINDS = {"gguf": "GGUF", "hub": "hub checkpoint", "orbax": "converted checkpoint (orbax)"}


def inspect(
    model: options.Model = "nano",
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write it all as one JSON object.")] = False,
    context: options.Context = None,
    slots: Annotated[int, typer.Option(min=1, metavar="N", help="Plan memory for N sequences at once.")] = 1,
    dtype: Annotated[str, typer.Option(metavar="NAME", help="Plan a cache in float32 or bfloat16.")] = "bfloat16",
    memory: Annotated[
        float | None, typer.Option(metavar="GIB", help="Say what fits a device with this much memory.")
    ] = None,
    mtp: options.Mtp = None,
) -> None:
    """Show what a file holds: sizes, tensors by type and by part of the model, and the memory it needs.

    Reads headers only: no weights are loaded and no GPU is touched. Every tensor's name, shape and place in the file
    is checked on the way, as it is when the model is loaded.

    \b
    Examples:
      ds4jax inspect model.gguf
      ds4jax inspect model.gguf --context 131072 --slots 4 --memory 141
      ds4jax inspect model.gguf --tensors | grep experts
      ds4jax inspect hub-folder/ --json | jq .config.hidden_size
    """
    path = options.checkpoint_path(model)
    options.host_only()
    from ds4jax import weights

    with weights.open_checkpoint(path, mtp=mtp) as ckpt:
        contents = weights.contents(ckpt.tensors.values())
        plan = _memory(ckpt, context, slots, dtype, memory)
        if as_json:
            print(json.dumps(_as_dict(ckpt, contents, plan, tensors), ensure_ascii=False, indent=2))
        else:
            _write(ckpt, contents, plan, tensors)


def _memory(ckpt: Checkpoint, context: int | None, slots: int, dtype: str, gib: float | None) -> dict[str, Any]:
    """The memory plan as a dict of bytes."""
    import jax.numpy as jnp

    from ds4jax.runtime import memory
    from ds4jax.runtime.platform import DTYPES

    limit = ckpt.config.max_position_embeddings
    if context is not None and context > limit:
        raise DS4Error(f"context {context}: this model takes 2 to {limit} tokens")
    if dtype not in DTYPES:
        raise DS4Error(f"dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    if gib is not None and not 0 < gib < 1 << 20:
        raise DS4Error(f"--memory {gib:g}: give the device's GiB, such as 80")
    sizes = dict(slots=slots, dtype=jnp.dtype(DTYPES[dtype]))
    plan = memory.plan(ckpt.config, ckpt.nbytes, context=context or min(8192, limit), **sizes)
    out: dict[str, Any] = {
        "context": plan.context, "slots": slots, "dtype": dtype, "weights": plan.weights, "cache": plan.cache,
        "workspace": plan.workspace, "total": plan.total,
    }  # fmt: skip
    if gib is not None:
        room = int(gib * 2**30)
        largest = memory.largest_context(ckpt.config, ckpt.nbytes, room, limit=limit, **sizes)
        out |= {"device": room, "fits": plan.total <= room, "largest_context": largest}
    return out


def _tokenizer(ckpt: Checkpoint) -> str | None:
    """Where the tokenizer is, in words."""
    source = ckpt.tokenizer_source
    if source is None or isinstance(source, dict) and "tokenizer.ggml.model" not in source:
        return None
    return f"{len(source['tokenizer.ggml.tokens'])} tokens" if isinstance(source, dict) else str(source)


def _as_dict(ckpt: Checkpoint, contents: Contents, plan: dict[str, Any], tensors: bool) -> dict[str, Any]:
    def shares(table):
        return {k: {"tensors": s.tensors, "bytes": s.nbytes, "parameters": s.parameters} for k, s in table.items()}

    out = {
        "path": str(ckpt.path), "kind": ckpt.kind, "files": len({t.file for t in ckpt.tensors.values()}),
        "bytes": contents.total.nbytes, "parameters": contents.total.parameters, "tensor_count": contents.total.tensors,
        "bits_per_weight": round(contents.total.bits_per_weight, 4), "tokenizer": _tokenizer(ckpt),
        "config": ckpt.config.to_dict(), "formats": shares(contents.by_format), "parts": shares(contents.by_part),
        "memory": plan,
    }  # fmt: skip
    if tensors:
        out["tensors"] = [
            {"path": t.path, "name": t.name, "format": t.format, "shape": list(t.shape), "bytes": t.nbytes}
            for t in ckpt.tensors.values()
        ]
    return out


def _write(ckpt: Checkpoint, contents: Contents, plan: dict[str, Any], tensors: bool) -> None:
    from ds4jax.weights import format_bytes

    total = contents.total
    print(f"{ckpt.path}: {KINDS[ckpt.kind]}, {format_bytes(total.nbytes)}, {_count(total.parameters)} parameters, "
          f"{total.bits_per_weight:.2f} bits per weight")  # fmt: skip
    print(f"tokenizer: {_tokenizer(ckpt) or 'none; prompts must be token ids'}\n")
    console.table(("", ""), _config_rows(ckpt.config))
    for name, shares in (("type", contents.by_format), ("part", contents.by_part)):
        console.table(
            (name, "tensors", "size", "parameters", "bits/weight"),
            [(k, s.tensors, format_bytes(s.nbytes), _count(s.parameters), f"{s.bits_per_weight:.2f}")
             for k, s in shares.items()],
            numbers=(1, 2, 3, 4),
        )  # fmt: skip
    head = f"memory for {plan['slots']} × {plan['context']} tokens, {plan['dtype']}"
    rows = [(k, format_bytes(plan[k])) for k in ("weights", "cache", "workspace", "total")]
    console.table((head, "size"), rows, numbers=(1,))
    if "device" in plan:
        verdict = "fits" if plan["fits"] else "does not fit"
        largest = plan["largest_context"]
        most = f"the largest context that fits is {largest}" if largest else "not even the weights fit"
        print(f"This {verdict} {format_bytes(plan['device'])}; {most}.")
    if tensors:
        console.listing(
            ("tensor", "in the file", "type", "shape", "size"),
            [(t.path, t.name, t.format, "×".join(map(str, t.shape)), format_bytes(t.nbytes))
             for t in ckpt.tensors.values()],
            numbers=(4,),
        )  # fmt: skip


def _config_rows(c: Config) -> list[tuple[str, str]]:
    ratios = c.compress_ratios[: c.num_hidden_layers]
    kinds = ((0, "window only"), (4, "CSA, ratio 4"), (128, "HCA, ratio 128"))
    attention = ", ".join(f"{ratios.count(m)} {name}" for m, name in kinds if m in ratios)
    return [
        ("layers", f"{c.num_hidden_layers}: {attention}" + ("; MTP layer" if c.num_nextn_predict_layers else "")),
        ("width", f"{c.hidden_size}, in {c.hc_mult} streams"),
        ("vocabulary", f"{c.vocab_size}"),
        ("attention", f"{c.num_attention_heads} heads of {c.head_dim} ({c.qk_rope_head_dim} rotary), one shared key, "
                      f"window {c.sliding_window}"),
        ("low ranks", f"queries {c.q_lora_rank}, output {c.o_lora_rank} in {c.o_groups} groups"),
        ("indexer", f"{c.index_n_heads} heads of {c.index_head_dim}, chooses {c.index_topk}"),
        ("experts", f"{c.num_experts_per_tok} of {c.n_routed_experts}, and {c.n_shared_experts} shared, of "
                    f"{c.moe_intermediate_size}; routed by hash in {c.num_hash_layers} layers"),
        ("context", f"up to {c.max_position_embeddings} tokens"),
    ]  # fmt: skip


def _count(n: int) -> str:
    """'284.3 B', '1.5 M', '900'."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return str(n)
