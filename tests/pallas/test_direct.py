"""Several weights times the same activations in one kernel, beside one product after another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ds4jax import quant
from ds4jax.errors import DS4Error
from ds4jax.pallas import direct, lowering
from tests.pallas.tensors import weight


def plain(rng, out, K, dtype):
    return jnp.asarray(rng.normal(size=(out, K)), dtype)


def weights(rng, K):
    return [
        weight(rng, "Q8_0", (37, K)), plain(rng, 24, K, jnp.float16), plain(rng, 1, K, jnp.float32),
        weight(rng, "Q8_0", (8, K)), plain(rng, 130, K, jnp.bfloat16),
    ]  # fmt: skip


def exact(x, w):
    values = np.asarray(quant.dequantize(w) if isinstance(w, quant.QuantizedArray) else w, np.float64)
    return np.asarray(x, np.float64) @ values.T


@pytest.mark.parametrize("K", [256, 512, 4096])
@pytest.mark.parametrize("rows, dtype", [(1, jnp.bfloat16), (2, jnp.bfloat16), (1, jnp.float32)])
def test_equals_float64(rng, K, rows, dtype):
    x, ws = jnp.asarray(rng.normal(size=(rows, K)), dtype), weights(rng, K)
    with lowering.interpreted():
        ys = quant.matmul_many(x, ws, out_dtypes=[jnp.float32] * len(ws), implementation="pallas")
    for y, w in zip(ys, ws, strict=True):
        want = exact(x, w)
        assert y.shape == want.shape
        np.testing.assert_allclose(y, want, atol=2e-6 * np.abs(want).max())


def test_results_have_the_dtypes_asked_for(rng):
    x, ws = jnp.asarray(rng.normal(size=(1, 1, 256)), jnp.bfloat16), weights(rng, 256)[:2]
    with lowering.interpreted():
        ours = quant.matmul_many(x, ws, out_dtypes=[jnp.bfloat16, jnp.float32], implementation="pallas")
    apart = quant.matmul_many(
        x, ws, out_dtypes=[jnp.bfloat16, jnp.float32], precise=[False, True], implementation="xla"
    )  # fmt: skip
    for mine, theirs in zip(ours, apart, strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        np.testing.assert_allclose(np.float32(mine), np.float32(theirs), rtol=1e-2, atol=1e-1)
    np.testing.assert_allclose(ours[1], apart[1], rtol=1e-5, atol=1e-4)


def test_a_stack_takes_each_groups_own_activations(rng):
    x, w = jnp.asarray(rng.normal(size=(2, 3, 512)), jnp.float32), weight(rng, "Q8_0", (3, 16, 512))
    with lowering.interpreted():
        (y,) = direct.products(x, [(w.parts, w.format)], [jnp.float32])
    want = np.einsum("ngk,gok->ngo", np.float64(x), np.float64(quant.dequantize(w)))
    np.testing.assert_allclose(y, want, atol=2e-6 * np.abs(want).max())


def test_nan_and_zero_rows(rng):
    x = jnp.asarray(np.stack([np.zeros(256), np.full(256, np.nan)]), jnp.float32)
    with lowering.interpreted():
        y, _ = quant.matmul_many(x, weights(rng, 256)[:2], implementation="pallas")
    assert (np.asarray(y[0]) == 0).all() and np.isnan(y[1]).all()


def test_gradients_are_those_of_the_plain_form(rng):
    x, (packed, half, *_) = jnp.asarray(rng.normal(size=(2, 256)), jnp.float32), weights(rng, 256)

    def loss(implementation):
        def f(x, w):
            ys = quant.matmul_many(x, [packed, w], precise=[True, True], implementation=implementation)
            return sum(jnp.sum(jnp.sin(y)) for y in ys)

        return jax.grad(f, argnums=(0, 1))(x, half.astype(jnp.float32))

    with lowering.interpreted():
        ours = loss("pallas")
    for mine, theirs in zip(ours, loss("xla"), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rows, K", [(3, 256), (1, 96), (1, 36)])
def test_what_no_kernel_takes_is_left_to_xla(rng, rows, K):
    w = plain(rng, 8, K, jnp.float16)
    with lowering.interpreted(), pytest.raises(NotImplementedError):
        direct.products(jnp.ones((rows, K)), [({"values": w}, None)], [jnp.float32])


def test_other_formats_and_shapes(rng):
    w = weight(rng, "Q4_K", (8, 256))
    with lowering.interpreted(), pytest.raises(NotImplementedError):
        direct.products(jnp.ones((1, 256)), [(w.parts, w.format)], [jnp.float32])
    with pytest.raises(DS4Error, match="must be"):
        quant.matmul_many(jnp.ones((1, 256)), [plain(rng, 8, 128, jnp.float32)])


def test_shared_expert(rng):
    x = jnp.asarray(3 * rng.normal(size=(1, 512)), jnp.float32)
    gate, up = (weight(rng, "Q8_0", (96, 512)) for _ in range(2))
    with lowering.interpreted():
        ours = quant.swiglu(x, gate, up, 10.0, implementation="pallas")
    g, u = exact(x, gate), exact(x, up)
    want = np.minimum(g, 10) / (1 + np.exp(-np.minimum(g, 10))) * np.clip(u, -10, 10)
    np.testing.assert_allclose(ours, want, atol=1e-5 * np.abs(want).max())
    np.testing.assert_allclose(quant.swiglu(x, gate, up, 10.0, implementation="xla"), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("N", [1, 2])
def test_lowers_for_cuda(N):
    shape = jax.ShapeDtypeStruct
    q8 = lambda out, K: {"codes": shape((out, K), jnp.int8), "d": shape((out, K // 32), jnp.uint16)}  # noqa: E731
    half = shape((1024, 4096), jnp.float16)

    def run(x, a, b, c):
        return direct.products(x, [(a, "Q8_0"), (b, "Q8_0"), ({"values": c}, None)], [jnp.bfloat16] * 3)

    args = shape((N, 4096), jnp.bfloat16), q8(1024, 4096), q8(512, 4096), half
    assert "direct_3" in lowering.lower_for_cuda(run, *args)


@pytest.mark.parametrize("rows, dtype", [(33, jnp.float16), (70, jnp.float16), (33, jnp.float32), (33, jnp.bfloat16)])
def test_precise_products_of_bfloat16_lose_nothing(rng, rows, dtype):
    """Tensor cores multiply bfloat16: a weight in pieces, whose products are exact."""
    x = jnp.asarray(rng.normal(size=(7, 640)), jnp.bfloat16)
    w = jnp.asarray(rng.normal(size=(rows, 640)) * 2.0 ** rng.integers(-12, 3, (rows, 640)), dtype)
    (y,) = jax.jit(lambda x, w: quant.matmul_many(x, [w], out_dtypes=[jnp.float32], precise=[True]))(x, w)
    want = exact(x, w)
    np.testing.assert_allclose(y, want, atol=3e-6 * np.abs(want).max())


@pytest.mark.parametrize("rows", [5, 65])  # few rows are cut in two, many take activations of float16
def test_precise_products_of_half_weights_keep_rows_apart(rows):
    """float16 holds a bfloat16 row of any size, once its exponent is taken out; NaN and infinity stay in their row."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(6, 256)) * np.array([1e30, 1e-30, 1, 0, 1, 1])[:, None]
    x[4, 7], x[5, 9] = np.nan, np.inf
    x, w = jnp.asarray(x, jnp.bfloat16), jnp.asarray(rng.normal(size=(rows, 256)), jnp.float16)
    (y,) = quant.matmul_many(x, [w], out_dtypes=[jnp.float32], precise=[True], implementation="xla")
    want = np.asarray(x, np.float64)[:4] @ np.asarray(w, np.float64).T
    for row in range(4):
        np.testing.assert_allclose(y[row], want[row], rtol=0, atol=3e-6 * np.abs(want[row]).max())
    assert np.isnan(y[4]).all() and not np.isfinite(y[5]).any()
