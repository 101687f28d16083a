"""The KV cache: a pytree of slots, each at its own position.

A window layer remembers its last W keys in a ring; a compressed layer also every finished entry and the state of the
unfinished one. Nothing is ever moved: position p lives in ring slot p mod W and in entry p // m.

Entries grow with the sequence. Either every slot has room for as many as the longest sequence needs, or slots take
pages of PAGE tokens from a pool; which pages a slot has stands in a table, one for all layers.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from ds4jax.errors import DS4Error
from ds4jax.model.config import Config

Array = jax.Array

PAGE = 128  # tokens: a whole number of blocks of either kind


def _pytree(cls):
    cls = dataclasses.dataclass(frozen=True)(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    return partial(jax.tree_util.register_dataclass, data_fields=names, meta_fields=[])(cls)


@_pytree
class SoftmaxSum:
    """A softmax-weighted sum that is still growing: acc / total is its value. All float32 [..., d].

    Two of them merge exactly, so a block's entry does not depend on how its tokens were split into calls.
    """

    peak: Array  # the largest score so far
    total: Array  # Σ exp(score - peak)
    acc: Array  # Σ exp(score - peak) · value


@_pytree
class CompressorState:
    """What a compressor carries between calls, per slot [B, d]."""

    current: SoftmaxSum  # the unfinished block's own channels
    overlap: SoftmaxSum | None  # m = 4: the unfinished block as its successor will read it
    previous: SoftmaxSum | None  # m = 4: the last finished block as the unfinished one reads it


@_pytree
class Paged:
    """What stands for an array [B, N, d] whose rows lie in pages; only inside compiled steps.

    pool: [P, e, d], P pages of e rows; pages: [B, M] int32, the number of each slot's pages, P where it has none.
    """

    pool: Array
    pages: Array

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.pages.shape[0], self.pages.shape[1] * self.pool.shape[1], self.pool.shape[2]

    @property
    def dtype(self):
        return self.pool.dtype

    def everything(self) -> Array:
        """[B, N, d]; what no page holds is some other page's."""
        return self.pool.at[self.pages].get(mode="clip").reshape(self.shape)

    def rows(self, index: Array) -> Array:
        """Rows `index` [B, n] of each slot, in the pool as one array [P · e, d]."""
        e = self.pool.shape[1]
        number = jax.lax.div(index, e)
        inside = number < self.pages.shape[1]
        page = jnp.take_along_axis(self.pages, jnp.where(inside, number, 0), axis=1)
        return jnp.where(inside, page, self.pool.shape[0]) * e + jax.lax.rem(index, e)

    def flat(self) -> Array:
        return self.pool.reshape(-1, self.pool.shape[-1])


def everything(stored: Array | Paged) -> Array:
    """Stored entries as an array [B, N, d]."""
    return stored.everything() if isinstance(stored, Paged) else stored


def pick(stored: Array | Paged, index: Array) -> Array:
    """Entries `index` [B, Q, K] of each slot → [B, Q, K, d]; a negative index picks anything."""
    index = jnp.maximum(index, 0)
    if not isinstance(stored, Paged):
        return jax.vmap(lambda e, i: e[i])(stored, index)
    rows = stored.rows(index.reshape(index.shape[0], -1)).reshape(index.shape)
    return stored.flat().at[rows].get(mode="clip")


def flat(stored: Array | Paged) -> Array:
    """All stored entries of all slots as they lie: [M, d]."""
    return stored.flat() if isinstance(stored, Paged) else stored.reshape(-1, stored.shape[-1])


def unflat(stored: Array | Paged, rows: Array) -> Array | Paged:
    """`stored` with what lies in it replaced: the inverse of `flat`."""
    if isinstance(stored, Paged):
        return dataclasses.replace(stored, pool=rows.reshape(stored.pool.shape))
    return rows.reshape(stored.shape)


def rows_of(stored: Array | Paged, index: Array) -> Array:
    """Which rows of `flat(stored)` entries `index` [B, n] of each slot are; index may be [n], for all slots alike."""
    B, N = stored.shape[:2]
    index = jnp.broadcast_to(index, (B, index.shape[-1]))
    if isinstance(stored, Paged):
        return jnp.minimum(stored.rows(index), stored.pool.shape[0] * stored.pool.shape[1] - 1)
    return index + N * jnp.arange(B, dtype=jnp.int32)[:, None]


def rows_to_write(stored: Array | Paged, index: Array, keep: Array) -> Array:
    """As `rows_of`, -1 where `keep` [B, n] is False and where a slot has no room for an entry."""
    B, N = stored.shape[:2]
    if isinstance(stored, Paged):
        rows, room = stored.rows(index), stored.pool.shape[0] * stored.pool.shape[1]
        return jnp.where(keep & (rows < room), rows, -1)
    return jnp.where(keep & (index < N), index + N * jnp.arange(B, dtype=jnp.int32)[:, None], -1)


@_pytree
class LayerCache:
    window: Array  # [B, W, d] keys (= values) of the last W positions; position p at p mod W
    entries: Array | Paged | None  # [B, N, d] compressed entries; in pages [P, PAGE / m, d]
    compressor: CompressorState | None
    index_keys: Array | Paged | None  # [B, N, di] the indexer's compressed keys; in pages [P, PAGE / m, di]
    index_compressor: CompressorState | None


@_pytree
class Cache:
    length: Array  # [B] int32: tokens each slot has seen
    layers: tuple[LayerCache, ...]
    mtp: LayerCache | None
    pages: Array | None = None  # [B, M] int32: each slot's pages, the number of pages where it has none

    @property
    def slots(self) -> int:
        return self.length.shape[0]

    @property
    def nbytes(self) -> int:
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))


def empty_sum(shape: tuple[int, ...]) -> SoftmaxSum:
    # a finite floor: -inf - -inf would be NaN where an empty sum meets an empty block
    return SoftmaxSum(jnp.full(shape, -1e30, jnp.float32), jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32))


def empty_compressor(slots: int, ratio: int, dim: int) -> CompressorState:
    one = partial(empty_sum, (slots, dim))
    return CompressorState(one(), one() if ratio == 4 else None, one() if ratio == 4 else None)


def attach(cache: Cache) -> Cache:
    """A paged cache as the model reads it; others as they are. Inside compiled steps, before `Transformer.forward`."""
    if cache.pages is None:
        return cache
    wrap = lambda a: None if a is None else Paged(a, cache.pages)  # noqa: E731
    layers = tuple(dataclasses.replace(c, entries=wrap(c.entries), index_keys=wrap(c.index_keys)) for c in cache.layers)
    return dataclasses.replace(cache, layers=layers)


def detach(cache: Cache) -> Cache:
    """The inverse of `attach`."""
    if cache.pages is None:
        return cache
    bare = lambda a: a.pool if isinstance(a, Paged) else a  # noqa: E731
    layers = tuple(dataclasses.replace(c, entries=bare(c.entries), index_keys=bare(c.index_keys)) for c in cache.layers)
    return dataclasses.replace(cache, layers=layers)


def init_layer(config: Config, ratio: int, slots: int, capacity: int, dtype, pages: int | None = None) -> LayerCache:
    window = jnp.zeros((slots, config.sliding_window, config.head_dim), dtype)
    if not ratio:
        return LayerCache(window, None, None, None, None)
    room = (slots, max(1, capacity // ratio)) if pages is None else (pages, PAGE // ratio)
    entries = jnp.zeros((*room, config.head_dim), dtype)
    compressor = empty_compressor(slots, ratio, config.head_dim)
    if ratio != 4:
        return LayerCache(window, entries, compressor, None, None)
    keys = jnp.zeros((*room, config.index_head_dim), dtype)
    return LayerCache(window, entries, compressor, keys, empty_compressor(slots, ratio, config.index_head_dim))


def init_cache(
    config: Config, slots: int, capacity: int, dtype=jnp.float32, *, mtp: bool = False, pages: int | None = None
) -> Cache:
    """An empty cache for `slots` sequences of up to `capacity` tokens each.

    pages: keep entries in that many pages of PAGE tokens, of which no slot has any yet; default: in slots.

    Raises:
      DS4Error: `capacity` is not in 1 … `max_position_embeddings`, or `slots` is below 1.
    """
    if not 1 <= capacity <= config.max_position_embeddings:
        raise DS4Error(f"context {capacity}: this model takes 1 to {config.max_position_embeddings} tokens")
    if slots < 1:
        raise DS4Error(f"slots must be at least 1, not {slots}")
    ratios = map(config.ratio, range(config.num_hidden_layers))
    layers = tuple(init_layer(config, ratio, slots, capacity, dtype, pages) for ratio in ratios)
    tail = init_layer(config, 0, slots, capacity, dtype) if mtp else None
    table = None if pages is None else jnp.full((slots, -(-capacity // PAGE)), pages, jnp.int32)
    return Cache(jnp.zeros((slots,), jnp.int32), layers, tail, table)


def cache_nbytes(
    config: Config, slots: int, capacity: int, dtype=jnp.float32, *, mtp: bool = False, pages: int | None = None
) -> int:
    """Bytes `init_cache` would allocate, without allocating."""
    shapes = jax.eval_shape(lambda: init_cache(config, slots, capacity, dtype, mtp=mtp, pages=pages))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))


def reset_slots(cache: Cache, which: Array) -> Cache:
    """Empty the slots where `which` [B] is True, in place under donation.

    Window keys and entries need no clearing (a position not yet written is never visible); compressor states do.
    """

    def clear(state: SoftmaxSum) -> SoftmaxSum:
        new = empty_sum(state.peak.shape)
        return jax.tree.map(lambda old, fresh: jnp.where(which[:, None], fresh, old), state, new)

    def layer(c: LayerCache | None) -> LayerCache | None:
        if c is None or c.compressor is None:
            return c
        is_sum = lambda x: isinstance(x, SoftmaxSum)  # noqa: E731
        states = jax.tree.map(clear, (c.compressor, c.index_compressor), is_leaf=is_sum)
        return dataclasses.replace(c, compressor=states[0], index_compressor=states[1])

    length = jnp.where(which, 0, cache.length)
    return Cache(length, tuple(layer(c) for c in cache.layers), layer(cache.mtp), cache.pages)
