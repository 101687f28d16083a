"""Attention of one token a slot over its window and its compressed entries, in two launches.

The first kernel spreads blocks of keys over the device; chosen entries are read from the cache where they lie, through
their numbers. The second joins the blocks and the sink. (Flash decoding: T. Dao et al., 2023.)
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ds4jax.pallas import lowering as lo

Array = jax.Array

HEADS = 16  # heads of a program: the rows of a tensor-core tile
KEYS = 64  # keys of a program
CHANNELS = 64  # channels multiplied at once
NEG = -1e30


def decode(
    q: Array, window: Array, in_window: Array, entries: Array | None, rows: Array | None, count: Array | None,
    sink: Array,
) -> Array:  # fmt: skip
    """q [B, H, d] → [B, H, d]. NotImplementedError where no kernel serves the call.

    window: [B, W, d] and in_window [B, W], which of it count. entries: [B, N, d], of which `rows` [B, K] are read (-1:
    none), or without `rows` the first `count` [B]. sink: [H].
    """
    lo.require_device()
    B, H, d = q.shape
    W = window.shape[1]
    if d % CHANNELS:
        raise NotImplementedError(f"heads of {d} channels are no multiple of {CHANNELS}")
    near = -(-W // KEYS)
    listed = rows is not None
    if entries is None:
        entries, count, far = window, jnp.zeros((B,), jnp.int32), 0
    else:
        far = -(-(rows.shape[1] if listed else entries.shape[1]) // KEYS)
    if listed:  # -1: none
        rows = jnp.pad(rows, [(0, 0), (0, far * KEYS - rows.shape[1])], constant_values=-1)
    splits = near + far
    limit = entries.shape[1]

    def part(q_ref, window_ref, live_ref, entries_ref, chosen_ref, peak_ref, sum_ref, out_ref):
        b, split = pl.program_id(0), pl.program_id(2)
        heads = pl.program_id(1) * HEADS + jnp.arange(HEADS, dtype=jnp.int32)
        head = jnp.minimum(heads, H - 1)
        c = jnp.arange(CHANNELS, dtype=jnp.int32)

        def over(keys_ref, row, live):
            """The softmax of one block of keys, unnormalised."""
            s = jnp.zeros((HEADS, KEYS), jnp.float32)
            for at in range(0, d, CHANNELS):
                queries = lo.load(q_ref, (b, head[:, None], at + c[None]))
                keys = lo.load(keys_ref, (b, row[:, None], at + c[None])).astype(q.dtype)
                s = s + lo.matrix_product(queries, keys)
            s = jnp.where(live[None], s * d**-0.5, NEG)
            peak = jnp.max(s, axis=1)
            p = jnp.where(live[None], jnp.exp(s - peak[:, None]), 0)
            mine = heads < H
            lo.store(peak_ref, (b, split, heads), peak, mask=mine)
            lo.store(sum_ref, (b, split, heads), jnp.sum(p, axis=1), mask=mine)
            p = p.astype(q.dtype)
            for at in range(0, d, CHANNELS):
                values = lo.load(keys_ref, (b, row[:, None], at + c[None])).astype(q.dtype)
                lo.store(
                    out_ref, (b, split, heads[:, None], at + c[None]), _product(p, values),
                    mask=mine[:, None] & (c >= 0)[None],
                )  # fmt: skip

        @pl.when(split < near)
        def _():
            j = split * KEYS + jnp.arange(KEYS, dtype=jnp.int32)
            row = jnp.minimum(j, W - 1)
            over(window_ref, row, (j < W) & (lo.load(live_ref, (b, row)) != 0))

        if far:

            @pl.when(split >= near)
            def _():
                j = (split - near) * KEYS + jnp.arange(KEYS, dtype=jnp.int32)
                if listed:
                    row = lo.load(chosen_ref, (b, j))
                    live = row >= 0
                else:
                    row, live = j, j < chosen_ref[b]
                over(entries_ref, jnp.clip(row, 0, limit - 1), live)

    shapes = [(B, splits, H), (B, splits, H), (B, splits, H, d)]
    peak, total, out = lo.call(
        part, [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes], q, window, in_window.astype(jnp.int32), entries,
        rows if listed else count, grid=(B, -(-H // HEADS), splits), tuning=lo.Tuning(warps=4, stages=2),
        name="decode_attention",
    )  # fmt: skip
    width = 1 << (splits - 1).bit_length()

    def join(peak_ref, sum_ref, part_ref, sink_ref, out_ref):
        b, h = pl.program_id(0), pl.program_id(1)
        n = jnp.arange(width, dtype=jnp.int32)
        split, exists = jnp.minimum(n, splits - 1), n < splits
        peaks = jnp.where(exists, lo.load(peak_ref, (b, split, h)), NEG)
        sink = sink_ref[h].astype(jnp.float32)
        top = jnp.maximum(jnp.max(peaks), sink)
        sums = jnp.where(exists, lo.load(sum_ref, (b, split, h)), 0)
        whole = jnp.sum(jnp.exp(peaks - top) * sums) + jnp.exp(sink - top)
        c = jnp.arange(math.gcd(d, 512), dtype=jnp.int32)
        for at in range(0, d, len(c)):

            def add(i, acc, at=at):
                return acc + jnp.exp(peak_ref[b, i, h] - top) * lo.load(part_ref, (b, i, h, at + c))

            acc = lax.fori_loop(0, splits, add, jnp.zeros((len(c),), jnp.float32))
            lo.store(out_ref, (b, h, at + c), acc / whole)

    return lo.call(
        join, jax.ShapeDtypeStruct((B, H, d), q.dtype), peak, total, out, sink, grid=(B, H),
        tuning=lo.Tuning(warps=4, stages=1), name="decode_attention_join",
    )  # fmt: skip


def _product(a: Array, b: Array) -> Array:
    """a[M, K] · b[K, N] → float32."""
    exact = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, (((1,), (0,)), ((), ())), precision=exact, preferred_element_type=jnp.float32)
