"""Manifold-constrained hyper-connections (mHC): S residual streams around every sublayer.

A sublayer reads one weighted sum of the streams (`pre`), and its output is placed back on all of them (`post`) while
the streams mix among themselves by a doubly stochastic matrix (`comb`). All weights depend on the token; float32.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from ds4jax import quant
from ds4jax.model.config import Config
from ds4jax.model.layers import RMSNorm, normal, rms, scaled_rms, value
from ds4jax.pallas import hyper_connections as kernels
from ds4jax.quant import api

Array = jax.Array


def sinkhorn(logits: Array, iterations: int, eps: float) -> Array:
    """A doubly stochastic [..., S, S] from logits: softmax over the last axis, then alternate column and row sums."""
    c = jax.nn.softmax(logits, axis=-1) + eps
    c = c / (jnp.sum(c, axis=-2, keepdims=True) + eps)

    def normalize(_, c):
        c = c / (jnp.sum(c, axis=-1, keepdims=True) + eps)
        return c / (jnp.sum(c, axis=-2, keepdims=True) + eps)

    # unrolled, it would be most of the program's compile time
    return jax.lax.fori_loop(0, iterations - 1, normalize, c)


def _products(streams: Array, fn: Array) -> tuple[Array, Array]:
    """`fn @ flatten(X)` and mean(flatten(X)²): streams [..., S, D], fn [n, S·D] → float32 [..., n], [..., 1]."""
    flat = streams.reshape(*streams.shape[:-2], -1)
    (z,) = quant.matmul_many(flat, [fn], out_dtypes=[jnp.float32], precise=[True])
    return z, jnp.mean(jnp.square(flat.astype(jnp.float32)), axis=-1, keepdims=True)


def _mix_logits(streams: Array, fn, eps: float) -> Array:
    """`(fn @ flatten(X)) · rsqrt(mean(flatten(X)²) + eps)`: streams [..., S, D], fn [n, S·D] → float32 [..., n]."""
    if streams.dtype == jnp.float32:  # normed first, sums stay small
        return quant.matmul(rms(streams.reshape(*streams.shape[:-2], -1), eps), fn)
    z, square = _products(streams, fn)
    return z * jax.lax.rsqrt(square + eps)


def _enter(streams, fn, base, scale, weight, iterations, hc_eps, rms_eps):
    S = streams.shape[-2]
    z = _mix_logits(streams, fn, rms_eps)
    base, scale = base.astype(jnp.float32), scale.astype(jnp.float32)
    pre = jax.nn.sigmoid(z[..., :S] * scale[0] + base[:S]) + hc_eps
    post = 2 * jax.nn.sigmoid(z[..., S : 2 * S] * scale[1] + base[S : 2 * S])
    comb = (z[..., 2 * S :] * scale[2] + base[2 * S :]).reshape(*z.shape[:-1], S, S)
    x = scaled_rms(collapse(streams, pre), weight, rms_eps)
    return x, pre, post, sinkhorn(comb, iterations, hc_eps)


def _plain(streams, fn, base, scale, weight, before, *rules):
    del before
    return _enter(streams, fn, base, scale, weight, *rules)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _kernel(streams, fn, base, scale, weight, before, iterations, hc_eps, rms_eps):
    rules = dict(iterations=iterations, hc_eps=hc_eps, rms_eps=rms_eps)
    kernels.require(streams, fn)
    B, T, S, D = streams.shape
    if B * T <= kernels.MAX_ROWS:
        return kernels.enter(streams, fn, base, scale, weight, before, **rules)
    z, square = _products(streams.reshape(B * T, 1, S, D), fn)
    return kernels.finish(z, square.reshape(-1) * (S * D), streams, base, scale, weight, **rules)


def _kernel_bwd(iterations, hc_eps, rms_eps, args, g):
    *args, before = args
    gradients = jax.vjp(lambda *a: _enter(*a, iterations, hc_eps, rms_eps), *args)[1](g)
    return *gradients, jax.tree.map(jnp.zeros_like, before)  # the streams say it all


_kernel.defvjp(lambda *args: (_kernel(*args), args[:6]), _kernel_bwd)

IMPLEMENTATIONS = {"pallas": _kernel, "xla": _plain}


def enter(
    streams: Array, fn: Array, base: Array, scale: Array, weight: Array,
    before: tuple[Array, Array, Array, Array] | None = None, *, iterations: int, hc_eps: float, rms_eps: float,
    implementation: str | None = None,
) -> tuple[Array, Array, Array, Array]:  # fmt: skip
    """Streams [B, T, S, D] → a sublayer's input [B, T, D], pre, post [B, T, S], comb [B, T, S, S].

    fn [(2+S)·S, S·D], base [(2+S)·S], scale [3]: of a `HyperConnection`. weight [D]: of the norm after the collapse.
    before: what `fold` made the streams of, if it did: of a token or a few, a kernel then need not wait for them.
    """
    args = (streams, fn, base, scale, weight, before, iterations, hc_eps, rms_eps)
    return api.run("hyper_connections.enter", IMPLEMENTATIONS, implementation, *args)


class HyperConnection(nnx.Module):
    """The weights that collapse streams into a sublayer's input and fold its output back.

    fn: [(2+S)·S, S·D]; base: [(2+S)·S]; scale: [3], one each for pre, post and comb.
    """

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        S, D = config.hc_mult, config.hidden_size
        self.fn = normal(rngs, ((2 + S) * S, S * D), (S * D) ** -0.5)
        # starts near a plain residual: each stream feeds the sublayer alike and mostly keeps to itself
        eye = 2.0 * jnp.eye(S, dtype=jnp.float32).reshape(-1)
        self.base = nnx.Param(jnp.concatenate([jnp.zeros((2 * S,), jnp.float32), eye]))
        self.scale = nnx.Param(jnp.full((3,), 0.1, jnp.float32))
        self.S, self.iterations = S, config.hc_sinkhorn_iters
        self.hc_eps, self.rms_eps = config.hc_eps, config.rms_norm_eps

    def __call__(
        self, streams: Array, norm: RMSNorm, before: tuple[Array, Array, Array, Array] | None = None
    ) -> tuple[Array, Array, Array, Array]:
        """What a sublayer needs: streams [B, T, S, D] → its input x [B, T, D], collapsed and normed, and in float32
        pre [B, T, S], post [B, T, S], comb [B, T, S, S]. before: as for `enter`."""
        return enter(
            streams, value(self.fn), value(self.base), value(self.scale), value(norm.weight), before,
            iterations=self.iterations, hc_eps=self.hc_eps, rms_eps=self.rms_eps,
        )  # fmt: skip


class HyperHead(nnx.Module):
    """The last collapse, before the output norm. fn: [S, S·D]; base: [S]; scale: [1]."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        S, D = config.hc_mult, config.hidden_size
        self.fn = normal(rngs, (S, S * D), (S * D) ** -0.5)
        self.base = nnx.Param(jnp.zeros((S,), jnp.float32))
        self.scale = nnx.Param(jnp.full((1,), 0.1, jnp.float32))
        self.hc_eps, self.rms_eps = config.hc_eps, config.rms_norm_eps

    def __call__(self, streams: Array) -> Array:
        """streams [B, T, S, D] → pre [B, T, S], float32."""
        z = _mix_logits(streams, value(self.fn), self.rms_eps)
        return jax.nn.sigmoid(z * value(self.scale).astype(jnp.float32) + value(self.base)) + self.hc_eps


def collapse(streams: Array, pre: Array) -> Array:
    """Σ_s pre[s] · X[s]: [B, T, S, D], [B, T, S] → [B, T, D] in the streams' dtype."""
    return _weighted(streams, pre[..., None]).astype(streams.dtype)


def fold(streams: Array, y: Array, post: Array, comb: Array) -> Array:
    """X[j] ← post[j] · y + Σ_i comb[i, j] · X[i]; y: [B, T, D] → [B, T, S, D] in the streams' dtype."""
    mixed = _weighted(streams[..., None, :], comb[..., None])
    out = (post[..., None] * y.astype(jnp.float32)[..., None, :] + mixed).astype(streams.dtype)
    return out if out.dtype == jnp.float32 else _in_memory(out)


@jax.custom_jvp  # JAX releases before 0.5 have no derivative of a barrier
def _in_memory(x: Array) -> Array:
    """x, computed once and as it is: XLA would keep float32 sums beside what they round to, at twice the bytes."""
    return jax.lax.optimization_barrier(x)


_in_memory.defjvp(lambda primals, tangents: (_in_memory(*primals), *tangents))


def _weighted(streams: Array, weights: Array) -> Array:
    """Σ_s weights[:, :, s] · streams[:, :, s] in float32.

    S is 4: sums written out fuse with what stands around them, round in one order whatever the program around them, and
    stay in float32 on every device; a batched 4×4 product does none of that.
    """
    terms = [weights[:, :, s] * streams[:, :, s].astype(jnp.float32) for s in range(streams.shape[2])]
    return functools.reduce(jnp.add, terms)
