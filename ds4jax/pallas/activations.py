"""Activations as integer digits, for kernels that multiply four bytes at a time.

A block of 32 activations shares a scale; each is then a whole number of 16 bits (24 for float32 activations), written
as signed bytes, most significant first. A product with an 8-bit weight is two (three) instructions for four weights,
and its error is that of 16 (24) bits: about 2⁻¹⁶ of the block's largest activation, below what bfloat16 activations
carry. Plain JAX, so that XLA fuses it with what made the activations and does it once for all their products.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array

BLOCK = 32


class Digits(NamedTuple):
    """x [..., K] as digits.

    words: int32 [..., digits, K/4], four signed bytes each. scale: float32 [..., K/32].
    sums: float32 [..., K/16], the sum of each run of 16 as the digits have it.
    """

    words: Array
    scale: Array
    sums: Array


def digits_for(dtype: Any) -> int:
    """How many digits activations of this dtype take."""
    return 3 if np.dtype(dtype) == np.float32 else 2


def split(x: Array, digits: int) -> Digits:
    """x: [..., K], K a multiple of 32. NaN and infinities make their block's products NaN."""
    lead, K = x.shape[:-1], x.shape[-1]
    x = x.astype(jnp.float32).reshape(*lead, K // BLOCK, BLOCK)
    top = 127.0 * 256.0 ** (digits - 1)  # so that the first digit never passes 127
    peak = jnp.max(jnp.abs(x), axis=-1)
    scale = jnp.where(peak == 0, 1.0, peak / top)
    whole = jnp.round(x / scale[..., None])
    whole = jnp.clip(jnp.where(jnp.isfinite(whole), whole, 0), -top, top).astype(jnp.int32)
    scale = jnp.where(jnp.isfinite(peak), scale, jnp.nan)
    sums = jnp.sum(whole.reshape(*lead, K // 16, 16), axis=-1).astype(jnp.float32)
    out = []
    for _ in range(digits):
        low = (whole << 24) >> 24  # signed; what it leaves out of `whole` is a multiple of 256
        out.append(low)
        whole = (whole - low) >> 8
    words = [_pack(d.reshape(*lead, K)) for d in reversed(out)]
    return Digits(jnp.stack(words, axis=-2), scale, sums * jnp.repeat(scale, 2, axis=-1))


def _pack(digit: Array) -> Array:
    quads = digit.reshape(*digit.shape[:-1], -1, 4) & 255
    shifts = 8 * np.arange(4, dtype=np.int32)
    return lax.reduce(quads << shifts, np.int32(0), lax.bitwise_or, (quads.ndim - 1,))
