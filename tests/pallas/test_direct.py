"""Several weights times the same activations in one kernel, beside one product after another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ds4jax import quant
from ds4jax.errors import DS4Error
from ds4jax.model.layers import scaled_rms
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


def q8(rng, out, K):
    """Random codes, -128 among them, and scales of many sizes."""
    codes = rng.integers(-128, 128, (out, K)).astype(np.int8)
    d = (rng.choice([-1, 1], (out, K // 32)) * 2.0 ** rng.uniform(-20, 3, (out, K // 32))).astype(np.float16)
    return quant.QuantizedArray({"codes": jnp.asarray(codes), "d": jnp.asarray(d.view(np.uint16))}, "Q8_0")


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(
    "out, K, tuning",
    [
        (1, 64, dict(warps=4)), (15, 128, dict(warps=4)), (130, 192, dict(warps=8, ahead=4)), (17, 1024, None),
        (130, 1024, dict(warps=4, parts=2, ahead=4)), (17, 1024, dict(warps=4, parts=2, ahead=8)),
        (33, 4096, dict(warps=8, parts=8, ahead=2)), (15, 4096, None),
    ],
)  # fmt: skip
def test_bytes_on_tensor_cores_equal_float64(rng, rows, out, K, tuning):
    x, w = jnp.asarray(rng.normal(size=(rows, K)), jnp.bfloat16), q8(rng, out, K)
    with lowering.interpreted():
        (y,) = direct.products(x, [(w.parts, w.format)], [jnp.float32], tuning=tuning and lowering.Tuning(**tuning))
    want = exact(x, w)
    np.testing.assert_allclose(y, want, rtol=0, atol=2e-6 * np.abs(want).max())


def test_each_byte_is_exactly_a_bfloat16(rng):
    words = jnp.arange(-128, 128, dtype=jnp.int8).reshape(64, 4)
    with lowering.interpreted():
        pairs = lowering.bfloats_of_bytes(lowering.words_of_bytes(words)[:, 0])
    got = np.stack([np.asarray(jax.lax.bitcast_convert_type(p, jnp.bfloat16), np.float32) for p in pairs], 1)
    np.testing.assert_array_equal(64 * got.reshape(-1), np.arange(-128, 128))


@pytest.mark.parametrize("N, G, out, K", [(1, 8, 16, 256), (2, 3, 48, 512), (2, 3, 24, 512)])
def test_a_stack_of_bytes(rng, N, G, out, K):  # of 24 rows a group, warps would take two groups' at once
    x, w = jnp.asarray(rng.normal(size=(N, G, K)), jnp.bfloat16), weight(rng, "Q8_0", (G, out, K))
    with lowering.interpreted():
        y = quant.matmul(x, w, out_dtype=jnp.float32, implementation="pallas")
    want = np.einsum("ngk,gok->ngo", np.float64(x), np.float64(quant.dequantize(w)))
    np.testing.assert_allclose(y, want, atol=2e-6 * np.abs(want).max())


def test_what_is_no_number_stays_in_its_row(rng):
    x, w = rng.normal(size=(2, 256)), q8(rng, 33, 256)
    x[1, 70] = np.inf
    w.parts["d"] = w.parts["d"].at[20, 3].set(0x7E00)
    with lowering.interpreted():
        y = np.asarray(quant.matmul(jnp.asarray(x, jnp.bfloat16), w, out_dtype=jnp.float32, implementation="pallas"))
        x[1, 70] = np.nan
        z = np.asarray(quant.matmul(jnp.asarray(x, jnp.bfloat16), w, out_dtype=jnp.float32, implementation="pallas"))
    assert not np.isfinite(y[1]).any() and np.isnan(z[1]).all()
    for of in (y, z):
        assert np.isnan(of[0, 20]) and np.isfinite(np.delete(of[0], 20)).all()


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


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32, jnp.bfloat16])
def test_precise_products_of_bfloat16_lose_nothing(rng, dtype):
    """Tensor cores multiply bfloat16: a weight in pieces, whose products are exact."""
    x = jnp.asarray(rng.normal(size=(7, 640)), jnp.bfloat16)
    w = jnp.asarray(rng.normal(size=(33, 640)) * 2.0 ** rng.integers(-12, 3, (33, 640)), dtype)
    (y,) = jax.jit(lambda x, w: quant.matmul_many(x, [w], out_dtypes=[jnp.float32], precise=[True]))(x, w)
    want = exact(x, w)
    np.testing.assert_allclose(y, want, atol=3e-6 * np.abs(want).max())


def test_precise_products_of_half_weights_keep_rows_apart():
    """float16 holds a bfloat16 row of any size, once its exponent is taken out; NaN and infinity stay in their row."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(6, 256)) * np.array([1e30, 1e-30, 1, 0, 1, 1])[:, None]
    x[4, 7], x[5, 9] = np.nan, np.inf
    x, w = jnp.asarray(x, jnp.bfloat16), jnp.asarray(rng.normal(size=(5, 256)), jnp.float16)
    (y,) = quant.matmul_many(x, [w], out_dtypes=[jnp.float32], precise=[True], implementation="xla")
    want = np.asarray(x, np.float64)[:4] @ np.asarray(w, np.float64).T
    for row in range(4):
        np.testing.assert_allclose(y[row], want[row], rtol=0, atol=3e-6 * np.abs(want[row]).max())
    assert np.isnan(y[4]).all() and not np.isfinite(y[5]).any()


@pytest.mark.parametrize("rows, K", [(1, 1024), (2, 2048)])
def test_a_norm_on_the_way_equals_one_before(rng, rows, K):
    x, ws = jnp.asarray(3 * rng.normal(size=(rows, 1, K)), jnp.bfloat16), [q8(rng, 33, K), q8(rng, 16, K)]
    norm = jnp.asarray(1 + 0.2 * rng.normal(size=K), jnp.float32), 1e-6
    with lowering.interpreted():
        ours = quant.matmul_many(x, ws, norm=norm, implementation="pallas")
        apart = quant.matmul_many(scaled_rms(x, *norm), ws, implementation="pallas")
        plain = quant.matmul_many(x, ws, norm=norm, implementation="xla")
    for a, b, c in zip(ours, apart, plain, strict=True):
        assert a.shape == b.shape == c.shape == (rows, 1, b.shape[-1])
        np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=1e-2, atol=1e-3 * np.abs(np.float32(b)).max())
        np.testing.assert_allclose(np.float32(a), np.float32(c), rtol=2e-2, atol=5e-3 * np.abs(np.float32(c)).max())


def test_a_norm_needs_bytes_and_rows_that_fill_a_program(rng):
    norm = jnp.ones(1024), 1e-6
    for x, w in [
        (jnp.ones((1, 1024)), q8(rng, 8, 1024)), (jnp.ones((1, 256), jnp.bfloat16), q8(rng, 8, 256)),
        (jnp.ones((1, 1024), jnp.bfloat16), plain(rng, 8, 1024, jnp.float16)),
    ]:  # fmt: skip
        with lowering.interpreted(), pytest.raises(DS4Error, match="no norm"):
            quant.matmul_many(x, [w], norm=norm, implementation="pallas")


def test_gradients_pass_a_norm(rng):
    x, w = jnp.asarray(rng.normal(size=(1, 1024)), jnp.bfloat16), q8(rng, 16, 1024)

    def loss(implementation):
        def f(x, scale):
            kw = dict(norm=(scale, 1e-6), out_dtypes=[jnp.float32], implementation=implementation)
            return jnp.sum(quant.matmul_many(x, [w], **kw)[0] * jnp.sin(jnp.arange(16.0)))

        return jax.grad(f, argnums=(0, 1))(x, jnp.ones(1024))

    with lowering.interpreted():
        ours = loss("pallas")
    for mine, theirs in zip(ours, loss("xla"), strict=True):
        mine, theirs = np.float32(mine), np.float32(theirs)
        np.testing.assert_allclose(mine, theirs, atol=2e-2 * np.abs(theirs).max())
