"""Trained weights as a few safetensors files, each small enough to move about."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from ds4jax.errors import DS4Error
from ds4jax.model.config import Config
from ds4jax.model.params import param_shapes

PIECE_BYTES = 15 << 20
IMPORTANCE = "importance."
HALF = ("embed", "linear", "experts")


def save(folder: Path, config: Config, weights: Mapping[str, np.ndarray], importance: Mapping[str, np.ndarray],
         notes: Mapping | None = None) -> list[Path]:  # fmt: skip
    """Write `folder`/nano-1.safetensors, …: matrices in float16, the rest as it is, importance in float32.

    Every piece holds the config (and `notes`) in its metadata and stays below PIECE_BYTES.
    """
    kinds = {path: kind for path, (_, kind) in param_shapes(config).items()}
    with np.errstate(over="ignore"):
        arrays = {p: np.asarray(a, np.float16 if kinds[p] in HALF else a.dtype) for p, a in weights.items()}
    for path, a in arrays.items():
        if a.dtype.kind == "f" and not np.isfinite(a).all():
            raise DS4Error(f"{path} holds values that are not finite or exceed float16; train again, more gently")
    arrays |= {IMPORTANCE + p: np.asarray(a, np.float32) for p, a in importance.items()}
    bins: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for path, a in arrays.items():
        cost = a.nbytes + 256  # its entry in the header
        if size + cost > PIECE_BYTES - 65536 and bins[-1]:
            bins.append({})
            size = 0
        bins[-1][path] = np.ascontiguousarray(a)
        size += cost
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i, content in enumerate(bins, 1):
        meta = {"config": json.dumps(config.to_dict()), "piece": f"{i}/{len(bins)}", "notes": json.dumps(notes or {})}
        path = folder / f"nano-{i}.safetensors"
        temporary = path.with_suffix(".part")
        save_file(content, temporary, metadata=meta)
        temporary.chmod(0o644)
        temporary.replace(path)
        paths.append(path)
    return paths


def load(folder: Path | str) -> tuple[Config, dict[str, np.ndarray], dict[str, np.ndarray], dict]:
    """What `save` wrote: config, weights, importance, notes."""
    folder = Path(folder)
    weights: dict[str, np.ndarray] = {}
    importance: dict[str, np.ndarray] = {}
    meta: dict[str, str] = {}
    count = None
    for i in range(1, 100):
        path = folder / f"nano-{i}.safetensors"
        if not path.exists():
            raise DS4Error(f"{path}: not there; give the folder with all of nano's pieces")
        with safe_open(path, "numpy") as f:
            meta = f.metadata()
            count = int(meta["piece"].split("/")[1])
            for name in f.keys():  # noqa: SIM118
                target = importance if name.startswith(IMPORTANCE) else weights
                target[name.removeprefix(IMPORTANCE)] = f.get_tensor(name)
        if i == count:
            break
    config = Config.from_dict(json.loads(meta["config"]), str(folder))
    missing = set(param_shapes(config)) - set(weights)
    if missing:
        raise DS4Error(f"{folder}: {min(missing)} is missing (of {len(missing)}); the pieces are of different runs")
    return config, weights, importance, json.loads(meta["notes"])


def with_vocabulary(config: Config, tokens: int, bos: int, eos: int) -> Config:
    """`config` for a tokenizer of `tokens` entries: rows of the embedding rounded up to a multiple of 32."""
    return dataclasses.replace(config, vocab_size=-(-tokens // 32) * 32, bos_token_id=bos, eos_token_id=eos)


def read(path: Path | str) -> tuple[Config, dict]:
    """Config and weights, dequantized to float32, of a GGUF or of a folder of pieces."""
    import jax.numpy as jnp

    from ds4jax import quant, weights

    path = Path(path)
    if path.is_dir():
        config, arrays, _, _ = load(path)
    else:
        with weights.open_checkpoint(path) as ckpt:
            config, arrays = ckpt.config, weights.load_arrays(ckpt, progress=False)

    def plain(a):
        if isinstance(a, quant.QuantizedArray):
            return quant.dequantize(a, jnp.float32)
        a = jnp.asarray(a)
        return a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a

    return config, {p: plain(a) for p, a in arrays.items()}
