"""Choosing the next token, on the device, for a batch of slots that each have their own rules."""

from __future__ import annotations

import dataclasses
import math
import numbers

import jax
import jax.numpy as jnp

from ds4jax.errors import DS4Error

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    The logits are divided by `temperature`; then only tokens survive that are among the `top_k` likeliest (0: all),
    within the smallest set whose probability reaches `top_p`, and at least `min_p` times as likely as the likeliest.
    Temperature 0 takes the likeliest token. The same seed gives the same choices for a prompt whatever else runs.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.05
    seed: int = 0

    @property
    def restricted(self) -> bool:
        """Whether it has a top_k or top_p."""
        return self.top_k > 0 or self.top_p < 1

    def __post_init__(self):
        for name, ok, rule in (
            ("temperature", lambda t: 0 <= t < math.inf, "a number, at least 0"),
            ("top_k", lambda k: 0 <= k < math.inf and int(k) == k, "a whole number, 0 for all"),
            ("top_p", lambda p: 0 < p <= 1, "a number above 0 and at most 1"),
            ("min_p", lambda p: 0 <= p <= 1, "a number from 0 to 1"),
            ("seed", lambda s: 0 <= s < 2**32 and int(s) == s, f"a whole number from 0 to {2**32 - 1}"),
        ):
            value = getattr(self, name)
            # NaN fails every comparison and is refused too
            if isinstance(value, bool) or not isinstance(value, numbers.Real) or not ok(value):
                raise DS4Error(f"{name} {value!r}: must be {rule}")


def _kth_largest_bits(keys: Array, enough) -> Array:
    """The largest int32 threshold t for which `enough(keys >= t)`, by bisection over its bits; per row of [B, V]."""

    def halve(i, low):
        # from the least int32 upwards, adding bits in two's complement: 2^31 wraps the minimum to 0
        trial = low + (jnp.int32(1) << (31 - i))
        return jnp.where(enough(keys >= trial[:, None]), trial, low)

    return jax.lax.fori_loop(0, 32, halve, jnp.full(keys.shape[:1], jnp.iinfo(jnp.int32).min, jnp.int32))


def _ordered_bits(x: Array) -> Array:
    """int32 that order as the float32 `x` do."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(x == 0, 0, jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits))  # both zeros are one


def keep_mask(scaled: Array, top_k: Array, top_p: Array, min_p: Array, restricted: bool = True) -> Array:
    """Which tokens survive: scaled logits [B, V], rules [B] → bool [B, V]. Ties at a threshold are all kept.

    A token of logit -inf never survives. restricted: whether any row has a top_k or top_p.
    """
    peak = jnp.max(scaled, axis=-1, keepdims=True)
    keep = (scaled >= peak + jnp.log(min_p)[:, None]) & (scaled > -jnp.inf)
    return keep & _restricted(scaled, peak, top_k, top_p) if restricted else keep


def _restricted(scaled: Array, peak: Array, top_k: Array, top_p: Array) -> Array:
    """Which tokens top_k and top_p leave; both are found exactly and without sorting, by bisecting the threshold."""
    vocab = scaled.shape[-1]
    keys = _ordered_bits(scaled)
    k = jnp.where(top_k > 0, jnp.minimum(top_k, vocab), vocab)
    in_k = keys >= _kth_largest_bits(keys, lambda m: jnp.sum(m, axis=-1) >= k)[:, None]
    p = jnp.where(in_k, jnp.exp(scaled - peak), 0)  # as elsewhere, top_p applies to what top_k left
    goal = jnp.where(top_p < 1, top_p * jnp.sum(p, axis=-1), 0)
    nucleus = _kth_largest_bits(keys, lambda m: jnp.sum(jnp.where(m, p, 0), axis=-1) >= goal)
    return in_k & ((keys >= nucleus[:, None]) | (top_p >= 1)[:, None])


def sample(
    logits: Array, temperature: Array, top_k: Array, top_p: Array, min_p: Array, seed: Array, count: Array,
    usable: Array | None = None, restricted: bool = True,
) -> tuple[Array, Array]:  # fmt: skip
    """Choose one token per slot.

    Args:
      logits: float32 [B, V].
      temperature, top_k, top_p, min_p: [B], see `Sampling`.
      seed: uint32 [B]; count: int32 [B], how many tokens the slot has chosen before: together they fix the draw.
      usable: bool [V], the tokens that may be chosen; default: all.
      restricted: False leaves top_k and top_p out, which no slot may then have.

    Returns:
      tokens int32 [B] and their log-probabilities [B] under the model (temperature 1, nothing filtered or excluded),
      natural log.
    """
    allowed = logits if usable is None else jnp.where(usable, logits, -jnp.inf)
    peak = jnp.max(allowed, axis=-1, keepdims=True)
    # from the peak downwards, so that a tiny temperature cannot overflow upwards
    scaled = (allowed - peak) / jnp.where(temperature > 0, temperature, 1)[:, None]
    keep = keep_mask(scaled, top_k, top_p, min_p, restricted)
    keys = jax.vmap(lambda s, c: jax.random.fold_in(jax.random.PRNGKey(s), c))(seed, count)
    noise = jax.vmap(lambda k: jax.random.gumbel(k, logits.shape[1:], jnp.float32))(keys)
    drawn = jnp.argmax(jnp.where(keep, scaled + noise, -jnp.inf), axis=-1)
    token = jnp.where(temperature > 0, drawn, jnp.argmax(allowed, axis=-1)).astype(jnp.int32)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return token, chosen - jax.nn.logsumexp(logits, axis=-1)
