"""What is done to queries, keys and heads after their product, in one launch: norm, rotary embedding, the rounding of
the cache, and the write into it.

XLA makes three to six launches of it for one token, each of which takes longer to start than to run.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from ds4jax.pallas import lowering as lo

Array = jax.Array

GROUP = 64  # channels that share a scale of the FP8 cache
PAIRS = GROUP // 2
MANY = 64  # rows from which a program takes several heads: one would be too short to be worth its start


def finish(
    raw: Array, cos: Array | None, sin: Array | None, weight: Array | None, store: Array | None, rows: Array | None, *,
    eps: float | None, inverse: bool, rounding: str | None, dtype: Any,
) -> tuple[Array, Array | None]:  # fmt: skip
    """As `model.heads.finish`: raw [N, H, d], cos and sin [N, r/2] → [N, H, d] of `dtype`, and `store` [M, d] with head
    0 of row n written to its row `rows[n]` (-1: nowhere). NotImplementedError where no kernel serves the call."""
    lo.require_device()
    N, H, d = raw.shape
    turned = 0 if cos is None else 2 * cos.shape[-1]
    if not N:
        raise NotImplementedError("no rows")
    if d < GROUP or d & (d - 1):
        raise NotImplementedError(f"{d} channels are no power of two of at least {GROUP}")
    if rounding == "fp8" and (d - turned) % GROUP:
        raise NotImplementedError(f"{d - turned} channels are no whole groups of {GROUP}")
    kept = (d - turned) // 2  # pairs of channels that do not turn

    def kernel(raw_ref, *refs):
        refs = list(refs)
        cos_ref, sin_ref = (refs.pop(0), refs.pop(0)) if turned else (None, None)
        weight_ref = None if weight is None else refs.pop(0)
        rows_ref = None if store is None else (refs.pop(0), refs.pop(0))[0]
        out_ref, store_ref = refs[0], refs[-1]
        n, h = pl.program_id(0), pl.program_id(1)
        group = jnp.arange(d // GROUP, dtype=jnp.int32)[:, None]
        pair = group * PAIRS + jnp.arange(PAIRS, dtype=jnp.int32)[None]
        # all loads before the first sum, across which a compiler moves none
        ends = [lo.load(raw_ref, (n, h, 2 * pair + i)).astype(jnp.float32) for i in range(2)]
        weights = [] if weight is None else [lo.load(weight_ref, (2 * pair + i,)).astype(jnp.float32) for i in range(2)]
        at = jnp.maximum(pair - kept, 0)
        c, s = [lo.load(ref, (n, at)) for ref in (cos_ref, sin_ref)] if turned else (None, None)
        if eps is not None:
            square = jnp.sum(ends[0] * ends[0]) + jnp.sum(ends[1] * ends[1])
            scale = lax.rsqrt(square / d + eps)
            ends = [e * scale for e in ends]
            if weights:
                ends = [e * w for e, w in zip(ends, weights, strict=True)]
            ends = [_as(e, raw.dtype) for e in ends]
        if turned:
            if inverse:
                s = -s
            pairs = (ends[0] * c - ends[1] * s, ends[0] * s + ends[1] * c)
            ends = [jnp.where(pair >= kept, _as(t, raw.dtype), e) for t, e in zip(pairs, ends, strict=True)]
        if rounding == "fp4":
            results = _fp4(ends)
        else:
            if rounding == "fp8":
                ends = _fp8([_as(e, dtype) for e in ends], group < (d - turned) // GROUP)
            results = [(2 * pair + i, e) for i, e in enumerate(ends)]
        for place, value in results:
            value = _as(value, dtype)
            lo.store(out_ref, (n, h, place), value)
            if store is not None:
                row = rows_ref[n]
                lo.store(store_ref, (jnp.maximum(row, 0), place), value, mask=(row >= 0) & (place >= 0))

    def whole(raw_ref, *refs):
        """As `kernel` where nothing is rounded or kept: neighbours load neighbours, in pairs only where they turn."""
        refs = list(refs)
        cos_ref, sin_ref = (refs.pop(0), refs.pop(0)) if turned else (None, None)
        weight_ref = None if weight is None else refs.pop(0)
        n, h = pl.program_id(0), pl.program_id(1) * heads + jnp.arange(heads, dtype=jnp.int32)[:, None]
        channel = jnp.arange(d, dtype=jnp.int32)[None]
        turns, other = channel >= 2 * kept, channel ^ 1
        load_weight = lambda at: None if weight is None else lo.load(weight_ref, (at,)).astype(jnp.float32)  # noqa: E731
        own_weight = load_weight(channel)
        if turned:
            at = jnp.maximum(channel // 2 - kept, 0)
            c, s = (lo.load(ref, (n, at), mask=turns) for ref in (cos_ref, sin_ref))
            neighbour, its_weight = lo.load(raw_ref, (n, h, other), mask=turns), load_weight(other)
        lo.loads_first()  # the last is what the sum waits for
        own = lo.load(raw_ref, (n, h, channel)).astype(jnp.float32)
        scale = None if eps is None else lax.rsqrt(jnp.sum(own * own, axis=1, keepdims=True) / d + eps)

        def normed(x, weight):
            if scale is None:
                return x
            x = x * scale
            return _as(x if weight is None else x * weight, raw.dtype)

        out = normed(own, own_weight)
        if turned:
            s = jnp.where((channel % 2 == 0) ^ inverse, -s, s)
            neighbour = normed(neighbour.astype(jnp.float32), its_weight)
            out = jnp.where(turns, _as(out * c + neighbour * s, raw.dtype), out)
        lo.store(refs[0], (n, h, channel), out)

    arguments = [raw, *([cos, sin] if turned else []), *([] if weight is None else [weight])]
    out: list[jax.ShapeDtypeStruct] = [jax.ShapeDtypeStruct((N, H, d), dtype)]
    aliases = {}
    if store is not None:
        arguments += [rows, store]
        out.append(jax.ShapeDtypeStruct(store.shape, store.dtype))
        aliases = {len(arguments) - 1: 1}
    plain = rounding is None and store is None
    heads = next(n for n in (4, 2, 1) if not H % n) if plain and N >= MANY else 1  # of a program
    warps = 4 if d >= 512 else 1
    results = lo.call(
        whole if plain else kernel, out, *arguments, grid=(N, H // heads), tuning=lo.Tuning(warps=warps, stages=1),
        name=f"finish_{rounding or 'heads'}", aliases=aliases,
    )  # fmt: skip
    return results[0], results[1] if store is not None else None


def _as(x: Array, dtype: Any) -> Array:
    """x rounded to `dtype`, as float32."""
    return x.astype(dtype).astype(jnp.float32)


def _power_of_two(exponent: Array) -> Array:
    return lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def _scale_exponent(peak: Array, top: float) -> Array:
    """ceil(log2(peak / top)) of normal positive numbers, exactly, by their bits: a kernel's division is not exact."""
    bits = lax.bitcast_convert_type(peak, jnp.int32)
    top_bits = int(np.float32(top).view(np.int32))
    above = (bits & 0x7FFFFF) > (top_bits & 0x7FFFFF)
    return (bits >> 23) - (top_bits >> 23) + above.astype(jnp.int32)


def _fp8(ends: list[Array], rounded: Array) -> list[Array]:
    """Even and odd channels [groups, PAIRS] as `model.layers.simulate_fp8` rounds them, where `rounded`."""
    peak = jnp.max(jnp.maximum(jnp.abs(ends[0]), jnp.abs(ends[1])), axis=1)
    exponent = _scale_exponent(jnp.maximum(peak, 1e-4), 448.0)[:, None]
    out = []
    for e in ends:
        x = e * _power_of_two(-exponent)
        step = jnp.maximum((lax.bitcast_convert_type(x, jnp.int32) >> 23 & 0xFF) - 127, -6) - 3
        x = jnp.clip(lo.round_even(x * _power_of_two(-step)) * _power_of_two(step), -448.0, 448.0)
        # a NaN stays one: a kernel's minimum may drop it
        out.append(jnp.where(rounded & (e == e), x * _power_of_two(exponent), e))
    return out


def _fp4(ends: list[Array]) -> list[tuple[Array, Array]]:
    """Even and odd channels [groups, PAIRS] → places and values of the two, as `model.layers.simulate_fp4` has them."""
    d = 2 * ends[0].size
    n = (
        1 << (d // 2).bit_length() // 2
    )  # a transform of d / 2 = m · n is one of m along one axis and of n along the other
    m = d // 2 // n
    sums = ((e + sign * o).reshape(m, n) for e, o, sign in ((*ends, 1.0), (*ends, -1.0)))
    turned = [_hadamard(s) * np.float32(d**-0.5) for s in sums]
    groups = (d // 32, 16)
    turned = [t.reshape(groups) for t in turned]
    peak = jnp.max(jnp.maximum(jnp.abs(turned[0]), jnp.abs(turned[1])), axis=1)
    exponent = _scale_exponent(jnp.maximum(peak, np.float32(6 * 2.0**-126)), 6.0)[:, None]
    pair = jnp.arange(d // 32, dtype=jnp.int32)[:, None] * 16 + jnp.arange(16, dtype=jnp.int32)[None]
    out = []
    for i, t in enumerate(turned):
        x = t * _power_of_two(-exponent)
        a = jnp.abs(x)
        fine, coarse = lo.round_even(2 * a) * 0.5, lo.round_even(0.5 * a) * 2
        a = jnp.minimum(jnp.where(a < 2, fine, jnp.where(a < 4, lo.round_even(a), coarse)), 6.0)
        out.append((2 * pair + i, jnp.where(x == x, jnp.where(x < 0, -a, a) * _power_of_two(exponent), x)))
    return out


def _hadamard(x: Array) -> Array:
    """The transform of all of x [m, n], taken as one row, without its scale."""
    m, n = x.shape
    x = jnp.sum(_signs(m)[:, :, None] * x[None], axis=1)
    return jnp.sum(x[:, :, None] * _signs(n)[None], axis=1)


def _signs(n: int) -> Array:
    """The Hadamard matrix: -1 where row and column have an odd number of bits in common."""
    odd = jnp.arange(n, dtype=jnp.int32)[:, None] & jnp.arange(n, dtype=jnp.int32)[None]
    for shift in (16, 8, 4, 2, 1):
        if shift < n:
            odd = odd ^ (odd >> shift)
    return 1.0 - 2.0 * (odd & 1).astype(jnp.float32)
