"""Norm, rotary embedding, rounding and write in one kernel, beside the plain form; and the choice of experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ds4jax.model import heads, moe
from ds4jax.pallas import lowering

CASES = {
    "queries": dict(shape=(2, 3, 64), turned=32, eps=1e-6),
    "queries of many tokens": dict(shape=(64, 8, 64), turned=32, eps=1e-6),
    "two heads of many": dict(shape=(65, 6, 64), turned=16, eps=1e-6, weight=True, inverse=True),
    "three of many": dict(shape=(64, 3, 64), turned=32),
    "heads turned back": dict(shape=(3, 2, 64), turned=64, inverse=True),
    "norm alone": dict(shape=(1, 1, 256), eps=1e-6, weight=True),
    "window key": dict(shape=(4, 1, 128), turned=64, eps=1e-6, weight=True, rounding="fp8", store=True),
    "entry": dict(shape=(4, 1, 512), turned=64, eps=1e-6, weight=True, rounding="fp8", store=True, raw=jnp.float32),
    "index query": dict(shape=(2, 4, 128), turned=64, rounding="fp4"),
    "index key": dict(shape=(4, 1, 64), turned=32, eps=1e-6, weight=True, rounding="fp4", store=True, raw=jnp.float32),
}


def arguments(rng, shape, dtype, turned=0, weight=False, store=False, raw=None, spread=1.0, **rules):
    N, _, d = shape
    x = jnp.asarray(spread * rng.normal(size=shape), raw or dtype)
    kw = dict(rules, dtype=dtype)
    if turned:
        kw |= dict(positions=jnp.asarray(rng.integers(0, 10**6, N), jnp.int32))
        kw |= dict(freqs=jnp.asarray(10000.0 ** (-np.arange(turned // 2) / turned), jnp.float32))
    if weight:
        kw["weight"] = jnp.asarray(1 + rng.normal(size=d) / 10, jnp.float32)
    if store:
        kw["store"] = jnp.asarray(rng.normal(size=(9, d)), dtype)
        kw["rows"] = jnp.asarray([7, -1, 0, 8][:N], jnp.int32)
    return x, kw


def both(x, kw):
    with lowering.interpreted():
        ours = heads.finish(x, **kw, implementation="pallas")
    return ours, heads.finish(x, **kw, implementation="xla")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_plain_form(rng, case, dtype):
    x, kw = arguments(rng, dtype=dtype, **CASES[case])
    (ours, stored), (plain, plain_stored) = both(x, kw)
    assert ours.shape == plain.shape and ours.dtype == plain.dtype
    a, b = np.asarray(ours, np.float64), np.asarray(plain, np.float64)
    near = np.abs(a - b) <= (1e-5 if dtype == jnp.float32 else 8e-3) * np.abs(b).max()
    if kw.get("rounding"):  # sums in another order fall on the other side of a rounding now and then
        assert near.mean() >= 0.98
    else:
        assert near.all()
    if stored is not None:
        assert stored.dtype == plain_stored.dtype
        written, rows = np.asarray(stored, np.float64), np.asarray(kw["rows"])
        for n, row in enumerate(rows):
            if row >= 0:
                np.testing.assert_array_equal(written[row], a[n, 0])
        untouched = np.setdiff1d(np.arange(9), rows)
        np.testing.assert_array_equal(written[untouched], np.asarray(kw["store"], np.float64)[untouched])


@pytest.mark.parametrize("rounding", ["fp8", "fp4"])
def test_rounds_exactly_where_the_sums_are_exact(rng, rounding):
    """Small whole numbers, powers of two and the edges of scales: every sum is exact, so nothing may differ."""
    rows = [np.zeros(128), np.full(128, 448.0), np.full(128, 2.0**-30), rng.integers(-8, 9, 128)]
    rows.append(2.0 ** rng.integers(-9, 9, 128))
    for edge in (447.0, 448.0, 449.0, 6.0, 6.25, 5.75, 1.75 * 2**-9):
        rows.append(np.where(np.arange(128) == 5, edge, rng.integers(-3, 4, 128) / 4))
    x = jnp.asarray(np.stack(rows)[:, None], jnp.float32)
    (ours, _), (plain, _) = both(x, dict(rounding=rounding))
    np.testing.assert_array_equal(ours, plain)


@pytest.mark.parametrize("rounding", [None, "fp8", "fp4"])
def test_nan_stays(rounding):
    x = jnp.ones((2, 1, 64), jnp.float32).at[1, 0, 3].set(jnp.nan)
    (ours, _), _ = both(x, dict(rounding=rounding, eps=1e-6))
    assert np.isfinite(ours[0]).all() and np.isnan(ours[1, 0, 3])


def test_gradients_are_those_of_the_plain_form(rng):
    x, kw = arguments(rng, dtype=jnp.float32, **CASES["window key"])
    dynamic = {n: kw[n] for n in ("weight", "store")}

    def loss(implementation):
        def f(x, dynamic):
            y, stored = heads.finish(x, **(kw | dynamic), implementation=implementation)
            return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(stored))

        return jax.grad(f, argnums=(0, 1))

    with lowering.interpreted():
        ours = loss("pallas")(x, dynamic)
    for mine, plain in zip(jax.tree.leaves(ours), jax.tree.leaves(loss("xla")(x, dynamic)), strict=True):
        np.testing.assert_allclose(mine, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape, rounding", [((0, 1, 64), None), ((1, 1, 96), None), ((1, 1, 32), None)])
def test_what_no_kernel_takes_is_left_to_xla(shape, rounding):
    with lowering.interpreted(), pytest.raises(NotImplementedError):
        heads.IMPLEMENTATIONS["pallas"](
            jnp.ones(shape), None, None, None, None, None, (None, False, rounding, jnp.dtype(jnp.float32))
        )


@pytest.mark.parametrize("case", CASES)
def test_lowers_for_cuda(rng, case):
    x, kw = arguments(rng, dtype=jnp.bfloat16, **CASES[case])
    text = lowering.lower_for_cuda(lambda x: heads.finish(x, **kw, implementation="pallas"), x)
    assert "finish_" in text


# ---- router ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("N, E, k, normalize", [(1, 256, 6, True), (5, 16, 2, False), (3, 8, 8, True)])
def test_router_equals_top_k(rng, N, E, k, normalize):
    logits = jnp.asarray(3 * rng.normal(size=(N, E)), jnp.float32)
    bias = jnp.asarray(rng.normal(size=E) / 3, jnp.float32)
    with lowering.interpreted():
        probs, experts, weights = moe.choose(logits, bias, k, normalize, 1.5, implementation="pallas")
    plain = moe.choose(logits, bias, k, normalize, 1.5, implementation="xla")
    np.testing.assert_allclose(probs, plain[0], rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(experts, plain[1])
    np.testing.assert_allclose(weights, plain[2], rtol=1e-5)


def test_router_takes_the_first_of_equals_and_survives_nan():
    logits = jnp.asarray([[0.0] * 8, [5.0] * 8, [np.nan] * 8], jnp.float32)
    with lowering.interpreted():
        _, experts, _ = moe.choose(logits, jnp.zeros((8,)), 3, True, 1.0, implementation="pallas")
    np.testing.assert_array_equal(experts[:2], [[0, 1, 2]] * 2)
    assert ((np.asarray(experts) >= 0) & (np.asarray(experts) < 8)).all()


def test_router_gradients(rng):
    logits, bias = jnp.asarray(rng.normal(size=(2, 8)), jnp.float32), jnp.zeros((8,))

    def loss(implementation):
        return jax.grad(lambda x: jnp.sum(jnp.sin(moe.choose(x, bias, 2, True, 1.5, implementation)[2])))

    with lowering.interpreted():
        ours = loss("pallas")(logits)
    np.testing.assert_allclose(ours, loss("xla")(logits), rtol=1e-5, atol=1e-6)
    choose = lambda x: moe.choose(x, jnp.zeros((256,)), 6, True, 1.5, "pallas")  # noqa: E731
    text = lowering.lower_for_cuda(choose, jnp.ones((1, 256)))
    assert "router" in text
