"""DeepSeek V4's attention: a sliding window joined with compressed entries, one shared key-value head, and a sink.

ratio 0: window only. ratio 128 (HCA): window and all finished entries. ratio 4 (CSA): window and the K entries that
the lightning indexer scores highest.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from ds4jax import quant
from ds4jax.model.cache import LayerCache, Paged, everything, flat, pick, rows_of, rows_to_write, unflat
from ds4jax.model.compressor import Compressor, Step, write_entries, write_raw
from ds4jax.model.config import Config
from ds4jax.model.heads import finish
from ds4jax.model.layers import Linear, RMSNorm, angles, rope_frequencies, rotate, turn, value
from ds4jax.model.sites import Tap
from ds4jax.pallas import attention as kernels
from ds4jax.pallas import indexer as index_kernels
from ds4jax.quant import api
from ds4jax.quant.matmul import zeros_after

Array = jax.Array

QUERY_BLOCK = 128  # queries attended at once in prefill
SCORE_BYTES = 256 << 20  # about how much memory one group of query blocks may use for scores or gathered entries
NEG = -1e30


def einsum(spec: str, a: Array, b: Array) -> Array:
    """Contract with float32 accumulation and result; float32 operands are multiplied in full float32."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(spec, a, b, precision=exact, preferred_element_type=jnp.float32)


def attend(q: Array, parts: list[tuple[Array, Array]], sink: Array) -> tuple[Array, Array]:
    """Softmax attention of shared-head queries over several sets of keys (= values) and a sink.

    Args:
      q: [B, Q, H, d].
      parts: (keys, mask) pairs: keys [B, n, d] seen by all queries or [B, Q, n, d] one set per query; mask [B, Q, n].
      sink: [H], a logit that takes probability and gives nothing.

    Returns:
      o: [B, Q, H, d] in q's dtype, and the probabilities [B, Q, H, Σn] in float32.
    """
    scale = q.shape[-1] ** -0.5
    scores = []
    for keys, mask in parts:
        s = einsum("bqhd,bnd->bqhn" if keys.ndim == 3 else "bqhd,bqnd->bqhn", q, keys) * scale
        scores.append(jnp.where(mask[:, :, None, :], s, NEG))
    s = jnp.concatenate(scores, axis=-1)
    sink = sink.astype(jnp.float32)[:, None]
    peak = jax.lax.stop_gradient(jnp.maximum(jnp.max(s, axis=-1, keepdims=True), sink))
    p = jnp.exp(s - peak)
    p = p / (jnp.sum(p, axis=-1, keepdims=True) + jnp.exp(sink - peak))
    o, at = 0.0, 0
    for keys, mask in parts:
        n = mask.shape[-1]
        spec = "bqhn,bnd->bqhd" if keys.ndim == 3 else "bqhn,bqnd->bqhd"
        o = o + einsum(spec, p[..., at : at + n].astype(q.dtype), keys)
        at += n
    return o.astype(q.dtype), p


def decode_attend(
    q: Array, window: Array, in_window: Array, selected: list, stored: Array | Paged | None, rows: Callable[[], Array],
    sink: Array, cos: Array, sin: Array, implementation: str | None = None,
) -> Array:  # fmt: skip
    """Attention of one token a slot, its heads turned back.

    Args:
      q: [B, H, d].
      window: [B, W, d], and in_window [B, W], which of it count.
      selected: the entries as `attend` takes them.
      stored: the same where they are stored, and `rows()` [B, K], their rows in it, -1 for none: read in place.
      sink: [H].
      cos, sin: [B, r/2], of the token's position.

    Returns:
      [B, H, d] in q's dtype.
    """

    def plain():
        parts = [(window.astype(q.dtype), in_window[:, None]), *selected]
        return _turned_back(attend(q[:, None], parts, sink)[0][:, 0], cos, sin)

    def pallas():
        kernels.require(q)
        number = rows()
        store = None if stored is None else flat(stored)
        return api.once(_attend_kernel, q, window, in_window, store, number, sink, cos, sin)

    table = {"pallas": pallas, "xla": plain}
    return api.run("attention.decode", table, implementation)


def _turned_back(o: Array, cos: Array, sin: Array) -> Array:  # [B, H, d]
    return turn(o, cos[:, None], sin[:, None], inverse=True)


def _attend_rows(q, window, in_window, stored, rows, sink, cos, sin):
    """What the kernel computes, in plain JAX."""
    parts = [(window.astype(q.dtype), in_window[:, None])]
    if rows is not None:
        parts.append((stored[jnp.maximum(rows, 0)][:, None].astype(q.dtype), (rows >= 0)[:, None]))
    return _turned_back(attend(q[:, None], parts, sink)[0][:, 0], cos, sin)


@jax.custom_vjp
def _attend_kernel(q, window, in_window, stored, rows, sink, cos, sin):
    return kernels.decode(q, window, in_window, stored, rows, sink, cos, sin)


_attend_kernel.defvjp(lambda *args: (_attend_kernel(*args), args), lambda args, g: jax.vjp(_attend_rows, *args)[1](g))


def _near(keys: Array, start: Array, at: Array | int, size: int, W: int) -> tuple[Array, Array]:
    """The keys [B, size + W, d] around queries `at` … `at` + size - 1 of keys [B, W + T, d], of which key i is at
    position start - W + i, and which of them each query sees [B, size, size + W]: itself and the W - 1 before it."""
    near = jax.lax.dynamic_slice_in_dim(keys, at, size + W, axis=1)
    query = jnp.arange(size, dtype=jnp.int32)[:, None]
    key = jnp.arange(size + W, dtype=jnp.int32)[None]
    in_reach = (key > query) & (key <= query + W)
    exists = (start[:, None] + at - W + key[0]) >= 0
    return near, in_reach[None] & exists[:, None]


def _visible(positions: Array, N: int, ratio: int) -> Array:
    """Which of N entries, one for `ratio` tokens, are finished at positions [B, Q]: bool [B, Q, N]."""
    return jnp.arange(N, dtype=jnp.int32) < jax.lax.div(positions + 1, ratio)[..., None]


def _attend_many_rows(q, keys, start, entries, rows, sink, cos, sin, ratio):
    """What the kernel `many` computes, in plain JAX."""
    T, W = q.shape[1], keys.shape[1] - q.shape[1]
    size = min(QUERY_BLOCK, T)
    pad = -T % size
    padded = lambda a: jnp.pad(a, [(0, 0), (0, pad)] + [(0, 0)] * (a.ndim - 2))  # noqa: E731
    q, keys = padded(q), padded(keys)
    rows = None if rows is None else padded(rows)

    @jax.checkpoint
    def block(at):
        cut = lambda a: jax.lax.dynamic_slice_in_dim(a, at, size, axis=1)  # noqa: E731
        parts = [_near(keys, start, at, size, W)]
        if entries is not None:
            visible = _visible(start[:, None] + at + jnp.arange(size, dtype=jnp.int32), entries.shape[1], ratio)
            parts.append((entries, visible) if rows is None else (pick(entries, cut(rows)), cut(rows) >= 0))
        return attend(cut(q), parts, sink)[0]

    o = jax.lax.map(block, jnp.arange(0, T + pad, size, dtype=jnp.int32))
    o = jnp.moveaxis(o, 0, 1).reshape(q.shape)[:, :T]
    return turn(o, cos[:, :, None], sin[:, :, None], inverse=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(8,))
def _attend_many_kernel(q, keys, start, entries, rows, sink, cos, sin, ratio):
    return kernels.many(q, keys, start, entries, rows, sink, cos, sin, ratio)


_attend_many_kernel.defvjp(
    lambda *args: (_attend_many_kernel(*args), args[:-1]),
    lambda ratio, args, g: jax.vjp(functools.partial(_attend_many_rows, ratio=ratio), *args)[1](g),
)


def index_scores(q: Array, w: Array, keys: Array) -> Array:
    """Σ_h w[h] · relu(q[h] · k): q [B, Q, Hi, di], w [B, Q, Hi], keys [B, N, di] → float32 [B, Q, N]."""

    def of(keys):
        return einsum("bqh,bqhn->bqn", w, jax.nn.relu(einsum("bqhd,bnd->bqhn", q, keys)))

    B, N, di = keys.shape
    tile = max(512, SCORE_BYTES // max(1, 4 * q.size // di))
    if tile >= N:
        return of(keys)
    pad = -N % tile
    tiles = jnp.pad(keys, ((0, 0), (0, pad), (0, 0))).reshape(B, -1, tile, di).swapaxes(0, 1)
    out = jax.lax.map(of, tiles)  # [n, B, Q, tile]
    return jnp.moveaxis(out, 0, 2).reshape(B, q.shape[1], -1)[..., :N]


def select_entries(
    scores: Array, visible: Array | None, K: int, *, ordered: bool = True, implementation: str | None = None
) -> Array:
    """The best K visible entries: scores, visible [B, Q, N] → int32 [B, Q, K], -1 where there are fewer. visible None:
    those with a score above -inf. `ordered`: the best first; else in any order, which may cost less."""
    K = min(K, scores.shape[-1])
    masked = jax.lax.stop_gradient(scores)
    if visible is not None:
        masked = jnp.where(visible, masked, -jnp.inf)

    def plain():
        best, index = jax.lax.top_k(masked, K)
        return jnp.where(best > -jnp.inf, index, -1)

    def pallas():
        index_kernels.require_choice(K)
        flat_rows = masked.reshape(-1, masked.shape[-1])
        return api.once(index_kernels.best, flat_rows, K).reshape(*masked.shape[:-1], K)

    table = {"xla": plain} if ordered else {"pallas": pallas, "xla": plain}
    return api.run("indexer.select", table, implementation)


def choose_entries(
    q: Array, w: Array, stored: Array | Paged, seen: Array, K: int, implementation: str | None = None
) -> Array:
    """The entries that one token a slot reads, in any order.

    Args:
      q: [B, Hi, di] and w: float32 [B, Hi], the indexer's queries and their weights.
      stored: its keys [B, N, di].
      seen: int32 [B], how many of them are finished.
      K: how many to choose.

    Returns:
      int32 [B, min(K, N)], -1 where there are fewer. No gradient passes.
    """
    q, w, stored = jax.lax.stop_gradient((q, w, stored))
    number = jnp.arange(stored.shape[1], dtype=jnp.int32)
    if len(number) <= K:  # all of them
        return jnp.where(number < seen[:, None], number, -1)

    def plain():
        scores = index_scores(q[:, None], w[:, None], everything(stored))
        return select_entries(scores, (number < seen[:, None])[:, None], K)[:, 0]

    def pallas():
        index_kernels.require(q, K)
        scores = api.once(index_kernels.scores, q, w, flat(stored), rows_of(stored, number), seen)
        return api.once(index_kernels.best, scores, K)

    return api.run("indexer.choose", {"pallas": pallas, "xla": plain}, implementation)


def choose_entries_many(
    q: Array, w: Array, keys: Array, start: Array, K: int, ratio: int, implementation: str | None = None
) -> Array:
    """As `choose_entries` for many tokens a slot.

    Args:
      q: [B, T, Hi, di] and w: float32 [B, T, Hi].
      keys: [B, N, di], one for `ratio` tokens.
      start: int32 [B], the first token's position.
      K: how many to choose.

    Returns:
      int32 [B, T, min(K, N)], -1 last. No gradient passes.
    """
    q, w, keys = jax.lax.stop_gradient((q, w, keys))
    B, T = q.shape[:2]
    N = keys.shape[1]
    blocks = -(-T // max(1, SCORE_BYTES // (4 * B * N)))
    size = -(-T // blocks)
    pad = [(0, 0), (0, blocks * size - T), (0, 0)]
    q, w = jnp.pad(q, [*pad, (0, 0)]), jnp.pad(w, pad)

    def block(i):
        at = i * size
        q_block, w_block = (jax.lax.dynamic_slice_in_dim(a, at, size, axis=1) for a in (q, w))

        def plain():
            visible = _visible(start[:, None] + at + jnp.arange(size, dtype=jnp.int32), N, ratio)
            return jnp.where(visible, index_scores(q_block, w_block, keys), -jnp.inf)

        def pallas():
            index_kernels.require_many(q)
            return api.once(index_kernels.scores_many, q_block, w_block, keys, start + at, ratio)

        scores = api.run("indexer.scores", {"pallas": pallas, "xla": plain}, implementation)
        return select_entries(scores, None, K, ordered=False, implementation=implementation)

    chosen = _map(block, blocks, 1, q)
    return jnp.moveaxis(chosen, 0, 1).reshape(B, blocks * size, -1)[:, :T]


def dense_limit(config: Config) -> int:
    """Up to how many entries a prefill of a CSA layer in plain JAX reads all of them and masks."""
    return max(4 * config.index_topk, 1024)


class Indexer(nnx.Module):
    """The lightning indexer: cheap many-headed scores of every compressed entry, from which the top K are read."""

    def __init__(self, config: Config, *, cache_quant: bool, rngs: nnx.Rngs):
        self.Hi, self.di, self.K = config.index_n_heads, config.index_head_dim, config.index_topk
        self.wq_b = Linear(self.Hi * self.di, config.q_lora_rank, rngs=rngs)
        self.weights_proj = Linear(self.Hi, config.hidden_size, rngs=rngs)
        self.compressor = Compressor(config, 4, self.di, rngs=rngs)
        self.freqs = tuple(rope_frequencies(config, 4).tolist())
        self.cache_quant = cache_quant

    @property
    def _rounding(self) -> str | None:
        return "fp4" if self.cache_quant else None

    def queries(self, raw: Array, weights: Array, step: Step) -> tuple[Array, Array]:
        """The products with wq_b [B, T, Hi · di] and weights_proj [B, T, Hi] → queries [B, T, Hi, di] and the heads'
        weights [B, T, Hi], float32."""
        B, T = raw.shape[:2]
        q, _ = finish(
            raw.reshape(B * T, self.Hi, self.di), step.positions.reshape(-1), jnp.asarray(self.freqs),
            rounding=self._rounding,
        )  # fmt: skip
        return q.reshape(B, T, self.Hi, self.di), weights * (self.di * self.Hi) ** -0.5

    def update(self, kv: Array, gate: Array, step: Step, cache: LayerCache) -> LayerCache:
        """Compress the products with the compressor's weights into the indexer's keys."""
        raw, index, done, state = self.compressor(kv, gate, step, cache.index_compressor)
        freqs = jnp.asarray(self.freqs)
        _, keys = write_raw(self.compressor, cache.index_keys, raw, index, done, freqs, self._rounding)
        return dataclasses.replace(cache, index_keys=keys, index_compressor=state)


def divergence(pattern: Array, scores: Array, mask: Array) -> Array:
    """How far the indexer's scores are from the attention they select for: KL divergence in nats.

    Args:
      pattern: [B, Q, H, n], attention probabilities of n candidate entries; taken as given.
      scores: [B, Q, n], the indexer's; mask: [B, Q, n], which candidates count.

    Returns:
      [B, Q]: KL(Σ_h pattern, normalised ‖ softmax(scores)); 0 where there is no candidate. Its gradient trains the
      indexer alone (the loss of DeepSeek-V3.2's sparse attention).
    """
    target = jnp.where(mask, jnp.sum(jax.lax.stop_gradient(pattern), axis=2), 0)
    target = target / jnp.maximum(jnp.sum(target, axis=-1, keepdims=True), 1e-30)
    log_p = jax.nn.log_softmax(jnp.where(mask, scores, NEG), axis=-1)
    return jnp.sum(jnp.where(target > 0, target * (jnp.log(jnp.maximum(target, 1e-30)) - log_p), 0), axis=-1)


def _map(fn: Callable, n: int, group: int, after: Array):
    """fn(0) … fn(n - 1) stacked, `group` at a time; n is a multiple of it. As `jax.lax.map`, but its results lie in
    memory from a program's start, and these once `after` exists."""

    def several(i):
        return jax.vmap(fn)(i * group + jnp.arange(group, dtype=jnp.int32))

    def turn(i, out):
        put = lambda o, r: jax.lax.dynamic_update_slice_in_dim(o, r, i * group, 0)  # noqa: E731
        return jax.tree.map(put, out, several(i))

    if n == group:
        return several(0)
    shapes = jax.eval_shape(several, 0)
    empty = jax.tree.map(lambda s: zeros_after(after, (n, *s.shape[1:]), s.dtype), shapes)
    return jax.lax.fori_loop(0, n // group, turn, empty)


class Attention(nnx.Module):
    """One attention sublayer. See the module's docstring; sizes in `Config`."""

    def __init__(self, config: Config, ratio: int, *, cache_quant: bool, rngs: nnx.Rngs):
        self.config, self.ratio, self.cache_quant = config, ratio, cache_quant
        D, H, d, R = config.hidden_size, config.num_attention_heads, config.head_dim, config.q_lora_rank
        G, O = config.o_groups, config.o_lora_rank
        self.wq_a = Linear(R, D, rngs=rngs)
        self.q_norm = RMSNorm(R, config.rms_norm_eps)
        self.wq_b = Linear(H * d, R, rngs=rngs)
        self.wkv = Linear(d, D, rngs=rngs)
        self.kv_norm = RMSNorm(d, config.rms_norm_eps)
        self.sink = nnx.Param(jnp.zeros((H,), jnp.float32))
        self.wo_a = Linear(G * O, H // G * d, rngs=rngs)
        self.wo_b = Linear(D, G * O, rngs=rngs)
        self.freqs = tuple(rope_frequencies(config, ratio).tolist())
        if ratio:
            self.compressor = Compressor(config, ratio, d, rngs=rngs)
        if ratio == 4:
            self.indexer = Indexer(config, cache_quant=cache_quant, rngs=rngs)

    def __call__(self, x: Array, step: Step, cache: LayerCache, tap: Tap) -> tuple[Array, LayerCache]:
        """x: [B, T, D], normed and collapsed → [B, T, D] and the cache with these tokens in it."""
        c = self.config
        B, T = x.shape[:2]
        H, d, G = c.num_attention_heads, c.head_dim, c.o_groups
        freqs, positions = jnp.asarray(self.freqs), step.positions.reshape(-1)
        flat_rows = lambda a, heads: a.reshape(B * T, heads, -1)  # noqa: E731
        # the indexer learns from `divergence` alone, which must not reach the model; a choice has no gradient
        together = T == 1 and not tap.wants("indexer.kl")
        raw, index_raw, products = self._products(x, together)
        q, _ = finish(flat_rows(raw, H), positions, freqs, eps=c.rms_norm_eps)
        q = tap("q", q.reshape(B, T, H, d))
        kv, cache = self._keys(products["wkv"], step, cache, freqs, tap)
        index_query = None
        if self.ratio:
            cache = self._compress(products["kv"], products["gate"], step, cache, tap)
        if self.ratio == 4:
            cache = self.indexer.update(products["index_kv"], products["index_gate"], step, cache)
            index_query = self.indexer.queries(index_raw, products["index_weights"], step)
        attend_all = self._decode if T == 1 else self._prefill
        o, window = attend_all(q, kv, index_query, step, cache, tap)
        o = tap("heads", o)
        grouped = value(self.wo_a.weight).reshape(G, c.o_lora_rank, H // G * d)
        low = quant.matmul(o.reshape(B, T, G, H // G * d), grouped)
        return self.wo_b(low.reshape(B, T, -1)), dataclasses.replace(cache, window=window)

    @property
    def _rounding(self) -> str | None:
        return "fp8" if self.cache_quant else None

    def _products(self, x: Array, together: bool) -> tuple[Array, Array | None, dict[str, Array]]:
        """Everything a layer multiplies x [B, T, D] with: queries [B, T, H·d] and the indexer's, see `_query_products`,
        and the rest by name. A single token's in several launches, what is waited for longest first."""
        exact = lambda linear: (linear, jnp.float32, True)  # noqa: E731
        query, keys = {"wq_a": (self.wq_a, x.dtype, False)}, {"wkv": (self.wkv, x.dtype, False)}
        weights, own = {}, {}
        if self.ratio:
            keys |= {"kv": exact(self.compressor.wkv), "gate": exact(self.compressor.wgate)}
        if self.ratio == 4:
            weights = {"index_weights": (self.indexer.weights_proj, jnp.float32, False)}
            compressor = self.indexer.compressor
            own = {"index_kv": exact(compressor.wkv), "index_gate": exact(compressor.wgate)}

        def multiply(of, group):
            linears, dtypes, precise = zip(*group.values(), strict=True)
            ys = quant.matmul_many(of, [value(w.weight) for w in linears], out_dtypes=dtypes, precise=precise)
            return dict(zip(group, ys, strict=True))

        if not together:
            out = multiply(x, query | keys) | (multiply(jax.lax.stop_gradient(x), own | weights) if own else {})
            return *self._query_products(out["wq_a"], together), out
        out = multiply(x, query | weights) | (multiply(x, own) if own else {})
        raw, index_raw = self._query_products(out["wq_a"], together)
        return raw, index_raw, out | multiply(x, keys)

    def _query_products(self, qr: Array, together: bool) -> tuple[Array, Array | None]:
        """qr [B, T, R], not yet normed, times wq_b, and times the indexer's."""
        weight, eps = value(self.q_norm.weight), self.q_norm.eps
        if self.ratio != 4 and together and quant.norms_on_load(qr, value(self.wq_b.weight)):
            return quant.matmul(qr, value(self.wq_b.weight), norm=(weight, eps)), None
        qr = finish(qr.reshape(-1, 1, qr.shape[-1]), weight=weight, eps=eps)[0].reshape(qr.shape)
        if self.ratio != 4:
            return self.wq_b(qr), None
        if not together:
            return self.wq_b(qr), self.indexer.wq_b(jax.lax.stop_gradient(qr))
        (index_raw,) = quant.matmul_many(qr, [value(self.indexer.wq_b.weight)])
        return self.wq_b(qr), index_raw

    def _keys(self, raw: Array, step: Step, cache: LayerCache, freqs: Array, tap: Tap) -> tuple[Array, LayerCache]:
        """The product with wkv [B, T, d] → the tokens' own keys [B, T, d], and the cache; a single token's
        key is in its window already."""
        B, T = raw.shape[:2]
        W, store, rows = self.config.sliding_window, None, None
        if T == 1:  # a ring; idle slots write nothing
            store = cache.window
            rows = rows_to_write(store, jax.lax.rem(step.start, W)[:, None], (step.n_valid > 0)[:, None])[:, 0]
        own, window = finish(
            raw.reshape(B * T, 1, -1), step.positions.reshape(-1), freqs, weight=value(self.kv_norm.weight),
            eps=self.kv_norm.eps, rounding=self._rounding, store=None if store is None else flat(store), rows=rows,
        )  # fmt: skip
        own = own.reshape(B, T, -1)
        kv = tap("kv", own)
        if T > 1:
            return kv, cache
        if kv is not own:  # an edit: what was written does not count
            window = window.at[jnp.where(rows < 0, len(window), rows)].set(kv[:, 0].astype(window.dtype), mode="drop")
        return kv, dataclasses.replace(cache, window=unflat(store, window))

    def _compress(self, kv: Array, gate: Array, step: Step, cache: LayerCache, tap: Tap) -> LayerCache:
        raw, index, done, state = self.compressor(kv, gate, step, cache.compressor)
        own, stored = write_raw(
            self.compressor, cache.entries, raw, index, done, jnp.asarray(self.freqs), self._rounding
        )  # fmt: skip
        entries = tap("entries", own)
        if entries is not own:  # an edit: what was written does not count
            stored = write_entries(stored, entries, index, done)
        return dataclasses.replace(cache, entries=stored, compressor=state)

    def _selected(self, positions: Array, index_query, cache: LayerCache, tap: Tap) -> tuple[list, dict[str, Array]]:
        """The compressed keys that queries at `positions` [B, Q] see, as `attend` takes them, and how they were chosen.

        The second result holds the sites "indexer.scores" and "indexer.topk", and "scores", those of the keys returned.
        """
        if not self.ratio:
            return [], {}
        B, Q = positions.shape
        N = cache.entries.shape[1]
        visible = _visible(positions, N, self.ratio)
        if self.ratio != 4:
            return [(everything(cache.entries), visible)], {}
        scores = index_scores(*index_query, everything(cache.index_keys))
        ordered = positions.shape[1] == 1 or tap.wants("indexer.topk")  # one token has a kernel for all of this
        topk = select_entries(scores, visible, self.config.index_topk, ordered=ordered)
        seen = {"indexer.scores": jnp.where(visible, scores, -jnp.inf), "indexer.topk": topk, "scores": scores}
        if Q > 1 and N <= dense_limit(self.config):  # reading all and masking costs less than gathering a set per query
            row = jnp.where(topk < 0, N, topk)
            chosen = jax.vmap(jax.vmap(lambda r: jnp.zeros((N,), bool).at[r].set(True, mode="drop")))(row)
            return [(everything(cache.entries), chosen)], seen
        seen["scores"] = jnp.take_along_axis(scores, jnp.maximum(topk, 0), axis=-1)
        return [(pick(cache.entries, topk), topk >= 0)], seen  # [B, Q, K, d]

    def _floats_per_query(self, size: int, cache: LayerCache) -> int:
        """About how many float32 a query of a block of `size` needs at once: the attention's, or the indexer's."""
        c = self.config
        near = c.num_attention_heads * (size + c.sliding_window)
        if not self.ratio:
            return near
        B, N = cache.entries.shape[:2]
        if self.ratio != 4:
            return near + c.num_attention_heads * N
        if N <= dense_limit(self.config):
            far = c.num_attention_heads * N
        else:
            far = c.index_topk * (c.num_attention_heads + c.head_dim)
        tile = min(N, max(512, SCORE_BYTES // (4 * B * size * c.index_n_heads)))  # as in `index_scores`
        return max(near + far, 4 * N + c.index_n_heads * tile)  # scores, masked scores, and what top-k sorts

    def _decode(self, q, kv, index_query, step, cache, tap):
        """One token a slot: read the ring, in which it is already, as it lies."""
        W, window = self.config.sliding_window, cache.window
        age = jax.lax.rem(step.start[:, None] + W - jnp.arange(W, dtype=jnp.int32), W)  # of each ring slot, in tokens
        in_window = (age <= step.start[:, None])[:, None]
        selected, seen = self._selected(step.positions, index_query, cache, tap)
        sink = value(self.sink)
        if not any(tap.wants(name) for name in ("pattern", "pattern_entries", "indexer.kl")):
            shown = seen.get("indexer.topk") if any(map(tap.wants, ("indexer.scores", "indexer.topk"))) else None
            rows = lambda: self._rows(step, cache, index_query, shown)  # noqa: E731
            stored, pattern = cache.entries if self.ratio else None, None
            cos_sin = angles(step.start, jnp.asarray(self.freqs))
            o = decode_attend(q[:, 0], window, in_window[:, 0], selected, stored, rows, sink, *cos_sin)[:, None]
        else:
            o, pattern = attend(q, [(window.astype(q.dtype), in_window), *selected], sink)
            o = rotate(o, step.positions, jnp.asarray(self.freqs), inverse=True)
        back = lambda: age[:, None]  # noqa: E731  ring slot i has age start - i, so age j lies in slot start - j
        for name, array in self._sites(tap, selected, seen, pattern, back).items():
            tap(name, array)
        return o, window

    def _rows(self, step: Step, cache: LayerCache, index_query, chosen: Array | None) -> Array | None:
        """The entries that the newest tokens read, by their rows in `flat(cache.entries)`: [B, K], -1 for none.

        chosen: [B, 1, K], the indexer's choice if it has been made where somebody sees it."""
        if not self.ratio:
            return None
        if self.ratio == 4 and chosen is not None:
            index = chosen[:, 0]
        elif self.ratio == 4:
            (q, w), finished = index_query, jax.lax.div(step.start + 1, self.ratio)
            index = choose_entries(q[:, 0], w[:, 0], cache.index_keys, finished, self.config.index_topk)
        else:
            number = jnp.arange(cache.entries.shape[1], dtype=jnp.int32)
            index = jnp.where(number < jax.lax.div(step.positions + 1, self.ratio), number, -1)
        return jnp.where(index < 0, -1, rows_of(cache.entries, jnp.maximum(index, 0)))

    def _prefill(self, q, kv, index_query, step, cache, tap):
        """Many tokens a slot."""
        W, freqs = self.config.sliding_window, jnp.asarray(self.freqs)
        start, n_valid = step.start, step.n_valid
        # earlier keys in order of position: start - W … start - 1
        order = jax.lax.rem(start[:, None] + jnp.arange(W, dtype=jnp.int32), W)
        before = jnp.take_along_axis(cache.window, order[..., None], axis=1).astype(kv.dtype)
        keys = jnp.concatenate([before, kv], axis=1)  # [B, W + T, d], index i at position start - W + i
        if self.ratio:  # pages are put together once for all
            keys_of_entries = None if cache.index_keys is None else everything(cache.index_keys)
            cache = dataclasses.replace(cache, entries=everything(cache.entries), index_keys=keys_of_entries)

        def pallas():
            if any(map(tap.wants, ("pattern", "pattern_entries", "indexer.scores", "indexer.topk", "indexer.kl"))):
                raise NotImplementedError("somebody looks at what is inside attention")
            kernels.require_many(q)
            rows, K = None, self.config.index_topk
            if self.ratio == 4 and cache.entries.shape[1] > K:
                rows = choose_entries_many(*index_query, cache.index_keys, start, K, self.ratio)
            entries = cache.entries if self.ratio else None
            cos_sin = angles(step.positions, freqs)
            sink = value(self.sink)
            return api.once(_attend_many_kernel, q, keys, start, entries, rows, sink, *cos_sin, self.ratio), {}

        def plain():
            o, sites = self._in_blocks(q, keys, index_query, start, cache, tap)
            return rotate(o, step.positions, freqs, inverse=True), sites

        o, sites = api.run("attention.prefill", {"pallas": pallas, "xla": plain}, None)
        for name, array in sites.items():
            tap(name, array)
        # ring slot i takes the newest position ≡ i (mod W); older ones were overwritten
        last = start + n_valid - 1
        newest = last[:, None] - jax.lax.rem(last[:, None] + W - jnp.arange(W, dtype=jnp.int32), W)
        window = jnp.take_along_axis(keys, (newest - start[:, None] + W)[..., None], axis=1)
        return o, window.astype(cache.window.dtype)

    def _in_blocks(self, q, keys, index_query, start, cache, tap):
        """Blocks of queries in plain JAX: each sees W earlier keys, its own, and its entries."""
        W = self.config.sliding_window
        B, T, H, d = q.shape
        size = min(QUERY_BLOCK, T)
        blocks = -(-T // size)
        pad = blocks * size - T
        padded = lambda a, n: jnp.pad(a, [(0, 0), (0, n)] + [(0, 0)] * (a.ndim - 2))  # noqa: E731
        keys_padded = padded(keys, pad)
        queries = jax.tree.map(lambda a: padded(a, pad), (q, index_query))
        sink = value(self.sink)

        def block(i):
            at = i * size
            cut = lambda a: jax.lax.dynamic_slice_in_dim(a, at, size, axis=1)  # noqa: E731
            q_block, index_block = jax.tree.map(cut, queries)
            positions = start[:, None] + at + jnp.arange(size, dtype=jnp.int32)
            selected, seen = self._selected(positions, index_block, cache, tap)
            o, pattern = attend(q_block, [_near(keys_padded, start, at, size, W), *selected], sink)
            # of query i, the key j tokens back
            back = lambda: W + jnp.arange(size)[None, :, None] - jnp.arange(W)[None, None]  # noqa: E731
            return o, self._sites(tap, selected, seen, pattern, back)

        group = max(1, min(blocks, SCORE_BYTES // (4 * B * size * self._floats_per_query(size, cache))))
        while blocks % group:  # whole groups, so that one program serves all
            group -= 1
        if blocks == 1:
            results = jax.tree.map(lambda a: a[None], block(0))
        else:
            results = _map(block, blocks, group, q)
        join = lambda a: jnp.moveaxis(a, 0, 1).reshape(B, blocks * size, *a.shape[3:])[:, :T]  # noqa: E731
        return jax.tree.map(join, results)

    @staticmethod
    def _sites(tap: Tap, selected: list, seen: dict[str, Array], pattern: Array, back) -> dict[str, Array]:
        """Those of the read-only sites that `tap` wants; blocks of queries return them, so that they can be joined.

        pattern [B, Q, H, n]: as `attend` gives it, its first keys being the window's; back() [1 or B, 1 or Q, W]:
        which of them is the key j tokens back.
        """
        sites = {name: seen[name] for name in ("indexer.scores", "indexer.topk") if name in seen and tap.wants(name)}
        if tap.wants("pattern"):
            sites["pattern"] = jnp.take_along_axis(pattern, back()[:, :, None], axis=-1)
        if selected and tap.wants("pattern_entries"):
            keys, mask = selected[0]
            of_entries = pattern[..., -mask.shape[-1] :]
            if keys.ndim == 4:  # a gathered set for each query: put each probability in its entry's place
                N = seen["indexer.scores"].shape[-1]
                number = jnp.where(mask, seen["indexer.topk"], N)
                put = lambda p, i: jnp.zeros((p.shape[0], N), p.dtype).at[:, i].set(p, mode="drop")  # noqa: E731
                of_entries = jax.vmap(jax.vmap(put))(of_entries, number)
            sites["pattern_entries"] = of_entries
        if "scores" in seen and tap.wants("indexer.kl"):
            mask = selected[0][1]
            sites["indexer.kl"] = divergence(pattern[..., -mask.shape[-1] :], seen["scores"], mask)
        return sites
