"""What is done to queries, keys and heads beside their products: norm, rotary embedding, the rounding of the cache, and
the write into it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from ds4jax.model.layers import angles, rms, scaled_rms, simulate_fp4, simulate_fp8, turn
from ds4jax.pallas import heads as kernels
from ds4jax.quant import api

Array = jax.Array


def finish(
    raw: Array, positions: Array | None = None, freqs: Array | None = None, *, weight: Array | None = None,
    eps: float | None = None, inverse: bool = False, rounding: str | None = None, dtype=None,
    store: Array | None = None, rows: Array | None = None, implementation: str | None = None,
) -> tuple[Array, Array | None]:  # fmt: skip
    """Norm, turn, round and store.

    Args:
      raw: [N, H, d].
      positions, freqs: int32 [N] and [r/2]: turn the last r channels by position · freqs (`inverse`: back), or not.
      weight, eps: `weight · rms(raw)` first, rounded to raw's dtype; no norm without eps, no weight where it is None.
      rounding: simulate how the cache stores it, "fp8" (all but the turned channels) or "fp4".
      dtype: of the result, raw's by default; "fp8" rounds what has been rounded to it.
      store, rows: also write head 0 of row n to `store` [M, d] at `rows[n]`; a negative one is written nowhere.

    Returns:
      [N, H, d] of `dtype`, and `store` as it is then.
    """
    dtype = jnp.dtype(dtype or raw.dtype)
    cos, sin = (None, None) if freqs is None else angles(positions, freqs)
    rules = (eps, inverse, rounding, dtype)
    return api.run("heads.finish", IMPLEMENTATIONS, implementation, raw, cos, sin, weight, store, rows, rules)


def _plain(raw, cos, sin, weight, store, rows, rules):
    eps, inverse, rounding, dtype = rules
    x = raw
    if eps is not None:
        x = rms(x, eps).astype(raw.dtype) if weight is None else scaled_rms(x, weight, eps)
    if cos is not None:
        x = turn(x, cos[:, None], sin[:, None], inverse=inverse)
    if rounding == "fp8":
        x = simulate_fp8(x.astype(dtype), 0 if cos is None else 2 * cos.shape[-1])
    elif rounding == "fp4":
        x = simulate_fp4(x)
    x = x.astype(dtype)
    if store is not None:
        store = store.at[jnp.where(rows < 0, len(store), rows)].set(x[:, 0].astype(store.dtype), mode="drop")
    return x, store


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _kernel(raw, cos, sin, weight, store, rows, rules):
    eps, inverse, rounding, dtype = rules
    return kernels.finish(
        raw, cos, sin, weight, store, rows, eps=eps, inverse=inverse, rounding=rounding, dtype=dtype
    )  # fmt: skip


def _kernel_bwd(rules, args, g):
    return jax.vjp(lambda *a: _plain(*a, rules), *args)[1](g)


_kernel.defvjp(lambda *args: (_kernel(*args), args[:6]), _kernel_bwd)

IMPLEMENTATIONS = {"pallas": _kernel, "xla": _plain}
