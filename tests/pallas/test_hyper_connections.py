"""The kernels of hyper-connections beside their plain form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ds4jax.model.hyper_connections import IMPLEMENTATIONS, enter, fold
from ds4jax.pallas import lowering

RULES = dict(iterations=20, hc_eps=1e-6, rms_eps=1e-6)


def inputs(B, T, D, dtype, fn_dtype=np.float16, spread=1.0, seed=0):
    rng = np.random.default_rng(seed)
    S, n = 4, 24
    streams = jnp.asarray(rng.normal(size=(B, T, S, D)) * spread, dtype)
    fn = jnp.asarray(rng.normal(size=(n, S * D)) * (S * D) ** -0.5, fn_dtype)
    base, scale = (jnp.asarray(rng.normal(size=m), jnp.float32) for m in (n, 3))
    return streams, fn, base, scale, jnp.asarray(1 + rng.normal(size=D) / 10, jnp.float32)


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 2e-6), (jnp.bfloat16, 1e-2)])
@pytest.mark.parametrize("B, T, D", [(1, 1, 64), (3, 1, 128), (2, 4, 256), (16, 1, 64), (19, 1, 1024), (3, 90, 64)])
def test_kernel_equals_plain(B, T, D, dtype, tolerance):
    args = inputs(B, T, D, dtype)
    with lowering.interpreted():
        ours = enter(*args, **RULES, implementation="pallas")
    for mine, plain, tol in zip(
        ours, enter(*args, **RULES, implementation="xla"), (tolerance, *3 * [3e-6]), strict=True
    ):
        assert mine.shape == plain.shape and mine.dtype == plain.dtype
        a, b = np.asarray(mine, np.float64), np.asarray(plain, np.float64)
        assert np.abs(a - b).max() <= tol * max(1, np.abs(b).max())


@pytest.mark.parametrize("B, dtype", [(1, jnp.bfloat16), (8, jnp.float32), (9, jnp.bfloat16)])
def test_streams_that_are_still_being_folded(B, dtype):
    old, *weights = inputs(B, 1, 128, dtype)
    rng = np.random.default_rng(1)
    y, post, comb = (jnp.asarray(rng.normal(size=(B, 1, *n)), jnp.float32) for n in ((128,), (4,), (4, 4)))
    before = old, y.astype(dtype), post, comb
    streams = fold(*before)
    with lowering.interpreted():
        ours = enter(streams, *weights, before, **RULES, implementation="pallas")
    for mine, plain in zip(ours, enter(streams, *weights, **RULES, implementation="xla"), strict=True):
        tolerance = 1e-2 if mine.dtype == jnp.bfloat16 else 2e-5
        np.testing.assert_allclose(np.float64(mine), np.float64(plain), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("T, atol", [(2, 1e-6), (257, 4e-6)])  # of many rows some sums nearly cancel
def test_extreme_streams(T, atol):
    for spread in (0.0, 1e-12, 1e12):
        args = inputs(1, T, 64, jnp.float32, np.float32, spread)
        with lowering.interpreted():
            ours = enter(*args, **RULES, implementation="pallas")
        for mine, plain in zip(ours, enter(*args, **RULES, implementation="xla"), strict=True):
            np.testing.assert_allclose(mine, plain, rtol=2e-5, atol=atol)


def test_gradients_are_those_of_the_plain_form():
    args = inputs(1, 2, 64, jnp.float32, np.float32)

    def loss(implementation):
        return lambda *a: sum(jnp.sum(jnp.sin(y)) for y in enter(*a, **RULES, implementation=implementation))

    with lowering.interpreted():
        ours = jax.grad(loss("pallas"), argnums=(0, 1, 2, 3, 4))(*args)
    for mine, plain in zip(ours, jax.grad(loss("xla"), argnums=(0, 1, 2, 3, 4))(*args), strict=True):
        np.testing.assert_allclose(mine, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("B, T, D", [(1, 1, 96), (1, 1, 32)])
def test_what_no_kernel_takes_is_left_to_xla(B, T, D):
    with lowering.interpreted(), pytest.raises(NotImplementedError):
        IMPLEMENTATIONS["pallas"](*inputs(B, T, D, jnp.float32), None, 20, 1e-6, 1e-6)


@pytest.mark.parametrize("rows", [1, 64, 2048])
def test_lowers_for_cuda(rows):
    args = inputs(rows, 1, 4096, jnp.bfloat16)
    text = lowering.lower_for_cuda(lambda *a: enter(*a, **RULES, implementation="pallas"), *args)
    assert ("hyper_mix" in text) == (rows <= 256) and "hyper_enter" in text
    fetched = rows == 1 and lowering.has_order()  # what the second launch of a few rows reads
    assert ("prefetch.global.L2" in text) == fetched
