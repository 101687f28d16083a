"""The lightning indexer: scores of all entries in one launch, the K best of them in another.

The best are found by their K-th score, bit by bit, and written in order of their place; nothing is sorted. More entries
than a program holds are cut into parts, whose K best are what the next launch chooses from.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ds4jax.pallas import lowering as lo

Array = jax.Array

KEYS = 64  # entries that a program scores
PART = 8192  # entries that a program chooses from
# Comparisons in all up to which programs count, each for a few entries, where the other way takes one launch and where
# it takes two, and entries of a part (the last: twice as many). One row on an H200, counted and by bits: 4,096 entries
# 4.5 and 10.2 µs, 16,384 15.5 and 21.2, 32,768 28.5 and 22.4; 64 rows of 512 entries 10.2 and 5.6.
PAIRS, PAIRS_OF_MANY, COUNTED = 1 << 23, 1 << 25, 2048
COUNTS, AT_ONCE = 4, 8  # entries that a program then places, and blocks of others that it loads at once
MAX_SLOTS = 256
QUERIES = 16  # of one slot that a program scores its entries for, one after the other


def require(q: Array, K: int) -> None:
    """NotImplementedError where no kernel serves queries [B, H, d] and K entries."""
    lo.require_device()
    B, H, d = q.shape
    if B > MAX_SLOTS:
        raise NotImplementedError(f"{B} slots; this kernel takes up to {MAX_SLOTS}")
    _require_heads(H, d)
    require_choice(K)


def require_many(q: Array) -> None:
    """NotImplementedError where no kernel serves many queries a slot [B, T, H, d]."""
    lo.require_device()
    _require_heads(*q.shape[2:])


def _require_heads(H: int, d: int) -> None:
    if H < 16 or H & (H - 1) or d < 16 or d & (d - 1):
        raise NotImplementedError(f"{H} heads of {d} channels are no powers of two of at least 16")


def require_choice(K: int) -> None:
    """NotImplementedError where no kernel chooses K entries."""
    lo.require_device()
    if 2 * K > PART:
        raise NotImplementedError(f"{K} entries are more than half of {PART}")


def scores(q: Array, weights: Array, keys: Array, rows: Array, visible: Array) -> Array:
    """Σ_h weights[h] · relu(q[h] · key): q [B, H, d], weights float32 [B, H], keys [M, d] and the rows of them [B, N]
    that are a slot's entries, of which it sees the first `visible` [B] → float32 [B, N], -inf where it sees none."""
    B, H, d = q.shape
    N = rows.shape[1]

    def kernel(q_ref, weights_ref, keys_ref, rows_ref, visible_ref, out_ref):
        b, first = pl.program_id(0), pl.program_id(1) * KEYS
        i, h, c = first + jnp.arange(KEYS, dtype=jnp.int32), jnp.arange(H, dtype=jnp.int32), jnp.arange(d)[None]
        seen = visible_ref[b]
        exists = i < N
        lo.store(out_ref, (b, i), jnp.full((KEYS,), -jnp.inf, jnp.float32), mask=exists & (first >= seen))

        @pl.when(first < seen)
        def _():
            row = lo.load(rows_ref, (b, jnp.minimum(i, N - 1)))
            key = lo.load(keys_ref, (row[:, None], c))
            product = lo.matrix_product(key.astype(q.dtype), lo.load(q_ref, (b, h[:, None], c)))
            s = jnp.sum(jnp.maximum(product, 0) * lo.load(weights_ref, (b, h))[None], axis=1)
            lo.store(out_ref, (b, i), jnp.where(i < seen, s, -jnp.inf), mask=exists)

    return lo.call(
        kernel, jax.ShapeDtypeStruct((B, N), jnp.float32), q, weights, keys, rows, visible, grid=(B, -(-N // KEYS)),
        tuning=lo.Tuning(warps=4, stages=1), name="index_scores",
    )  # fmt: skip


def scores_many(q: Array, weights: Array, keys: Array, first: Array, ratio: int) -> Array:
    """As `scores` for many queries a slot: q [B, T, H, d], weights float32 [B, T, H], keys [B, N, d] → float32
    [B, T, N], -inf where an entry, one for `ratio` tokens, is not finished at position first[b] + t."""
    B, T, H, d = q.shape
    N = keys.shape[1]
    queries = min(QUERIES, lo.power_of_two(T))
    # a query of many heads weighs more than keys, and is read once for all that a program has
    tuning = lo.Tuning(rows=256, warps=8, stages=2) if lo.capability() >= 9 else lo.Tuning(rows=64, warps=4, stages=1)
    width = min(tuning.rows, max(16, lo.power_of_two(N)))

    def kernel(q_ref, weights_ref, keys_ref, first_ref, out_ref):
        tiles = -(-T // queries)
        b, begin = pl.program_id(0) // tiles, pl.program_id(0) % tiles * queries
        i = pl.program_id(1) * width + jnp.arange(width, dtype=jnp.int32)
        h, c = jnp.arange(H, dtype=jnp.int32), jnp.arange(d, dtype=jnp.int32)[None]
        exists, position = i < N, first_ref[b]
        last = lax.div(position + jnp.minimum(begin + queries, T), ratio)
        seen_by_any = pl.program_id(1) * width < last

        @pl.when(seen_by_any)
        def _():
            key = lo.load(keys_ref, (b, jnp.minimum(i, N - 1)[:, None], c)).astype(q.dtype)

            def one(n, carry):
                t = jnp.minimum(begin + n, T - 1)  # the last tile's last query, once more
                product = lo.matrix_product(key, lo.load(q_ref, (b, t, h[:, None], c)))
                s = jnp.sum(jnp.maximum(product, 0) * lo.load(weights_ref, (b, t, h))[None], axis=1)
                s = jnp.where(i < lax.div(position + t + 1, ratio), s, -jnp.inf)
                lo.store(out_ref, (b, t, i), s, mask=exists)
                return carry

            lo.loop(queries, one, 0)

        @pl.when(~seen_by_any)
        def _():
            t = jnp.minimum(begin + jnp.arange(queries, dtype=jnp.int32), T - 1)
            nothing = jnp.full((queries, width), -jnp.inf, jnp.float32)
            lo.store(out_ref, (b, t[:, None], i[None]), nothing, mask=exists[None] & (t >= 0)[:, None])

    return lo.call(
        kernel, jax.ShapeDtypeStruct((B, T, N), jnp.float32), q, weights, keys, first,
        grid=(B * -(-T // queries), -(-N // width)), tuning=tuning, name="index_scores_many",
    )  # fmt: skip


def best(values: Array, K: int) -> Array:
    """Where the K largest of values float32 [B, N] are, of equals the first: int32 [B, K] in any order, -1 for -inf."""
    B, N = values.shape
    places, choose, most, last = None, _best, PART, PART
    if B * min(N, COUNTED) * N <= (PAIRS if N <= PART else PAIRS_OF_MANY) and 2 * K <= COUNTED:
        choose, most, last = _ranked, COUNTED, 2 * COUNTED
    while True:
        parts = 1 if N <= last else -(-N // most)
        values, places = choose(values, places, K, parts)
        if parts == 1:
            return places[:, 0]
        N = parts * K
        values, places = values.reshape(B, N), places.reshape(B, N)


def _ranked(values: Array, places: Array | None, K: int, parts: int) -> tuple[Array, Array]:
    """As `_best`, the largest first: an entry's place is how many come before it, and programs count for themselves."""
    B, N = values.shape
    each = -(-N // parts)
    width = min(256, max(COUNTS, lo.power_of_two(each)))
    chunks = -(-each // width)
    turns = -(-chunks // AT_ONCE)

    def kernel(values_ref, *refs):
        *places_ref, out_ref, out_places_ref = refs
        b, part, begin = pl.program_id(0), pl.program_id(1), pl.program_id(2) * COUNTS
        i, n = begin + jnp.arange(COUNTS, dtype=jnp.int32), jnp.arange(width, dtype=jnp.int32)
        here = jnp.minimum(part * each + i, N - 1)

        def others(c):  # numbers in the part, and scores in order; those behind the part count for nobody
            at = c * width + n
            place = part * each + at
            exists = (at < each) & (place < N)
            return at, jnp.where(exists, lo.in_order(lo.load(values_ref, (b, jnp.minimum(place, N - 1)))), lo.LEAST)

        def count(turn, total):  # of equals only those before it are: a block is before it, behind it, or its own
            first = turn * AT_ONCE
            for c, (_, other) in [(first + j, others(first + j)) for j in range(min(AT_ONCE, chunks))]:
                least = jnp.where((c + 1) * width <= begin, own - 1, own)
                total = total + (other[None] > least[:, None]).astype(jnp.int32)
            return total

        x = lo.load(values_ref, (b, here))
        own = jnp.maximum(lo.in_order(x), lo.LEAST + 1)  # one less is still a number
        at, other = others(begin // width)
        total = ((other[None] == own[:, None]) & (at[None] < i[:, None])).astype(jnp.int32)
        rank = jnp.sum(lo.loop(turns, count, total), axis=1)
        place = here if places is None else lo.load(places_ref[0], (b, here))
        to, mine = jnp.minimum(rank, K - 1), (i < each) & (part * each + i < N) & (rank < K)
        lo.store(out_ref, (b, part, to), x, mask=mine)
        lo.store(out_places_ref, (b, part, to), jnp.where(x > -jnp.inf, place, -1), mask=mine)

    shapes = [((B, parts, K), jnp.float32), ((B, parts, K), jnp.int32)]
    return lo.call(
        kernel, [jax.ShapeDtypeStruct(*s) for s in shapes], values, *([] if places is None else [places]),
        grid=(B, parts, -(-each // COUNTS)), tuning=lo.Tuning(warps=4, stages=1), name="index_best",
    )  # fmt: skip


def _best(values: Array, places: Array | None, K: int, parts: int) -> tuple[Array, Array]:
    """The K best of each of `parts` equal parts of [B, N]: values and places [B, parts, K]. places: [B, N], where the
    values were at first; None: where they are."""
    B, N = values.shape
    each = -(-N // parts)
    width = 1 << max(7, (each - 1).bit_length())

    def kernel(values_ref, *refs):
        *places_ref, out_ref, out_places_ref = refs
        b, part = pl.program_id(0), pl.program_id(1)
        n = jnp.arange(width, dtype=jnp.int32)
        at = part * each + n
        mine = (n < each) & (at < N)
        at = jnp.minimum(at, N - 1)
        x = jnp.where(mine, lo.load(values_ref, (b, at)), -jnp.inf)
        order = lo.in_order(x)
        flip = jnp.int32(lo.LEAST)

        def narrow(i, limit):  # the largest limit that K values reach, as an unsigned number, from its highest bit on
            candidate = limit | jnp.int32(1) << (31 - i)
            reached = jnp.sum((order >= (candidate ^ flip)).astype(jnp.int32))
            return jnp.where(reached >= K, candidate, limit)

        limit = lax.fori_loop(0, 32, narrow, jnp.int32(0)) ^ flip
        above, equal = (order > limit).astype(jnp.int32), (order == limit).astype(jnp.int32)
        counts = jnp.cumsum(above * 65536 + equal)
        rank_above, rank_equal = counts >> 16, counts & 65535
        room = K - jnp.sum(above)
        taken = (above > 0) | ((equal > 0) & (rank_equal <= room))
        to = rank_above + jnp.minimum(rank_equal, room) - 1
        to = jnp.where(taken, to, 0)
        lo.store(out_ref, (b, part, to), x, mask=taken)
        place = jnp.where(x > -jnp.inf, at if places is None else lo.load(places_ref[0], (b, at)), -1)
        lo.store(out_places_ref, (b, part, to), place, mask=taken)

    shapes = [((B, parts, K), jnp.float32), ((B, parts, K), jnp.int32)]
    return lo.call(
        kernel, [jax.ShapeDtypeStruct(*s) for s in shapes], values, *([] if places is None else [places]),
        grid=(B, parts),
        tuning=lo.Tuning(warps=max(1, min(8, width // 1024)), stages=1), name="index_best",
    )  # fmt: skip
