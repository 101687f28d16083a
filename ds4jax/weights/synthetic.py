"""Random weights made straight on the device, in the formats of published files: for measurements, without a file."""

from __future__ import annotations

import functools
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ds4jax import quant
from ds4jax.errors import DS4Error
from ds4jax.model.config import Config
from ds4jax.model.params import param_shapes
from ds4jax.weights.write import ds4_formats

KINDS = {
    "flash-q2": ("IQ2_XXS", "Q2_K"),
    "flash-q4": ("Q4_K", "Q4_K"),
    "flash-iq3": ("IQ3_XXS", "IQ3_S"),
    "flash-mxfp4": ("MXFP4", "MXFP4"),
}
"""Formats of the routed experts' gate and up, and of their down projection; everything else as ds4 stores it."""

# where a block's float16 scales stand and the root-mean-square of the numbers they multiply: [(byte, rms, factor)]
_SCALES = {
    "Q8_0": [(0, 73.9, 1.0)],
    "IQ2_XXS": [(0, 52.0, 1.0)],
    "Q2_K": [(80, 13.0, 1.0), (82, 13.0, 1.5)],
    "IQ3_XXS": [(0, 150.0, 1.0)],
    "IQ3_S": [(0, 130.0, 1.0)],
    "Q4_K": [(0, 170.0, 1.0), (2, 170.0, 7.5)],
}
_STD = 0.02


def flash_config(layers: int = 43, *, mtp: bool = False) -> Config:
    """DeepSeek V4 Flash's sizes, with its first `layers` layers."""
    ratios = tuple(0 if n < 2 else 4 if n % 2 == 0 else 128 for n in range(layers))
    return Config(
        hidden_size=4096, vocab_size=129280, num_attention_heads=64, head_dim=512, qk_rope_head_dim=64, o_groups=8,
        q_lora_rank=1024, o_lora_rank=1024, n_routed_experts=256, num_experts_per_tok=6, moe_intermediate_size=2048,
        num_hash_layers=3, sliding_window=128, index_n_heads=64, index_head_dim=128, index_topk=512,
        num_hidden_layers=layers, compress_ratios=ratios, num_nextn_predict_layers=int(mtp),
    )  # fmt: skip


def formats(config: Config, kind: str) -> dict[str, str]:
    """The block format of every tensor: our path → format."""
    if kind not in KINDS:
        raise DS4Error(f"synthetic {kind!r}: choose one of {', '.join(KINDS)}")
    return ds4_formats(config, KINDS[kind])


def abstract_arrays(config: Config, kind: str) -> dict[str, Any]:
    """Shapes alone (`jax.ShapeDtypeStruct`, also inside `QuantizedArray`): to compile without any weights."""
    key = jax.eval_shape(lambda: jax.random.key(0, impl="rbg"))
    out = {}
    for path, format in formats(config, kind).items():
        shape, sort = param_shapes(config)[path]
        out[path] = jax.eval_shape(
            functools.partial(_tensor, format=format, shape=shape, sort=sort, experts=config.n_routed_experts), key
        )
    return out


def make_arrays(config: Config, kind: str, device: jax.Device | None = None, seed: int = 0) -> dict[str, Any]:
    """Random finite weights, well scaled, one tensor at a time in the device's memory.

    Returns:
      {our path: array or QuantizedArray}, as `load_arrays` gives them.
    """
    out, shapes = {}, param_shapes(config)
    with jax.default_device(device):
        for path, format in formats(config, kind).items():
            shape, sort = shapes[path]
            key = jax.random.key(seed ^ zlib.crc32(path.encode()), impl="rbg")
            out[path] = _make(key, format, shape, sort, config.n_routed_experts)
            jax.block_until_ready(out[path])  # the generator's scratch memory is free before the next
    return out


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _make(key, format, shape, sort, experts):
    return _tensor(key, format=format, shape=shape, sort=sort, experts=experts)


def _tensor(key, *, format: str, shape: tuple[int, ...], sort: str, experts: int):
    if sort == "norm":
        return jnp.ones(shape, jnp.float32)
    if sort == "ids":
        first = jax.random.randint(key, (shape[0], 1), 0, experts, jnp.int32)
        return (first + jnp.arange(shape[1], dtype=jnp.int32) * (experts // shape[1])) % experts
    if sort == "hc" and len(shape) == 1:
        return jnp.ones(shape, jnp.float32) if shape[0] in (1, 3) else jnp.zeros(shape, jnp.float32)
    if format in ("F32", "F16"):
        std = 0.1 if format == "F32" else _STD
        dtype = {"F32": jnp.float32, "F16": jnp.float16}[format]
        return (std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)
    return quant.from_blocks(random_blocks(key, format, shape), format, shape)


def random_blocks(key, format: str, shape: tuple[int, ...], std: float = _STD) -> jax.Array:
    """File bytes of random blocks whose weights have about this standard deviation: uint8 [..., row bytes]."""
    fmt = quant.FORMATS[format]
    blocks, nbytes = math.prod(shape) // fmt.block, fmt.row_bytes(fmt.block)
    bits, jitter = jax.random.split(key)
    raw = jax.random.bits(bits, (blocks, nbytes), jnp.uint8)
    if format == "MXFP4":  # e8m0 exponent first; e2m1 codes have a root mean square of 2.7
        raw = raw.at[:, 0].set(np.uint8(127 + round(math.log2(std / 2.7))))
    elif format in _SCALES:
        scale = jax.random.uniform(jitter, (blocks,), jnp.float32, 0.7, 1.3) * std
        for at, rms, factor in _SCALES[format]:
            raw = raw.at[:, at : at + 2].set(
                jax.lax.bitcast_convert_type((scale * (factor / rms)).astype(jnp.float16), jnp.uint8)
            )
    else:
        raise DS4Error(f"no random weights in {format}")
    return raw.reshape(*shape[:-1], -1)
