"""Entering a sublayer in two launches: the streams' weights, their collapse and the norm.

The first kernel spreads the [(2+S)·S, S·D] product over the device, each program a slice of D for all streams. In the
second one program a row makes the sublayer's input while another makes `post` and the Sinkhorn iterations of `comb`,
whose sixteen numbers stay in registers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ds4jax.pallas import lowering as lo

Array = jax.Array

MAX_ROWS = 16  # rows of streams; for more, the product is a matter for tensor cores
SLICE = 64  # channels of each stream that a program of the first kernel takes
STREAMS = 4
WIDTH = 32  # entries of a partial result: 24 products, one sum of squares, the rest unused


def enter(
    streams: Array, fn: Array, base: Array, scale: Array, weight: Array, *, iterations: int, hc_eps: float,
    rms_eps: float,
) -> tuple[Array, Array, Array, Array]:  # fmt: skip
    """As `model.hyper_connections.enter`: streams [B, T, S, D] → x [B, T, D], pre, post [B, T, S], comb [B, T, S, S].

    NotImplementedError where no kernel serves the call.
    """
    lo.require_device()
    B, T, S, D = streams.shape
    R = B * T
    if S != STREAMS or R > MAX_ROWS:
        raise NotImplementedError(f"{R} rows of {S} streams; this kernel takes 1 to {MAX_ROWS} rows of {STREAMS}")
    if D % SLICE or D & (D - 1):
        raise NotImplementedError(f"{D} channels are no power of two of at least {SLICE}")
    if not isinstance(fn, jax.Array):
        raise NotImplementedError("the weights of the streams' weights are packed")
    flat = streams.reshape(R, S, D)
    slices = D // SLICE
    partial = lo.call(
        _mix, jax.ShapeDtypeStruct((R, slices, WIDTH), jnp.float32), flat, fn.reshape(-1, S, D),
        grid=(R, slices), tuning=lo.Tuning(warps=4, stages=1), name="hyper_mix",
    )  # fmt: skip
    kernel = _finish(slices, S, D, iterations, hc_eps, rms_eps)
    out = [
        jax.ShapeDtypeStruct((R, D), streams.dtype),
        *(jax.ShapeDtypeStruct((R, n), jnp.float32) for n in (S, S, S * S)),
    ]
    x, pre, post, comb = lo.call(
        kernel, out, partial, flat, base.astype(jnp.float32), scale.astype(jnp.float32), weight,
        grid=(R, 2), tuning=lo.Tuning(warps=8, stages=1), name="hyper_enter",
    )  # fmt: skip
    return x.reshape(B, T, D), pre.reshape(B, T, S), post.reshape(B, T, S), comb.reshape(B, T, S, S)


def _mix(x_ref, fn_ref, out_ref):
    """Products and the sum of squares over one slice of channels."""
    r, c = pl.program_id(0), pl.program_id(1)
    count = (2 + STREAMS) * STREAMS
    at = c * SLICE + jnp.arange(SLICE, dtype=jnp.int32)
    row = jnp.arange(WIDTH, dtype=jnp.int32)
    live = (row < count)[:, None] & (at >= 0)[None]
    total = jnp.zeros((WIDTH, SLICE), jnp.float32)
    squares = jnp.zeros((SLICE,), jnp.float32)
    for s in range(STREAMS):
        x = lo.load(x_ref, (r, s, at)).astype(jnp.float32)
        w = lo.load(fn_ref, (jnp.minimum(row, count - 1)[:, None], s, at[None]), mask=live).astype(jnp.float32)
        total = total + w * x[None]
        squares = squares + x * x
    total = jnp.where((row == count)[:, None], squares[None], total)
    lo.store(out_ref, (r, c, row), jnp.sum(total, axis=1))


def _finish(slices: int, S: int, D: int, iterations: int, hc_eps: float, rms_eps: float):
    def kernel(partial_ref, x_ref, base_ref, scale_ref, weight_ref, out_ref, pre_ref, post_ref, comb_ref):
        r, part = pl.program_id(0), pl.program_id(1)
        c = jnp.arange(slices, dtype=jnp.int32)

        def total(n: int) -> Array:
            return jnp.sum(lo.load(partial_ref, (r, c, n)))

        inverse = lax.rsqrt(total((2 + S) * S) / (S * D) + rms_eps)

        def logit(n: int) -> Array:
            return total(n) * inverse * scale_ref[min(n // S, 2)] + base_ref[n]

        @pl.when(part == 0)
        def _():
            d = jnp.arange(D, dtype=jnp.int32)
            x = jnp.zeros((D,), jnp.float32)
            for s in range(S):
                pre = _sigmoid(logit(s)) + hc_eps
                pre_ref[r, s] = pre
                x = x + pre * lo.load(x_ref, (r, s, d)).astype(jnp.float32)
            x = x.astype(out_ref.dtype).astype(jnp.float32)  # the sublayer's input is rounded before its norm
            norm = lax.rsqrt(jnp.sum(x * x) / D + rms_eps)
            lo.store(out_ref, (r, d), x * norm * lo.load(weight_ref, (d,)).astype(jnp.float32))

        @pl.when(part == 1)
        def _():
            for s in range(S):
                post_ref[r, s] = 2 * _sigmoid(logit(S + s))
            comb = tuple(logit((2 + i) * S + j) for i in range(S) for j in range(S))
            for n, value in enumerate(_sinkhorn(comb, S, iterations, hc_eps)):
                comb_ref[r, n] = value

    return kernel


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + jnp.exp(-x))


def _sinkhorn(c: tuple[Array, ...], S: int, iterations: int, eps: float) -> tuple[Array, ...]:
    """As `model.hyper_connections.sinkhorn`, on S·S scalars in rows."""

    def rows(c):
        inverse = [1 / (sum(c[i * S + j] for j in range(S)) + eps) for i in range(S)]
        return tuple(c[i * S + j] * inverse[i] for i in range(S) for j in range(S))

    def columns(c):
        inverse = [1 / (sum(c[i * S + j] for i in range(S)) + eps) for j in range(S)]
        return tuple(c[i * S + j] * inverse[j] for i in range(S) for j in range(S))

    out = []
    for i in range(S):
        row = c[i * S : (i + 1) * S]
        peak = jnp.maximum(jnp.maximum(row[0], row[1]), jnp.maximum(row[2], row[3]))
        e = [jnp.exp(v - peak) for v in row]
        inverse = 1 / sum(e)
        out += [v * inverse + eps for v in e]
    c = columns(tuple(out))
    return lax.fori_loop(0, iterations - 1, lambda _, c: columns(rows(c)), c)
