"""Entering a sublayer in two launches: the streams' weights, their collapse and the norm.

The first kernel spreads the [(2+S)·S, S·D] product over the device: a program has one of its outputs and one stream,
so that what is left to add up are S numbers. In the second one program a row makes the sublayer's input while another
makes `post` and the Sinkhorn iterations of `comb`, whose sixteen numbers stay in registers; of many rows a third launch
makes these, a thread a row, and of a few, too: they are needed last, and take longest.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ds4jax.pallas import lowering as lo

Array = jax.Array

MAX_ROWS = 256  # rows of streams of the first kernel; for more, it is a matter for tensor cores
BLOCK = 8  # rows that a program of the first kernel takes, where there are many
SLICE = 512  # channels that it then has in registers at once
CHANNELS = 64  # at least
PLACED = 32  # rows whose second half a program makes, where there are many: one a thread
STREAMS = 4
COUNT = (2 + STREAMS) * STREAMS  # products of a row; the sum of its squares comes after them


def require(streams: Array, fn: Array) -> None:
    """NotImplementedError where no kernel serves streams [B, T, S, D]."""
    lo.require_device()
    *_, S, D = streams.shape
    if S != STREAMS:
        raise NotImplementedError(f"{S} streams; these kernels are for {STREAMS}")
    if D < CHANNELS or D & (D - 1):
        raise NotImplementedError(f"{D} channels are no power of two of at least {CHANNELS}")
    if not isinstance(fn, jax.Array):
        raise NotImplementedError("the weights of the streams' weights are packed")


def enter(
    streams: Array, fn: Array, base: Array, scale: Array, weight: Array,
    before: tuple[Array, Array, Array, Array] | None = None, *, iterations: int, hc_eps: float, rms_eps: float,
) -> tuple[Array, Array, Array, Array]:  # fmt: skip
    """As `model.hyper_connections.enter`, of 1 to MAX_ROWS rows: streams [B, T, S, D] → x [B, T, D], pre, post
    [B, T, S], comb [B, T, S, S]."""
    B, T, S, D = streams.shape
    R = B * T
    few = R <= BLOCK
    kernel, rows = (_mix if few else _mix_block), [streams.reshape(R, S, D)]
    if few and before is not None:
        kernel, rows = _mix_folded, [a.reshape(R, *a.shape[2:]) for a in before]
    mix, soon = kernel, [weight, base, scale] if few else []

    def kernel(*refs):
        if soon:  # the next launch reads these, once a token, and has nothing else to wait for
            first = (pl.program_id(0) == COUNT) & (pl.program_id(1) == 0) & (pl.program_id(2) == 0)
            pl.when(first)(lambda: lo.prefetch(refs[: len(soon)]))
        mix(*refs[len(soon) :])

    parts = lo.call(
        kernel, jax.ShapeDtypeStruct((R, S, COUNT + 1), jnp.float32), *soon, *rows, fn.reshape(-1, S, D),
        grid=(COUNT + 1, S, R if few else -(-R // BLOCK)), tuning=_short(D) if few else lo.Tuning(warps=4, stages=1),
        name="hyper_mix",
    )  # fmt: skip
    return finish(parts, None, streams, base, scale, weight, iterations=iterations, hc_eps=hc_eps, rms_eps=rms_eps)


def _short(D: int) -> lo.Tuning:
    """So many threads that each has 8 channels: a kernel that runs for a microsecond also waits for its own code."""
    return lo.Tuning(warps=lo.warps_for(D), stages=1)


def finish(
    parts: Array, squares: Array | None, streams: Array, base: Array, scale: Array, weight: Array, *, iterations: int,
    hc_eps: float, rms_eps: float,
) -> tuple[Array, Array, Array, Array]:  # fmt: skip
    """The second half of `enter`. parts and squares: float32 [B · T, 1, 24] and [B · T], a row's products and the sum
    of its squares; or [B · T, 4, 25], which add up to all of them, and None."""
    B, T, S, D = streams.shape
    R = B * T
    rules = S, D, iterations, hc_eps, rms_eps
    rows, tuning = streams.reshape(R, S, D), lo.Tuning(warps=4, stages=1)
    base, scale = base.astype(jnp.float32), scale.astype(jnp.float32)
    first = [jax.ShapeDtypeStruct((R, D), streams.dtype), jax.ShapeDtypeStruct((R, S), jnp.float32)]
    second = [jax.ShapeDtypeStruct((R, n), jnp.float32) for n in (S, S * S)]
    if squares is None and R <= BLOCK:
        # two launches side by side: what folds the result back is not waited for by what comes next
        x, pre = lo.call(
            _collapse(S, D, hc_eps, rms_eps), first, parts, rows, base, scale, weight, grid=(R,), tuning=_short(D),
            name="hyper_enter",
        )  # fmt: skip
        post, comb = lo.call(
            _place(*rules), second, parts, base, scale, grid=(R,), tuning=lo.Tuning(warps=1, stages=1),
            name="hyper_place",
        )  # fmt: skip
    elif squares is None:
        x, pre, post, comb = lo.call(
            _finish(*rules), first + second, parts, rows, base, scale, weight, grid=(R, 2), tuning=tuning,
            name="hyper_enter",
        )  # fmt: skip
    else:  # a thread a row where there are enough: the iterations are a long chain for whoever makes them
        x, pre = lo.call(
            _collapse(S, D, hc_eps, rms_eps), first, parts, squares, rows, base, scale, weight, grid=(R,),
            tuning=tuning, name="hyper_enter",
        )  # fmt: skip
        post, comb = lo.call(
            _place_block(*rules), second, parts, squares, base, scale, grid=(-(-R // PLACED),),
            tuning=lo.Tuning(warps=1, stages=1), name="hyper_place",
        )  # fmt: skip
    return x.reshape(B, T, D), pre.reshape(B, T, S), post.reshape(B, T, S), comb.reshape(B, T, S, S)


def _mix(x_ref, fn_ref, out_ref):
    """One product, or the sum of squares, over one stream."""
    n, s, r = (pl.program_id(i) for i in range(3))
    d = jnp.arange(x_ref.shape[-1], dtype=jnp.int32)
    w = _coefficients(fn_ref, n, s, d)
    _store_product(lo.load(x_ref, (r, s, d)).astype(jnp.float32), w, n, s, out_ref, r)


def _mix_folded(x_ref, y_ref, post_ref, comb_ref, fn_ref, out_ref):
    """As `_mix` of what `model.hyper_connections.fold` makes of these, which is still being stored elsewhere."""
    n, s, r = (pl.program_id(i) for i in range(3))
    d = jnp.arange(x_ref.shape[-1], dtype=jnp.int32)
    w = _coefficients(fn_ref, n, s, d)
    streams, y = [lo.load(x_ref, (r, i, d)) for i in range(STREAMS)], lo.load(y_ref, (r, d))
    lo.loads_first()
    post, comb = post_ref[r, s], [comb_ref[r, i, s] for i in range(STREAMS)]
    terms = [c * stream.astype(jnp.float32) for c, stream in zip(comb, streams, strict=True)]
    x = post * y.astype(jnp.float32) + functools.reduce(jnp.add, terms)
    _store_product(x.astype(x_ref.dtype).astype(jnp.float32), w, n, s, out_ref, r)


def _coefficients(fn_ref: Any, n: Any, s: Any, d: Array) -> Array:
    return lo.load(fn_ref, (jnp.minimum(n, COUNT - 1), s, d))


def _store_product(x: Array, w: Array, n: Any, s: Any, out_ref: Any, r: Any) -> None:
    out_ref[r, s, n] = jnp.sum(x * jnp.where(n < COUNT, w.astype(jnp.float32), x))


def _mix_block(x_ref, fn_ref, out_ref):
    """As `_mix`, of a block of rows."""
    n, s = pl.program_id(0), pl.program_id(1)
    R, _, D = x_ref.shape
    row = pl.program_id(2) * BLOCK + jnp.arange(BLOCK, dtype=jnp.int32)
    here, width = jnp.minimum(row, R - 1)[:, None], min(D, SLICE)

    def add(i, total):
        d = i * width + jnp.arange(width, dtype=jnp.int32)
        x = lo.load(x_ref, (here, s, d[None])).astype(jnp.float32)
        w = lo.load(fn_ref, (jnp.minimum(n, COUNT - 1), s, d)).astype(jnp.float32)
        return total + x * jnp.where(n < COUNT, w[None], x)

    total = lo.loop(D // width, add, jnp.zeros((BLOCK, width), jnp.float32))
    lo.store(out_ref, (row, s, n), jnp.sum(total, axis=1), mask=row < R)


def _logits(addends: Callable[[int], list[Array]], S: int, D: int, scale_ref: Any, base_ref: Any, eps: float):
    """The function that makes logits of which addends(n) add up to product n, at COUNT to the sum of squares: of their
    numbers, {number: logit}."""

    def logits(which: range) -> dict[int, Array]:
        scale, base = {n: scale_ref[min(n // S, 2)] for n in which}, {n: base_ref[n] for n in which}
        lo.loads_first()  # what all arithmetic waits for comes last, or some of it is done before others are loaded
        total = {n: functools.reduce(jnp.add, addends(n)) for n in (*which, COUNT)}
        inverse = lax.rsqrt(total[COUNT] / (S * D) + eps)
        return {n: total[n] * inverse * scale[n] + base[n] for n in which}

    return logits


def _in_parts(parts_ref: Any, r: Any) -> Callable[[int], list[Array]]:
    """The addends of product n of row r, or at COUNT of the sum of its squares, given in four parts."""
    return lambda n: [parts_ref[r, s, n] for s in range(STREAMS)]


def _finish(S: int, D: int, iterations: int, hc_eps: float, rms_eps: float):
    """Both halves of a row, its products and the sum of its squares given in four parts."""

    def kernel(parts_ref, x_ref, base_ref, scale_ref, weight_ref, out_ref, pre_ref, post_ref, comb_ref):
        r, part = pl.program_id(0), pl.program_id(1)
        logits = _logits(_in_parts(parts_ref, r), S, D, scale_ref, base_ref, rms_eps)

        @pl.when(part == 0)
        def _():
            _collapsed(r, logits, S, D, hc_eps, rms_eps, x_ref, weight_ref, out_ref, pre_ref)

        @pl.when(part == 1)
        def _():
            _store_placed(r, logits, S, iterations, hc_eps, post_ref, comb_ref)

    return kernel


def _collapse(S: int, D: int, hc_eps: float, rms_eps: float):
    """A row's first half, given its products whole, and squares, or in four parts."""

    def kernel(parts_ref, *refs):
        *squares_ref, x_ref, base_ref, scale_ref, weight_ref, out_ref, pre_ref = refs
        r = pl.program_id(0)
        addends = _in_parts(parts_ref, r)
        if squares_ref:
            addends = lambda n: [parts_ref[r, 0, n] if n < COUNT else squares_ref[0][r]]  # noqa: E731
        logits = _logits(addends, S, D, scale_ref, base_ref, rms_eps)
        _collapsed(r, logits, S, D, hc_eps, rms_eps, x_ref, weight_ref, out_ref, pre_ref)

    return kernel


def _place(S: int, D: int, iterations: int, hc_eps: float, rms_eps: float):
    """A row's second half, given its products in four parts."""

    def kernel(parts_ref, base_ref, scale_ref, post_ref, comb_ref):
        r = pl.program_id(0)
        logits = _logits(_in_parts(parts_ref, r), S, D, scale_ref, base_ref, rms_eps)
        _store_placed(r, logits, S, iterations, hc_eps, post_ref, comb_ref)

    return kernel


def _place_block(S: int, D: int, iterations: int, hc_eps: float, rms_eps: float):
    """The second half of PLACED rows, given their products whole: a thread has a row's sixteen numbers."""

    def kernel(parts_ref, squares_ref, base_ref, scale_ref, post_ref, comb_ref):
        row = pl.program_id(0) * PLACED + jnp.arange(PLACED, dtype=jnp.int32)
        R = squares_ref.shape[0]
        here, mask = jnp.minimum(row, R - 1), row < R
        squares = lo.load(squares_ref, (here,))
        addends = lambda n: [lo.load(parts_ref, (here, 0, n)) if n < COUNT else squares]  # noqa: E731
        post, comb = _placed(_logits(addends, S, D, scale_ref, base_ref, rms_eps), S, iterations, hc_eps)
        for s, value in enumerate(post):
            lo.store(post_ref, (row, s), value, mask=mask)
        for n, value in enumerate(comb):
            lo.store(comb_ref, (row, n), value, mask=mask)

    return kernel


def _collapsed(r, logits, S: int, D: int, hc_eps: float, rms_eps: float, x_ref, weight_ref, out_ref, pre_ref) -> None:
    """Store `pre` and the normed sum of row r's streams."""
    d = jnp.arange(D, dtype=jnp.int32)
    # All loads before the first store and the first sum: a compiler moves none across either, and a few rows wait for
    # the memory rather than for anything else.
    streams = [lo.load(x_ref, (r, s, d)) for s in range(S)]
    weight = lo.load(weight_ref, (d,))
    pre = [_sigmoid(x) + hc_eps for x in logits(range(S)).values()]
    x = functools.reduce(jnp.add, [p * stream.astype(jnp.float32) for p, stream in zip(pre, streams, strict=True)])
    x = x.astype(out_ref.dtype).astype(jnp.float32)  # the sublayer's input is rounded before its norm
    norm = lax.rsqrt(jnp.sum(x * x) / D + rms_eps)
    lo.store(out_ref, (r, d), x * norm * weight.astype(jnp.float32))
    for s, value in enumerate(pre):
        pre_ref[r, s] = value


def _store_placed(r, logits, S: int, iterations: int, hc_eps: float, post_ref, comb_ref) -> None:
    post, comb = _placed(logits, S, iterations, hc_eps)
    for s, value in enumerate(post):
        post_ref[r, s] = value
    for n, value in enumerate(comb):
        comb_ref[r, n] = value


def _placed(logits, S: int, iterations: int, hc_eps: float) -> tuple[list[Array], tuple[Array, ...]]:
    """`post` and the entries of `comb`, row by row."""
    logit = logits(range(S, COUNT))
    post = [2 * _sigmoid(logit[S + s]) for s in range(S)]
    return post, _sinkhorn(tuple(logit[n] for n in range(2 * S, COUNT)), S, iterations, hc_eps)


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + jnp.exp(-x))


def _sinkhorn(c: tuple[Array, ...], S: int, iterations: int, eps: float) -> tuple[Array, ...]:
    """As `model.hyper_connections.sinkhorn`, on S·S scalars in rows."""

    def inverse(a, b, c, d):  # every step waits for this one: sums in pairs, and no division, which is ten instructions
        root = lax.rsqrt((a + b) + (c + d) + eps)
        return root * root

    def rows(c):
        scale = [inverse(*c[i * S : (i + 1) * S]) for i in range(S)]
        return tuple(c[i * S + j] * scale[i] for i in range(S) for j in range(S))

    def columns(c):
        scale = [inverse(*c[j::S]) for j in range(S)]
        return tuple(c[i * S + j] * scale[j] for i in range(S) for j in range(S))

    out = []
    for i in range(S):
        row = c[i * S : (i + 1) * S]
        peak = jnp.maximum(jnp.maximum(row[0], row[1]), jnp.maximum(row[2], row[3]))
        e = [jnp.exp(v - peak) for v in row]
        share = 1 / sum(e)
        out += [v * share + eps for v in e]
    c = columns(tuple(out))
    return lax.fori_loop(0, iterations - 1, lambda _, c: columns(rows(c)), c)
