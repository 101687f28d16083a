"""Expanding packed weights, in interpret mode, beside `quant.dequantize`."""

import functools

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from ds4jax import quant
from ds4jax.pallas import expand, lowering, tuned
from ds4jax.quant.matmul import codebook, tiles
from tests.pallas.tensors import FORMATS, PUBLISHED, activations, error, weight

MANY = 130  # rows of activations
QUICK = (*PUBLISHED, "Q6_K", "IQ3_S", "IQ4_XS", "MXFP4", "FP8_128")  # one of each kind of decoder


@functools.partial(jax.jit, static_argnames=("dtype", "rows", "tuning"))
def values(w, dtype=jnp.bfloat16, start=None, rows=None, tuning=None):
    with lowering.interpreted():
        return expand.expand(
            w.parts, w.format, w.shape[-1], dtype, codebook(w.format), start=start, rows=rows, tuning=tuning
        )


def by_kernels(x, w):
    with lowering.interpreted():
        return quant.matmul(x, w, implementation="pallas")


@pytest.mark.parametrize("name", [f if f in QUICK else pytest.param(f, marks=pytest.mark.full) for f in FORMATS])
def test_every_format(rng, name):
    # 7 rows of 768: units reach past the end
    w = weight(rng, name, (7, 768))
    got = np.asarray(values(w))
    np.testing.assert_array_equal(got, quant.dequantize(w, jnp.bfloat16))
    if hasattr(gguf.GGMLQuantizationType, name):
        raw = np.asarray(quant.to_blocks(w))
        want = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name])
        np.testing.assert_array_equal(got, want.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K"])
def test_float32(rng, name):
    w = weight(rng, name, (3, 512))
    np.testing.assert_array_equal(values(w, jnp.float32), quant.dequantize(w))


@pytest.mark.parametrize("name, out, K", [
    ("Q8_0", 1, 32), ("Q8_0", 77, 96), ("Q4_K", 1, 256), ("FP8_128", 1, 128),
])  # fmt: skip
def test_shapes(rng, name, out, K):
    w = weight(rng, name, (out, K))
    np.testing.assert_array_equal(values(w), quant.dequantize(w, jnp.bfloat16))


@pytest.mark.parametrize("name", ["Q8_0", "Q6_K"])
def test_some_rows_of_a_stack(rng, name):
    w = weight(rng, name, (3, 5, 256))
    all_rows = np.asarray(quant.dequantize(w, jnp.bfloat16))
    np.testing.assert_array_equal(values(w), all_rows)
    for start in (0, 7):
        got = values(w, start=jnp.int32(start), rows=6)
        np.testing.assert_array_equal(got, all_rows.reshape(15, 256)[start : start + 6])


def test_shape_of_work_changes_nothing(rng):
    w = weight(rng, "Q8_0", (9, 224))
    for units in (128, 1024):
        got = values(w, tuning=lowering.Tuning(units=units, warps=1))
        np.testing.assert_array_equal(got, quant.dequantize(w, jnp.bfloat16))


def test_scales_that_are_no_numbers_show(rng):
    w = weight(rng, "Q8_0", (3, 96))
    bits = np.array(w.parts["d"])
    bits[0, 1], bits[2, 2] = 0x7E00, 0xFC00  # NaN, -infinity
    w = quant.QuantizedArray({"codes": w.parts["codes"].at[2, 64].set(0), "d": jnp.asarray(bits)}, "Q8_0")
    got = np.asarray(values(w), np.float32)
    assert np.isnan(got[0, 32:64]).all() and np.isfinite(got[0, :32]).all() and np.isnan(got[2, 64])
    np.testing.assert_array_equal(got, np.asarray(quant.dequantize(w, jnp.bfloat16), np.float32))
    w = weight(rng, "FP8_128", (2, 256))
    w.parts["codes"] = w.parts["codes"].at[0, 3].set(0x7F)
    w.parts["scales"] = w.parts["scales"].at[1, 1].set(255)
    got = np.asarray(values(w), np.float32)
    assert np.isnan(got[0, 3]) and np.isnan(got[1, 128:]).all() and np.isnan(got).sum() == 129


@pytest.mark.parametrize("shape", [(19, 256), (3, 5, 256)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_products(rng, shape, dtype):
    w, x = weight(rng, "Q8_0", shape), activations(rng, (2, MANY // 2, *shape[:-2], 256), dtype)
    got = by_kernels(x, w)
    assert got.dtype == dtype
    assert error(got, quant.matmul(x, w, implementation="xla")) < (1e-3 if dtype == jnp.bfloat16 else 1e-6)


@pytest.mark.parametrize("shape", [(37, 256), (2, 21, 256)])
def test_products_tile_by_tile(rng, shape, monkeypatch):
    # tiles of 8 rows, the last of which overlaps the one before
    monkeypatch.setitem(quant.matmul.__globals__, "TILE", 2 * 256)
    w, x = weight(rng, "Q8_0", shape), activations(rng, (MANY, *shape[:-2], 256))
    assert tiles(37, 256, x.dtype) == (5, 8)
    exact = jnp.einsum("n...k,...ok->n...o", x.astype(jnp.float32), quant.dequantize(w))
    assert error(by_kernels(x, w), exact) < 4e-3


@pytest.mark.parametrize("shape", [(6, 256), (2, 3, 256)])
def test_gradients_are_the_plain_ones(rng, shape):
    w, x = weight(rng, "Q8_0", shape), activations(rng, (300, *shape[:-2], 256), jnp.float32)
    loss = lambda x, how: jnp.sum(quant.matmul(x, w, implementation=how) ** 2)  # noqa: E731
    with lowering.interpreted():
        got = jax.grad(loss)(x, "pallas")
    assert error(got, jax.grad(loss)(x, "xla")) < 1e-5


def test_refusals(rng):
    for name, K, dtype, why in (
        ("Q8_0", 64, jnp.float16, "bfloat16 or float32"), ("FP8_128", 192, jnp.bfloat16, "end within a scale's"),
    ):  # fmt: skip
        w = weight(rng, name, (2, K))
        with pytest.raises(NotImplementedError, match=why):
            values(w, dtype)
    huge = {"codes": jax.ShapeDtypeStruct((2**20, 2048), np.int8), "d": jax.ShapeDtypeStruct((2**20, 64), np.uint16)}
    with pytest.raises(NotImplementedError, match="32-bit"):
        jax.eval_shape(lambda parts: expand.expand(parts, "Q8_0", 2048, jnp.bfloat16), huge)
    w, x = weight(rng, "FP8_128", (4, 192)), activations(rng, (MANY, 192))
    with lowering.interpreted():  # automatic choice falls back
        assert error(quant.matmul(x, w), quant.matmul(x, w, implementation="xla")) == 0


@pytest.mark.parametrize("name", [*PUBLISHED, "FP8_128"])
def test_lowers_for_cuda(name):
    fmt = quant.FORMATS[name]
    for shape in ((512, 4096), (3, 512, 2048)):
        parts = {n: jax.ShapeDtypeStruct((*shape[:-1], shape[-1] // p.per), p.dtype) for n, p in fmt.parts.items()}
        x = jax.ShapeDtypeStruct((300, *shape[:-2], shape[-1]), jnp.bfloat16)
        w = quant.QuantizedArray(parts, name)
        text = lowering.lower_for_cuda(lambda x, w: quant.matmul(x, w, implementation="pallas"), x, w)
        assert (f"expand_{name.lower()}" in text) == (name not in tuned.EXPANDED_BY_XLA)
