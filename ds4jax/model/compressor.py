"""The KV compressor: every m tokens become one entry, by a per-channel softmax over the block's slots.

With m = 4 (CSA) blocks overlap: an entry also reads the previous block, through the first half of its channels.
Everything is float32 until the entry is stored.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from ds4jax.model.cache import CompressorState, Paged, SoftmaxSum, empty_sum, flat, rows_to_write, unflat
from ds4jax.model.config import Config
from ds4jax.model.heads import finish
from ds4jax.model.layers import Linear, RMSNorm, normal, value

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Step:
    """Where a call stands: `tokens` [B, T] begin at position `start` [B]; the first `n_valid` [B] of them count."""

    tokens: Array
    start: Array
    n_valid: Array

    @property
    def positions(self) -> Array:  # [B, T]
        return self.start[:, None] + jnp.arange(self.tokens.shape[1], dtype=jnp.int32)


jax.tree_util.register_dataclass(Step, data_fields=["tokens", "start", "n_valid"], meta_fields=[])


def _sum(scores: Array, values: Array, mask: Array) -> SoftmaxSum:
    """The softmax sum over axis -2 of scores, values [..., m, d] where mask [..., m] is True."""
    mask = mask[..., None]
    peak = jax.lax.stop_gradient(jnp.max(jnp.where(mask, scores, -1e30), axis=-2))
    weight = jnp.where(mask, jnp.exp(jnp.where(mask, scores, 0) - jnp.where(mask, peak[..., None, :], 0)), 0)
    return SoftmaxSum(peak, jnp.sum(weight, axis=-2), jnp.sum(weight * jnp.where(mask, values, 0), axis=-2))


def _merge(a: SoftmaxSum, b: SoftmaxSum) -> SoftmaxSum:
    peak = jnp.maximum(a.peak, b.peak)
    wa, wb = jnp.exp(a.peak - peak), jnp.exp(b.peak - peak)
    return SoftmaxSum(peak, wa * a.total + wb * b.total, wa * a.acc + wb * b.acc)


def _merge_first(blocks: SoftmaxSum, state: SoftmaxSum) -> SoftmaxSum:
    """Merge `state` [B, d] into block 0 of `blocks` [B, n, d]."""
    first = _merge(jax.tree.map(lambda x: x[:, 0], blocks), state)
    return jax.tree.map(lambda x, f: x.at[:, 0].set(f), blocks, first)


def _pick(blocks: SoftmaxSum, index: Array) -> SoftmaxSum:
    """Block `index` [B] of each slot of `blocks` [B, n, d]."""
    return jax.tree.map(lambda x: jnp.take_along_axis(x, index[:, None, None], axis=1)[:, 0], blocks)


class Compressor(nnx.Module):
    """Makes entries of `dim` channels from blocks of `ratio` tokens.

    wkv, wgate: [c·dim, D]; ape: [ratio, c·dim], added to the gate by place in the block; c = 2 for ratio 4, else 1.
    """

    def __init__(self, config: Config, ratio: int, dim: int, *, rngs: nnx.Rngs):
        width = (2 if ratio == 4 else 1) * dim
        self.wkv = Linear(width, config.hidden_size, rngs=rngs)
        self.wgate = Linear(width, config.hidden_size, rngs=rngs)
        self.ape = normal(rngs, (ratio, width), 0.02)
        self.norm = RMSNorm(dim, config.rms_norm_eps)
        self.ratio, self.dim = ratio, dim

    def __call__(
        self, kv: Array, gate: Array, step: Step, state: CompressorState
    ) -> tuple[Array, Array, Array, CompressorState]:
        """Feed x [B, T, D], of which `kv` and `gate` [B, T, c·dim], float32, are the products with wkv and wgate.

        Returns:
          entries: [B, n, dim] float32, before norm and rope; slots finish at most n = (T + m - 1) // m blocks a call.
          index: [B, n] int32, each entry's number in its sequence.
          done: [B, n] bool, which of them are finished.
          state: what the next call needs.
        """
        m, T = self.ratio, kv.shape[1]
        ape = value(self.ape).astype(jnp.float32)
        block, offset = jax.lax.div(step.start, m), jax.lax.rem(step.start, m)
        finished = jax.lax.div(offset + step.n_valid, m)  # [B] blocks this call finishes
        if T == 1:  # decode: no grid, one token joins the open block
            n = 1
            gate = gate + ape[offset][:, None]
            live = (step.n_valid > 0)[:, None, None]
            grid = lambda a: a[:, None]  # noqa: E731
            kv, gate, mask = grid(kv), grid(gate), live
        else:  # lay the tokens on a grid of whole blocks; one block more than can finish holds the open one
            n = (T + m - 1) // m
            cell = jnp.arange((n + 1) * m, dtype=jnp.int32)
            source = cell[None] - offset[:, None]
            mask = (source >= 0) & (source < step.n_valid[:, None])
            source = jnp.clip(source, 0, T - 1)[..., None]
            grid = lambda a: jnp.take_along_axis(a, source, axis=1).reshape(a.shape[0], n + 1, m, -1)  # noqa: E731
            kv, gate, mask = grid(kv), grid(gate) + ape, mask.reshape(-1, n + 1, m)
        if m == 4:
            half = self.dim
            # channels [0:dim] are read by the next block's entry, channels [dim:2·dim] by the block's own
            overlap = _merge_first(_sum(gate[..., :half], kv[..., :half], mask), state.overlap)
            current = _merge_first(_sum(gate[..., half:], kv[..., half:], mask), state.current)
            before = jax.tree.map(
                lambda first, rest: jnp.concatenate([first[:, None], rest[:, :-1]], axis=1), state.previous, overlap
            )
            whole = _merge(before, current)
        else:
            overlap = before = None
            whole = current = _merge_first(_sum(gate, kv, mask), state.current)
        closed = jax.tree.map(lambda a: a[:, :n], whole)
        entries = closed.acc / jnp.maximum(closed.total, 1e-30)
        new_state = self._next_state(T, finished, state, current, overlap, before)
        number = jnp.arange(n, dtype=jnp.int32)[None]
        return entries, block[:, None] + number, number < finished[:, None], new_state

    def _next_state(self, T, finished, state, current, overlap, before) -> CompressorState:
        if T > 1:
            pick = lambda blocks: None if blocks is None else _pick(blocks, finished)  # noqa: E731
            return CompressorState(pick(current), pick(overlap), pick(before))
        done = (finished > 0)[:, None]
        blank = empty_sum(state.current.peak.shape)

        def step_on(after_done: SoftmaxSum, otherwise: SoftmaxSum) -> SoftmaxSum:
            return jax.tree.map(lambda a, b: jnp.where(done, a, b), after_done, otherwise)

        first = lambda blocks: jax.tree.map(lambda a: a[:, 0], blocks)  # noqa: E731
        if overlap is None:
            return CompressorState(step_on(blank, first(current)), None, None)
        return CompressorState(
            step_on(blank, first(current)), step_on(blank, first(overlap)), step_on(first(overlap), state.previous)
        )


def write_raw(
    compressor: Compressor, cache: Array | Paged, raw: Array, index: Array, done: Array, freqs: Array,
    rounding: str | None,
) -> tuple[Array, Array | Paged]:  # fmt: skip
    """Norm, turn, round and store what the compressor made, raw [B, n, d] with index and done [B, n]: the entries
    [B, n, d] as they are stored, finished or not, and the cache."""
    B, n, _ = raw.shape
    single = dict(store=flat(cache), rows=rows_to_write(cache, index, done)[:, 0]) if n == 1 else {}
    entries, stored = finish(
        raw.reshape(B * n, 1, -1), index.reshape(-1) * compressor.ratio, freqs, weight=value(compressor.norm.weight),
        eps=compressor.norm.eps, rounding=rounding, dtype=cache.dtype, **single,
    )  # fmt: skip
    entries = entries.reshape(raw.shape)
    return entries, unflat(cache, stored) if single else write_entries(cache, entries, index, done)


def write_entries(cache: Array | Paged, entries: Array, index: Array, done: Array) -> Array | Paged:
    """Store finished entries [B, n, d] at `index` [B, n] of `cache` [B, N, d]; the others are dropped."""
    rows, lying = rows_to_write(cache, index, done), flat(cache)
    rows = jnp.where(rows < 0, len(lying), rows)
    return unflat(cache, lying.at[rows].set(entries.astype(cache.dtype), mode="drop"))
