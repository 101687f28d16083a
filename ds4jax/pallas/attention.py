"""Attention over a token's window and its compressed entries, which are read from where they are stored.

One token a slot takes two launches: the first spreads blocks of keys over the device, the second joins the parts and
the sink. (Flash decoding: T. Dao et al., 2023.) Many tokens a slot take one: all heads of a token, which share their
keys, are the rows of a product, so that every token may read entries of its own.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ds4jax.pallas import lowering as lo

Array = jax.Array

KEYS = 32  # keys multiplied at once
HEADS = 16  # heads of a program when few slots decode: the rows of a tensor-core tile
MANY_SLOTS = 8  # from here on a program takes up to 64 heads, so that keys are read once
PROGRAMS = 264  # about how many programs fill a device
AHEAD = 32  # parts loaded at once when they are joined, at most
CHANNELS = 128  # of a program that joins
NEG = -1e30


def require(q: Array) -> None:
    """NotImplementedError where no kernel serves queries [B, H, d]."""
    lo.require_device()
    d = q.shape[-1]
    if d < 16 or d & (d - 1):
        raise NotImplementedError(f"heads of {d} channels are no power of two of at least 16")


def decode(
    q: Array, window: Array, in_window: Array, stored: Array | None, rows: Array | None, sink: Array, cos: Array,
    sin: Array,
) -> Array:  # fmt: skip
    """q [B, H, d], window [B, W, d] and which of it count [B, W], entries [M, d] and the rows of them that each slot
    reads [B, K] (-1: none) or neither, sink [H] → [B, H, d], its last channels turned back by cos, sin [B, r/2].
    NotImplementedError where no kernel serves the call."""
    require(q)
    B, H, d = q.shape
    W = window.shape[1]
    many = B >= MANY_SLOTS
    heads = HEADS if not many else max(HEADS, min(64, lo.power_of_two(H)))
    groups = -(-H // heads)
    near, far = -(-W // KEYS), 0 if rows is None else -(-rows.shape[1] // KEYS)
    share = max(1, PROGRAMS // (B * groups))  # splits of all blocks of a slot
    near_splits = max(1, min(near, share * near // (near + far)))
    far_splits = min(far, max(1, share - near_splits)) if far else 0
    near_each = -(-near // near_splits)
    far_each = -(-far // far_splits) if far else 0
    splits = near_splits + far_splits
    if rows is None:
        stored, rows = window[0], jnp.zeros((B, 1), jnp.int32)
    K = rows.shape[1]

    def part(q_ref, window_ref, live_ref, stored_ref, rows_ref, peak_ref, sum_ref, out_ref):
        b, split = pl.program_id(0), pl.program_id(2)
        head = pl.program_id(1) * heads + jnp.arange(heads, dtype=jnp.int32)
        c = jnp.arange(d, dtype=jnp.int32)[None]
        mine = head < H
        queries = lo.load(q_ref, (b, jnp.minimum(head, H - 1)[:, None], c))

        def over(each: int, first: Any, keys_of) -> None:
            """The unnormalised softmax over `each` blocks of keys."""

            def block(i, carry):
                peak, total, acc = carry
                keys, live = keys_of((first + i) * KEYS + jnp.arange(KEYS, dtype=jnp.int32))
                s = jnp.where(live[None], lo.matrix_product(queries, keys) * d**-0.5, NEG)
                top = jnp.maximum(peak, jnp.max(s, axis=1))
                p = jnp.where(live[None], jnp.exp(s - top[:, None]), 0)
                fade = jnp.exp(peak - top)
                acc = acc * fade[:, None] + _product(p.astype(q.dtype), keys)
                return top, total * fade + jnp.sum(p, axis=1), acc

            zero = jnp.zeros((heads,), jnp.float32)
            start = (zero + NEG, zero, jnp.zeros((heads, d), jnp.float32))
            peak, total, acc = lo.loop(each, block, start)
            lo.store(peak_ref, (b, split, head), peak, mask=mine)
            lo.store(sum_ref, (b, split, head), total, mask=mine)
            lo.store(out_ref, (b, split, head[:, None], c), acc, mask=mine[:, None] & (c >= 0))

        def from_window(j):
            row = jnp.minimum(j, W - 1)
            live = (j < W) & (lo.load(live_ref, (b, row)) != 0)
            return lo.load(window_ref, (b, row[:, None], c)).astype(q.dtype), live

        def from_stored(j):
            row = lo.load(rows_ref, (b, jnp.minimum(j, K - 1)))
            return lo.load(stored_ref, (jnp.maximum(row, 0)[:, None], c)).astype(q.dtype), (j < K) & (row >= 0)

        @pl.when(split < near_splits)
        def _():
            over(near_each, split * near_each, from_window)

        if far:

            @pl.when(split >= near_splits)
            def _():
                over(far_each, (split - near_splits) * far_each, from_stored)

    shapes = [(B, splits, H), (B, splits, H), (B, splits, H, d)]
    parts = lo.call(
        part, [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes], q, window, in_window.astype(jnp.int32), stored,
        rows, grid=(B, groups, splits), tuning=lo.Tuning(warps=8 if heads > HEADS else 4, stages=1),
        name="decode_attention",
    )  # fmt: skip
    width = lo.power_of_two(splits)
    ahead = min(AHEAD, splits)

    kept = d // 2 - cos.shape[-1]  # pairs of channels that do not turn
    pairs = min(d, CHANNELS) // 2

    def join(peak_ref, sum_ref, part_ref, sink_ref, cos_ref, sin_ref, out_ref):
        b, h = pl.program_id(0), pl.program_id(1)
        n = jnp.arange(width, dtype=jnp.int32)
        split, exists = jnp.minimum(n, splits - 1), n < splits
        peaks = jnp.where(exists, lo.load(peak_ref, (b, split, h)), NEG)
        sink = sink_ref[h].astype(jnp.float32)
        top = jnp.maximum(jnp.max(peaks), sink)
        sums = jnp.where(exists, lo.load(sum_ref, (b, split, h)), 0)
        whole = jnp.sum(jnp.exp(peaks - top) * sums) + jnp.exp(sink - top)
        pair = pl.program_id(2) * pairs + jnp.arange(pairs, dtype=jnp.int32)

        def add(turn, ends):
            for i in [turn * ahead + n for n in range(ahead)]:
                live = i < splits
                i = jnp.minimum(i, splits - 1)
                weight = jnp.where(live, jnp.exp(peak_ref[b, i, h] - top), 0)
                ends = tuple(e + weight * lo.load(part_ref, (b, i, h, 2 * pair + j)) for j, e in enumerate(ends))
            return ends

        zero = jnp.zeros((pairs,), jnp.float32)
        ends = lo.loop(-(-splits // ahead), add, (zero, zero))
        even, odd = ((e / whole).astype(out_ref.dtype).astype(jnp.float32) for e in ends)
        at = jnp.maximum(pair - kept, 0)
        c, s = lo.load(cos_ref, (b, at)), lo.load(sin_ref, (b, at))
        turned = (even * c + odd * s, odd * c - even * s)
        for j, (t, e) in enumerate(zip(turned, (even, odd), strict=True)):
            lo.store(out_ref, (b, h, 2 * pair + j), jnp.where(pair >= kept, t, e))

    return lo.call(
        join, jax.ShapeDtypeStruct((B, H, d), q.dtype), *parts, sink, cos, sin, grid=(B, H, d // (2 * pairs)),
        tuning=lo.Tuning(warps=1, stages=1), name="decode_attention_join",
    )  # fmt: skip


def require_many(q: Array) -> None:
    """NotImplementedError where no kernel serves many queries a slot [B, T, H, d]."""
    require(q)
    if q.dtype != jnp.bfloat16:
        raise NotImplementedError(f"attention of many tokens takes bfloat16, not {q.dtype}")
    if q.shape[-1] > 512:
        raise NotImplementedError(f"heads of {q.shape[-1]} channels; attention of many tokens takes up to 512")


def _many_tuning() -> lo.Tuning:
    """rows: keys multiplied at once. Of those and the queries a Hopper's multiprocessor holds several blocks, a small
    Ampere's hardly one."""
    return lo.Tuning(rows=64, warps=8, stages=2) if lo.capability() >= 9 else lo.Tuning(rows=16, warps=8, stages=1)


def many(
    q: Array, keys: Array, start: Array, entries: Array | None, rows: Array | None, sink: Array, cos: Array, sin: Array,
    ratio: int, tuning: lo.Tuning | None = None,
) -> Array:  # fmt: skip
    """Attention of T tokens a slot.

    Args:
      q: bfloat16 [B, T, H, d], token t of slot b at position start[b] + t.
      keys: [B, W + T, d], key i at position start[b] - W + i; a token sees itself and W - 1 before it.
      start: int32 [B].
      entries: [B, N, d], an entry for `ratio` tokens, or None.
      rows: int32 [B, T, K], the entries a token reads, -1 after the last; None: all that are finished at its position.
      sink: [H].
      cos, sin: [B, T, r/2], by which the last channels of a result are turned back.

    Returns:
      [B, T, H, d]. NotImplementedError where no kernel serves the call.
    """
    require_many(q)
    B, T, H, d = q.shape
    W, N = keys.shape[1] - T, 0 if entries is None else entries.shape[1]
    K = N if rows is None else rows.shape[2]
    tuning = tuning or _many_tuning()
    block = min(tuning.rows, max(16, lo.power_of_two(W)))
    heads = max(HEADS, min(64, lo.power_of_two(H)))
    given = [a for a in (entries, rows) if a is not None]

    def kernel(q_ref, keys_ref, start_ref, sink_ref, cos_ref, sin_ref, *refs):
        b, t = pl.program_id(0) // T, pl.program_id(0) % T
        head = pl.program_id(1) * heads + jnp.arange(heads, dtype=jnp.int32)
        c = jnp.arange(d, dtype=jnp.int32)[None]
        some = jnp.minimum(head, H - 1)
        queries = lo.load(q_ref, (b, t, some[:, None], c))
        position = start_ref[b] + t

        def attended(keys, live, carry):
            peak, total, acc = carry
            keys = keys.astype(q.dtype)
            s = jnp.where(live[None], lo.matrix_product(queries, keys) * d**-0.5, NEG)
            top = jnp.maximum(peak, jnp.max(s, axis=1))
            p = jnp.exp(s - top[:, None])
            fade = jnp.exp(peak - top)
            return top, total * fade + jnp.sum(p, axis=1), acc * fade[:, None] + _product(p.astype(q.dtype), keys)

        def near(i, carry):
            j = i * block + jnp.arange(block, dtype=jnp.int32)
            live = (j < W) & (position - W + 1 + j >= 0)
            return attended(lo.load(keys_ref, (b, (t + 1 + jnp.minimum(j, W - 1))[:, None], c)), live, carry)

        def far(i, carry):
            j = i * block + jnp.arange(block, dtype=jnp.int32)
            live, row = j < count, jnp.minimum(j, K - 1)
            if rows is not None:
                row = lo.load(refs[1], (b, t, row))
                live &= row >= 0
            return attended(lo.load(refs[0], (b, jnp.maximum(row, 0)[:, None], c)), live, carry)

        # the sink is a score of nothing
        zero = jnp.zeros((heads,), jnp.float32)
        carry = zero + lo.load(sink_ref, (some,)).astype(jnp.float32), zero + 1, jnp.zeros((heads, d), jnp.float32)
        carry = lo.loop(-(-W // block), near, carry)
        if entries is not None:
            count = jnp.minimum(lax.div(position + 1, ratio), K)
            carry = lax.fori_loop(0, lax.div(count + block - 1, block), far, carry)
        _, total, acc = carry
        out_ref, mine = refs[-1], (head < H)[:, None]
        lo.store(out_ref, (b, t, head[:, None], c), acc / total[:, None], mask=mine & (c >= 0))
        # pairs of channels lie in different threads: they meet where the result is
        lo.threads_meet()
        pair = jnp.arange(cos.shape[-1], dtype=jnp.int32)[None]
        places = [(b, t, some[:, None], d - 2 * cos.shape[-1] + 2 * pair + i) for i in range(2)]
        even, odd = (lo.load(out_ref, place).astype(jnp.float32) for place in places)
        lo.threads_meet()
        x, y = lo.load(cos_ref, (b, t, pair)), lo.load(sin_ref, (b, t, pair))
        for place, turned in zip(places, (even * x + odd * y, odd * x - even * y), strict=True):
            lo.store(out_ref, place, turned, mask=mine & (pair >= 0))

    return lo.call(
        kernel, jax.ShapeDtypeStruct(q.shape, q.dtype), q, keys, start, sink, cos, sin, *given,
        grid=(B * T, -(-H // heads)), tuning=tuning, name="attention_many",
    )  # fmt: skip


def _product(a: Array, b: Array) -> Array:
    """a[M, K] · b[K, N] → float32."""
    exact = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, (((1,), (0,)), ((), ())), precision=exact, preferred_element_type=jnp.float32)
