"""Activations as integer digits, for kernels that multiply four bytes at a time.

A block of 32 activations shares a scale; each is then a whole number of 16 bits (24 for float32 activations), written
as signed bytes, most significant first. A product with an 8-bit weight is two (three) instructions for four weights,
and its error is that of 16 (24) bits: about 2⁻¹⁶ of the block's largest activation, below what bfloat16 activations
carry. Done once for all products of the same activations, by a kernel of its own: XLA makes five launches of it.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
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


EACH = 8  # numbers of a thread: 16 bytes of bfloat16


def split(x: Array, digits: int, norm: tuple[Array, float] | None = None) -> Digits:
    """x: [..., K], K a multiple of 32. NaN and infinities make their block's products NaN.

    norm: (weight [K], epsilon): x's rows divided by their root mean square, times weight, rounded to x's dtype, come in
    their place. NotImplementedError for rows that no program can hold.
    """
    lead, K = x.shape[:-1], x.shape[-1]
    rows = math.prod(lead)
    width = lo.power_of_two(K) if norm else min(1024, lo.power_of_two(K))
    warps = lo.warps_for(width)
    if norm and 32 * EACH * warps != width:
        raise NotImplementedError(f"rows of {K} numbers do not fill a program's threads")
    quarter = BLOCK // EACH  # threads of a block

    def kernel(x_ref, *refs):
        refs = list(refs)
        weight_ref = refs.pop(0) if norm else None
        words_ref, scale_ref, sums_ref = refs
        lane = jnp.arange(32 * warps, dtype=jnp.int32)
        n, first = pl.program_id(0), EACH * (pl.program_id(1) * 32 * warps + lane)
        live, own = first < K, jnp.arange(EACH, dtype=jnp.int32)
        place, mask = first[:, None] + own, live[:, None] & (own >= 0)
        weight = lo.load(weight_ref, (place,), mask=mask) if norm else None
        lo.loads_first()
        x = [v.astype(jnp.float32) for v in lo.unstack(lo.load(x_ref, (n, place), mask=mask))]
        if norm:
            scale = lax.rsqrt(jnp.sum(functools.reduce(jnp.add, [v * v for v in x])) / K + norm[1])
            weights = [w.astype(jnp.float32) for w in lo.unstack(weight)]
            x = [(v * scale * w).astype(x_ref.dtype).astype(jnp.float32) for v, w in zip(x, weights, strict=True)]
        whole, scale = whole_numbers(x, digits, (1, 2))
        lo.store(scale_ref, (n, first // BLOCK), scale, mask=live & (lane % quarter == 0))
        run = functools.reduce(jnp.add, whole)
        run = (run + lo.from_thread(run, 1)).astype(jnp.float32) * scale
        lo.store(sums_ref, (n, first // 16), run, mask=live & (lane % 2 == 0))
        for digit, pair in enumerate(words(whole, digits)):
            for i, word in enumerate(pair):  # one by one: side by side they would go through shared memory first
                lo.store(words_ref, (n, digit, first // 4 + i), word, mask=live)

    shapes = [((rows, digits, K // 4), jnp.int32), ((rows, K // BLOCK), jnp.float32), ((rows, K // 16), jnp.float32)]
    out = lo.call(
        kernel, [jax.ShapeDtypeStruct(*s) for s in shapes], x.reshape(rows, K), *([norm[0]] if norm else []),
        grid=(rows, -(-K // (32 * warps * EACH))), tuning=lo.Tuning(warps=warps, stages=1), name="split_activations",
    )  # fmt: skip
    return Digits(*(a.reshape(*lead, *a.shape[1:]) for a in out))


def whole_numbers(x: list[Array], digits: int, masks: tuple[int, ...]) -> tuple[list[Array], Array]:
    """Numbers of threads, float32 [threads] each, as whole numbers of so many bytes of which the first does not pass
    127, and what a block's are to be multiplied with: float32 [threads], NaN for a block with NaN or infinity.

    masks: in which bits of their number the threads of a block differ.
    """
    top = 127.0 * 256.0 ** (digits - 1)
    finite = [jnp.abs(v) < jnp.inf for v in x]  # false for NaN, which a maximum may pass over
    x = [jnp.where(f, v, 0) for f, v in zip(finite, x, strict=True)]
    peak = functools.reduce(jnp.maximum, [jnp.abs(v) for v in x])
    good = functools.reduce(jnp.logical_and, finite).astype(jnp.int32)
    for mask in masks:
        peak, good = jnp.maximum(peak, lo.from_thread(peak, mask)), good & lo.from_thread(good, mask)
    scale = jnp.maximum(peak, LEAST) / top
    inverse = 1 / scale
    whole = [jnp.clip(lo.round_even(v * inverse), -top, top).astype(jnp.int32) for v in x]
    return whole, jnp.where(good > 0, scale, jnp.nan)


LEAST = 2.0**-90  # a block whose largest number is smaller counts as if it were that


def words(whole: list[Array], digits: int) -> list[list[Array]]:
    """4n whole numbers → of each digit, the most significant first, n words of four signed bytes."""
    out, bias = [], 0
    for i in range(digits):
        # what a signed byte leaves of a number is the next byte of the number and half a byte's span
        b, pair = [w + bias if bias else w for w in whole], i | (4 + i) << 4
        halves = [lo.pick(b[n], b[n + 1], pair) for n in range(0, len(b), 2)]
        out.insert(0, [lo.pick(*halves[n : n + 2], 0x5410) for n in range(0, len(halves), 2)])
        bias += 128 << 8 * i
    return out
