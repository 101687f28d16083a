"""The choice of experts in one launch: scores, the k best, their weights. XLA sorts all of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ds4jax.pallas import lowering as lo

Array = jax.Array

MAX_ROWS = 4096


def choose(logits: Array, bias: Array, k: int, normalize: bool, factor: float) -> tuple[Array, Array, Array]:
    """As `model.moe.choose`: logits [N, E] → probs [N, E], experts and weights [N, k]. NotImplementedError where no
    kernel serves the call."""
    lo.require_device()
    N, E = logits.shape
    if not 1 <= N <= MAX_ROWS:
        raise NotImplementedError(f"{N} rows; this kernel takes 1 to {MAX_ROWS}")
    if E & (E - 1) or not k <= E <= 1024:
        raise NotImplementedError(f"{E} experts are no power of two of at most 1024")

    def kernel(logits_ref, bias_ref, probs_ref, experts_ref, weights_ref):
        n = pl.program_id(0)
        e = jnp.arange(E, dtype=jnp.int32)
        x, bias = lo.load(logits_ref, (n, e)), lo.load(bias_ref, (e,))  # both before anything is stored
        probs = jnp.sqrt(jnp.maximum(x, 0) + lax.log1p(jnp.exp(-jnp.abs(x))))
        lo.store(probs_ref, (n, e), probs)
        # as whole numbers in the same order: a warp has one instruction for their largest
        score, own = lo.in_order(probs + bias), lax.bitcast_convert_type(probs, jnp.int32)
        chosen, weights = [], []
        for _ in range(k):
            i = jnp.min(jnp.where(score == jnp.max(score), e, E))
            chosen.append(i)
            weights.append(lax.bitcast_convert_type(jnp.max(jnp.where(e == i, own, 0)), jnp.float32))
            score = jnp.where(e == i, jnp.int32(lo.LEAST), score)
        total = sum(weights) if normalize else 1.0
        for j, (i, w) in enumerate(zip(chosen, weights, strict=True)):
            experts_ref[n, j] = i
            weights_ref[n, j] = w / total * factor

    shapes = [((N, E), jnp.float32), ((N, k), jnp.int32), ((N, k), jnp.float32)]
    return lo.call(
        kernel, [jax.ShapeDtypeStruct(*s) for s in shapes], logits, bias, grid=(N,),
        tuning=lo.Tuning(warps=1, stages=1), name="router",
    )  # fmt: skip
