"""Activations as integer digits, for kernels that multiply four bytes at a time.

A block of 32 activations shares a scale; each is then a whole number of 16 bits (24 for float32 activations), written
as signed bytes, most significant first. A product with an 8-bit weight is two (three) instructions for four weights,
and its error is that of 16 (24) bits: about 2⁻¹⁶ of the block's largest activation, below what bfloat16 activations
carry. Done once for all products of the same activations, by a kernel of its own: XLA makes five launches of it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from ds4jax.pallas import lowering as lo

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
    rows, blocks = math.prod(lead), K // BLOCK
    width = min(32, lo.power_of_two(blocks))

    def kernel(x_ref, words_ref, scale_ref, sums_ref):
        n, at = pl.program_id(0), pl.program_id(1) * width
        block = at + jnp.arange(width, dtype=jnp.int32)
        live = block < blocks
        place = block[:, None] * BLOCK + jnp.arange(BLOCK, dtype=jnp.int32)[None]
        tile = lo.load(x_ref, (n, place), mask=live[:, None] & (place >= 0))
        words, scale, sums = _split(tile, digits, width)
        lo.store(scale_ref, (n, block), scale, mask=live)
        two = 2 * block[:, None] + jnp.arange(2, dtype=jnp.int32)[None]
        lo.store(sums_ref, (n, two), sums, mask=live[:, None] & (two >= 0))
        eight = 8 * block[:, None] + jnp.arange(8, dtype=jnp.int32)[None]
        for digit, w in enumerate(words):
            lo.store(words_ref, (n, digit, eight), w, mask=live[:, None] & (eight >= 0))

    shapes = [((rows, digits, K // 4), jnp.int32), ((rows, blocks), jnp.float32), ((rows, K // 16), jnp.float32)]
    words, scale, sums = lo.call(
        kernel, [jax.ShapeDtypeStruct(*s) for s in shapes], x.reshape(rows, K), grid=(rows, -(-blocks // width)),
        tuning=lo.Tuning(warps=4, stages=1), name="split_activations",
    )  # fmt: skip
    return Digits(*(a.reshape(*lead, *a.shape[1:]) for a in (words, scale, sums)))


def _split(x: Array, digits: int, blocks: int) -> tuple[list[Array], Array, Array]:
    """x [blocks, 32] → words [blocks, 8] of each digit, scale [blocks], sums [blocks, 2]."""
    whole, scale = whole_numbers(x.astype(jnp.float32), digits)
    sums = jnp.sum(whole.reshape(blocks, 2, 16), axis=2).astype(jnp.float32) * scale[:, None]
    out = []
    for _ in range(digits):
        low = (whole << 24) >> 24  # signed; what it leaves out of `whole` is a multiple of 256
        out.append(low)
        whole = (whole - low) >> 8
    return [pack(d.reshape(blocks, 8, 4)) for d in reversed(out)], scale, sums


def whole_numbers(x: Array, digits: int) -> tuple[Array, Array]:
    """Blocks x [blocks, …] → whole numbers of so many bytes of which the first does not pass 127, and what each block's
    are to be multiplied with: float32 [blocks], NaN for a block that holds NaN or infinity."""

    def most(of):
        for axis in range(x.ndim - 1, 0, -1):
            of = jnp.max(of, axis=axis)
        return of

    top = 127.0 * 256.0 ** (digits - 1)
    finite = jnp.abs(x) < jnp.inf  # false for NaN, which a maximum may pass over
    x = jnp.where(finite, x, 0)
    peak = most(jnp.abs(x))
    scale = jnp.where(peak == 0, 1.0, peak / top)
    each = scale.reshape(-1, *[1] * (x.ndim - 1))
    whole = jnp.clip(lo.round_even(x / each), -top, top).astype(jnp.int32)
    return whole, jnp.where(most(jnp.where(finite, 0.0, 1.0)) > 0, jnp.nan, scale)


def pack(digit: Array) -> Array:
    """[…, 4] whole numbers → words of their low bytes."""
    return jnp.sum((digit & 255) << (8 * jnp.arange(4, dtype=jnp.int32)), axis=-1)  # no two have a bit in common
