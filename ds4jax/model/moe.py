"""Mixture of experts: k routed experts per token and a shared one."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from ds4jax import quant
from ds4jax.model.config import Config
from ds4jax.model.layers import Linear, normal, value
from ds4jax.model.sites import Tap
from ds4jax.pallas import router as kernels
from ds4jax.quant import api

Array = jax.Array


def choose(
    logits: Array, bias: Array, k: int, normalize: bool, factor: float, implementation: str | None = None
) -> tuple[Array, Array, Array]:
    """Each token's scores √softplus(logits) [N, E], the k experts whose score plus `bias` [E] is highest, int32 [N, k],
    and their weights [N, k]: their scores, divided by the sum if `normalize`, times `factor`. float32."""
    return api.run("router", IMPLEMENTATIONS, implementation, logits, bias, k, normalize, factor)


def _probs(logits: Array) -> Array:
    return jnp.sqrt(jax.nn.softplus(logits))


def _best(probs: Array, bias: Array, k: int) -> Array:
    return jax.lax.top_k(jax.lax.stop_gradient(probs + bias), k)[1].astype(jnp.int32)


def _weights(probs: Array, experts: Array, normalize: bool, factor: float) -> Array:
    weights = jnp.take_along_axis(probs, experts, axis=-1)
    if normalize:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return weights * factor


def _choose(logits, bias, k, normalize, factor):
    probs = _probs(logits)
    experts = _best(probs, bias, k)
    return probs, experts, _weights(probs, experts, normalize, factor)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _kernel(logits, bias, k, normalize, factor):
    return kernels.choose(logits, bias, k, normalize, factor)


def _kernel_bwd(k, normalize, factor, args, g):
    return jax.vjp(lambda *a: _choose(*a, k, normalize, factor), *args)[1](g)


_kernel.defvjp(lambda *args: (_kernel(*args), args[:2]), _kernel_bwd)

IMPLEMENTATIONS = {"pallas": _kernel, "xla": _choose}


class Router(nnx.Module):
    """Chooses experts: by score plus bias, or in the first layers by token id.

    weight: [E, D]; bias: [E], only used to choose; or tid2eid: [V, k] int32.
    """

    def __init__(self, config: Config, hashed: bool, *, rngs: nnx.Rngs):
        self.config, self.hashed = config, hashed
        E, k = config.n_routed_experts, config.num_experts_per_tok
        self.weight = normal(rngs, (E, config.hidden_size), config.hidden_size**-0.5)
        if hashed:  # k different experts per token id, spread evenly
            ids = jax.random.randint(rngs.params(), (config.vocab_size, 1), 0, E)
            stride = max(1, E // k)
            self.tid2eid = nnx.Variable((ids + stride * jnp.arange(k)) % E)
        else:
            self.bias = nnx.Param(jnp.zeros((E,), jnp.float32))

    def __call__(self, x: Array, tokens: Array, tap: Tap) -> tuple[Array, Array]:
        """x [N, D], tokens [N] → experts [N, k] int32 and their weights [N, k] float32."""
        c = self.config
        rules = (c.norm_topk_prob, c.routed_scaling_factor)
        (logits,) = quant.matmul_many(x, [value(self.weight)], out_dtypes=[jnp.float32], precise=[True])
        if self.hashed:
            probs = tap("probs", _probs(logits))
            best, weights = value(self.tid2eid)[tokens], None
        else:
            bias = jax.lax.stop_gradient(value(self.bias).astype(jnp.float32))
            plain, best, weights = choose(logits, bias, c.num_experts_per_tok, *rules)
            probs = tap("probs", plain)
            if probs is not plain:  # an edit of the scores: what was chosen by the others does not count
                best, weights = _best(probs, bias, c.num_experts_per_tok), None
        experts = tap("experts", best.astype(jnp.int32))
        if weights is None or experts is not best:
            weights = _weights(probs, experts, *rules)
        return experts, tap("weights", weights)


class Experts(nnx.Module):
    """The routed experts' stacked weights: w1 (gate) and w3 (up) [E, F, D], w2 (down) [E, D, F]."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        E, F, D = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.w1, self.w3 = (normal(rngs, (E, F, D), D**-0.5) for _ in range(2))
        self.w2 = normal(rngs, (E, D, F), F**-0.5)
        self.limit = config.swiglu_limit

    def __call__(self, x: Array, experts: Array, weights: Array) -> Array:  # [N, D] → [N, D]
        h = quant.expert_swiglu(x, value(self.w1), value(self.w3), experts, weights, self.limit)
        return quant.expert_down(h, value(self.w2), experts)


class SharedExpert(nnx.Module):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        F, D = config.moe_intermediate_size, config.hidden_size
        self.w1, self.w3, self.w2 = (Linear(*shape, rngs=rngs) for shape in ((F, D), (F, D), (D, F)))
        self.limit = config.swiglu_limit

    def __call__(self, x: Array) -> Array:  # [N, D] → [N, D]
        return self.w2(quant.swiglu(x, value(self.w1.weight), value(self.w3.weight), self.limit))


class MoE(nnx.Module):
    def __init__(self, config: Config, hashed: bool, *, rngs: nnx.Rngs):
        self.gate = Router(config, hashed, rngs=rngs)
        self.experts = Experts(config, rngs=rngs)
        self.shared_experts = SharedExpert(config, rngs=rngs)

    def __call__(self, x: Array, tokens: Array, tap: Tap) -> Array:
        """x [B, T, D], tokens [B, T] → [B, T, D]."""
        B, T, D = x.shape

        def per_token(name: str, a: Array) -> Array:  # sites are shaped [B, T, …]
            shaped = a.reshape(B, T, -1)
            seen = tap(name, shaped)
            return a if seen is shaped else seen.reshape(B * T, -1)

        flat = x.reshape(B * T, D)
        experts, weights = self.gate(flat, tokens.reshape(-1), lambda name, a: per_token(f"router.{name}", a))
        routed = per_token("routed_out", self.experts(flat, experts, weights))
        shared = per_token("shared_out", self.shared_experts(flat))
        return (routed.astype(jnp.float32) + shared.astype(jnp.float32)).astype(x.dtype).reshape(B, T, D)
