"""How much memory a model and its cache take, and what fits."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from ds4jax.errors import DS4Error
from ds4jax.model import Config, cache_nbytes
from ds4jax.model.attention import QUERY_BLOCK, SCORE_BYTES, dense_limit
from ds4jax.quant.experts import DENSE_MAX, DENSE_RATIO
from ds4jax.quant.matmul import tile_size
from ds4jax.runtime.programs import chunk_length


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes of weights, cache and workspace for `slots` sequences of `context` tokens."""

    weights: int
    cache: int
    workspace: int
    slots: int
    context: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.workspace


def plan(config: Config, weights: int, *, slots: int, context: int, dtype) -> Plan:
    sizes = dict(slots=slots, context=context, dtype=dtype)
    return Plan(weights, cache_nbytes(config, slots, context, dtype), workspace(config, **sizes), slots, context)


def workspace(config: Config, *, slots: int, context: int, dtype) -> int:
    """About how many bytes a pass needs beside weights and cache: for the longest chunk of prefill, or for decode.

    Counted is what is alive at once in a layer. XLA's own figure for prefill was 0.75 to 1.1 of it, for nano and for
    layers of Flash's sizes, chunks of 2,048 and 8,192 tokens (float32, on a CPU).
    """
    c = config
    H, E, F, k = c.num_attention_heads, c.n_routed_experts, c.moe_intermediate_size, c.num_experts_per_tok
    together = chunk_length(context, slots)
    tokens = max(chunk_length(context), slots * together)  # of one slot, or of all of them
    streams = 3 * 4 * c.hc_mult * c.hidden_size  # before, mixed and after, in float32
    heads = 3 * jnp.dtype(dtype).itemsize * H * c.head_dim
    is_dense = E <= DENSE_RATIO * k and tokens * E * F <= DENSE_MAX
    experts = 4 * (3 * E * F if is_dense else k * F + 2 * c.hidden_size)
    query = 4 * _floats_per_query(c, context)
    scores = max(min(SCORE_BYTES, tokens * query), slots * min(QUERY_BLOCK, together) * query)
    logits = 4 * 4 * slots * c.vocab_size  # with their copies for sampling
    tile = jnp.dtype(dtype).itemsize * min(tile_size(dtype), c.hidden_size * max(c.vocab_size, F))
    return max(tokens * (streams + heads + experts) + scores, logits) + tile


def _floats_per_query(c: Config, context: int) -> int:
    """Scores that a token has at once at the layer with the most: of attention, or of the indexer."""
    H, ratios = c.num_attention_heads, c.compress_ratios[: c.num_hidden_layers]
    most = near = H * (QUERY_BLOCK + c.sliding_window)
    if 128 in ratios:
        most = near + H * context // 128
    if 4 in ratios:
        N = context // 4
        read = min(N * H, c.index_topk * (H + c.head_dim)) if N > dense_limit(c) else N * H
        most = max(most, near + read, 4 * N + c.index_n_heads * min(N, 8192))
    return most


def check_fits(config: Config, weights: int, memory: int | None, *, slots: int, context: int, dtype) -> Plan:
    """The plan, if it fits `memory` bytes (None: unknown, always fits).

    Raises:
      DS4Error: says how much is needed and the largest context that fits.
    """
    needed = plan(config, weights, slots=slots, context=context, dtype=dtype)
    if memory is None or needed.total <= memory:
        return needed
    gib = lambda n: f"{n / 2**30:.1f} GiB"  # noqa: E731
    parts = f"{gib(weights)} weights, {gib(needed.cache)} cache, {gib(needed.workspace)} workspace"
    head = f"context {context} needs {gib(needed.total)} ({parts})"
    fits = largest_context(config, weights, memory, slots=slots, limit=context, dtype=dtype)
    remedy = f"context={fits} would fit" if fits else "not even the weights fit: use a smaller file or a larger device"
    raise DS4Error(f"{head} and the device has {gib(memory)}: {remedy}")


def largest_context(config: Config, weights: int, memory: int, *, slots: int, limit: int, dtype) -> int:
    """The largest context up to `limit` that fits, in steps of 128 tokens; 0 if none does."""
    low, high = 0, limit // 128
    while low < high:
        middle = (low + high + 1) // 2
        if plan(config, weights, slots=slots, context=128 * middle, dtype=dtype).total <= memory:
            low = middle
        else:
            high = middle - 1
    return 128 * low


def most_slots(config: Config, weights: int, memory: int | None, *, wanted: int, context: int, dtype) -> int:
    """How many of `wanted` slots of `context` tokens fit beside the weights; at least 1."""
    if memory is None:
        return wanted
    one = cache_nbytes(config, 1, context, dtype)
    work = workspace(config, slots=wanted, context=context, dtype=dtype)
    return max(1, min(wanted, (memory - weights - work) // max(1, one)))
