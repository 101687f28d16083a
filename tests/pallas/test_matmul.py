"""Products with few and many rows, in interpret mode, beside plain JAX in float32."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ds4jax import quant
from ds4jax.errors import DS4Error
from ds4jax.pallas import activations as digits
from ds4jax.pallas import decode, lowering, matrix, matvec
from ds4jax.quant.matmul import codebook
from tests.pallas.tensors import FORMATS, PUBLISHED, activations, error, weight

SMALL = lowering.Tuning(rows=8, units=4)
TILE = lowering.Tuning(rows=16, units=2, tokens=16)


def few(x, w, out_dtype=jnp.float32, tuning=SMALL):
    with lowering.interpreted():
        return jax.jit(lambda x, w: matvec.matvec(x, w.parts, w.format, out_dtype, codebook(w.format), tuning))(x, w)


def many(x, w, out_dtype=jnp.float32, tuning=TILE):
    with lowering.interpreted():
        return jax.jit(lambda x, w: matrix.matmul(x, w.parts, w.format, out_dtype, codebook(w.format), tuning))(x, w)


def plain(x, w):
    return quant.matmul(x.astype(jnp.float32), w, implementation="xla")


@pytest.mark.parametrize("name", FORMATS)
def test_one_row_of_every_format(rng, name):
    # 19 rows: the last program's are partly masked; 768 elements: the last step's units are partly masked
    w, x = weight(rng, name, (19, 768)), activations(rng, (1, 768))
    assert error(few(x, w, tuning=lowering.Tuning(rows=8, units=16)), plain(x, w)) < 1e-4


@pytest.mark.parametrize(
    "name", [*PUBLISHED, *(pytest.param(f, marks=pytest.mark.full) for f in ("Q6_K", "IQ3_S", "MXFP4", "FP8_128"))]
)
def test_many_rows(rng, name):
    w, x = weight(rng, name, (19, 768)), activations(rng, (21, 768))
    assert error(many(x, w), plain(x, w)) < 2e-3


def test_a_long_input_is_cut_into_parts(rng):
    w, x = weight(rng, "Q2_K", (19, 4096)), activations(rng, (17, 4096))
    assert matrix._parts(4, 32) == 8 and matrix._parts(4, 12) == 2 and matrix._parts(600, 64) == 1
    assert error(many(x, w, jnp.bfloat16), plain(x, w)) < 4e-3


@pytest.mark.parametrize("name", ["Q8_0", "FP8_128"])
def test_float32_activations_keep_their_digits(rng, name):
    w, x = weight(rng, name, (8, 256)), activations(rng, (2, 256), jnp.float32)
    assert error(few(x, w), plain(x, w)) < 5e-7


@pytest.mark.parametrize("rows", [1, 5])
def test_stacks(rng, rows):
    w, x = weight(rng, "Q8_0", (3, 5, 256)), activations(rng, (rows, 3, 256))
    assert error(few(x, w), plain(x, w)) < 1e-4
    assert error(many(x, w), plain(x, w)) < 2e-3


@pytest.mark.full
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rows, out, K", [(1, 1, 256), (8, 130, 512), (5, 64, 1280)])
def test_shapes(rng, name, rows, out, K):
    w, x = weight(rng, name, (out, K)), activations(rng, (rows, K))
    assert error(few(x, w), plain(x, w)) < 1e-4
    assert error(many(x, w), plain(x, w)) < 2e-3


@pytest.mark.parametrize("name, K, units, steps", [
    pytest.param("Q2_K", 256, 4, 1, marks=pytest.mark.full), pytest.param("IQ2_XXS", 512, 8, 2, marks=pytest.mark.full),
    ("Q2_K", 1280, 4, 5), pytest.param("IQ2_XXS", 768, 16, 2, marks=pytest.mark.full), ("Q2_K", 768, 8, 2),
])  # fmt: skip
def test_loaded_ahead(rng, name, K, units, steps):
    # 768 elements: the last step's units are partly past the end
    assert -(-K // decode.DECODERS[name].unit // units) == steps
    w, x = weight(rng, name, (5, K)), activations(rng, (3, K))
    assert error(few(x, w, tuning=dataclasses.replace(SMALL, units=units, ahead=1)), plain(x, w)) < 1e-4
    assert error(many(x, w, tuning=dataclasses.replace(TILE, units=units, ahead=1)), plain(x, w)) < 3e-3


def test_every_load_of_a_step_is_made_in_the_one_before(rng):
    seen = []

    def read(i, tiles):
        return [tile.part("codes", jnp.full(1, i, jnp.int32)) for tile in tiles]

    def body(i, values, total):
        seen.append(len(values))
        return [t + v.astype(jnp.int32) for t, v in zip(total, values, strict=True)]

    w = [weight(rng, "Q8_0", (4, 32)) for _ in range(2)]
    with lowering.interpreted():
        tiles = [decode.Tile(one.parts, jnp.arange(4)) for one in w]
        zeros = [jnp.zeros((1, 4), jnp.int32)] * 2
        loads = jax.make_jaxpr(lambda: decode.pipelined(5, 1, tiles, read, body, zeros))()
        total = decode.pipelined(5, 1, tiles, read, body, zeros)
    (loop,) = [e for e in loads.eqns if e.primitive.name in ("scan", "while")]
    inside = str(loop.params.get("jaxpr", loop.params.get("body_jaxpr")))
    assert seen[0] == 2 and inside.count("gather[") == 2  # of the next step, none of this
    for t, one in zip(total, w, strict=True):
        np.testing.assert_array_equal(t[0], np.asarray(one.parts["codes"])[:, :5].astype(np.int32).sum(1))


def test_digits_hold_16_bits(rng):
    x = activations(rng, (3, 64)) * jnp.asarray([1e-20, 1.0, 1e20])[:, None]
    with lowering.interpreted():
        d = digits.split(x, 2)
        none = digits.split(jnp.zeros((1, 32)), 2)
    words = np.asarray(d.words).view(np.int8).reshape(3, 2, 64).astype(np.int64)
    got = (words[:, 0] * 256 + words[:, 1]) * np.repeat(np.asarray(d.scale), 32, axis=1)
    peak = np.abs(np.asarray(x, np.float64)).reshape(3, 2, 32).max(-1).repeat(32, 1)
    assert (np.abs(got - np.asarray(x, np.float64)) <= peak / 60_000).all()
    np.testing.assert_allclose(d.sums, got.reshape(3, 4, 16).sum(-1), rtol=1e-5, atol=1e-6 * peak.max())
    assert not np.asarray(none.words).any()


def test_what_is_not_finite_shows(rng):
    w, x = weight(rng, "Q4_K", (4, 256)), activations(rng, (3, 256))
    y = np.asarray(few(x.at[0, 3].set(jnp.nan).at[1, 200].set(jnp.inf), w))
    assert np.isnan(y[:2]).all() and np.isfinite(y[2]).all()


@pytest.mark.parametrize("name, N, K", [("Q8_0", 1, 1024), ("Q8_0", 8, 768), ("Q2_K", 3, 256)])
def test_rows_are_normed_on_their_way(rng, name, N, K):
    w, x = weight(rng, name, (19, K)), activations(rng, (N, K)) * jnp.asarray([3.0, 1e-3, 40, 1, 1, 1, 1, 1])[:N, None]
    x, norm = x.astype(jnp.bfloat16), (1 + jnp.asarray(rng.normal(size=K), jnp.float32) / 9, 1e-6)

    wide = np.float64(x)
    want = wide / np.sqrt(np.mean(wide * wide, axis=1, keepdims=True) + 1e-6) * np.float64(norm[0])
    decoded = np.float64(quant.dequantize(w, jnp.float32)).T
    with lowering.interpreted():
        ours = jax.jit(lambda x: quant.matmul(x, w, norm=norm, out_dtype=jnp.float32, implementation="pallas"))(x)
    assert error(ours, np.float64(jnp.asarray(want, jnp.bfloat16)) @ decoded) < 3e-4  # a number may round the other way
    plain = quant.matmul(x.astype(jnp.float32), w, norm=norm, implementation="xla")
    assert error(plain, want @ decoded) < 1e-5


def test_what_is_not_normed_on_its_way(rng):
    w, x = weight(rng, "Q8_0", (5, 256)), activations(rng, (9, 256))
    assert quant.norms_on_load(x[:8], w) and not quant.norms_on_load(x, w)
    assert not quant.norms_on_load(x[:1], jnp.zeros((5, 256)))
    with pytest.raises(DS4Error, match="weight"):
        quant.matmul(x, w, norm=(jnp.ones(255), 1e-6))
    loss = lambda x, scale, how: jnp.sum(quant.matmul(x, w, norm=(scale, 1e-6), implementation=how) ** 2)  # noqa: E731
    few, scale = x[:2].astype(jnp.float32), jnp.ones(256)
    with lowering.interpreted():
        ours = jax.grad(loss, (0, 1))(few, scale, "pallas")
    for mine, plain in zip(ours, jax.grad(loss, (0, 1))(few, scale, "xla"), strict=True):
        assert error(mine, plain) < 1e-3


def test_gradients_are_the_plain_ones(rng):
    w, x = weight(rng, "Q2_K", (6, 256)), activations(rng, (2, 256), jnp.float32)
    loss = lambda x, how: jnp.sum(quant.matmul(x, w, implementation=how) ** 2)  # noqa: E731
    with lowering.interpreted():
        got = jax.grad(loss)(x, "pallas")
    assert error(got, jax.grad(loss)(x, "xla")) < 1e-5


def test_columns_are_a_permutation():
    for name, decoder in decode.DECODERS.items():
        units = np.arange(512 // decoder.unit)
        assert sorted(decode.columns(name, units)) == list(range(512)), name


def test_refusals(rng):
    x, w = activations(rng, (2, 256)), weight(rng, "Q8_0", (4, 256))
    with pytest.raises(DS4Error, match="no implementation of matmul serves this call .*NVIDIA"):
        quant.matmul(x, w, implementation="pallas")  # there is no GPU, and nothing is interpreted
    with lowering.interpreted():
        with pytest.raises(NotImplementedError, match="plain weights"):
            quant.matmul.__globals__["_pallas"](x, jnp.zeros((4, 256)), jnp.float32)
        with pytest.raises(NotImplementedError, match="no rows"):
            quant.matmul.__globals__["_pallas"](jnp.zeros((0, 256), jnp.bfloat16), w, jnp.float32)
        with pytest.raises(NotImplementedError, match="bfloat16"):
            many(activations(rng, (16, 256), jnp.float32), w)
    assert error(quant.matmul(x, w), plain(x, w)) < 1e-2  # automatic choice falls back


@pytest.mark.parametrize("name", PUBLISHED)
def test_lowers_for_cuda(name):
    def shapes(*shape):
        fmt = quant.FORMATS[name]
        parts = {n: jax.ShapeDtypeStruct((*shape[:-1], shape[-1] // p.per), p.dtype) for n, p in fmt.parts.items()}
        return quant.QuantizedArray(parts, name)

    w = shapes(512, 4096)
    for rows, dtype in ((1, jnp.bfloat16), (4, jnp.float32), (16, jnp.bfloat16)):
        x = jax.ShapeDtypeStruct((rows, 4096), dtype)
        text = lowering.lower_for_cuda(lambda x, w: quant.matmul(x, w, implementation="pallas"), x, w)
        assert "triton" in text


@pytest.mark.full
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_lowers_for_cuda(name):
    fmt = quant.FORMATS[name]
    parts = {n: jax.ShapeDtypeStruct((3, 512, -(-2048 // p.per)), p.dtype) for n, p in fmt.parts.items()}
    w = quant.QuantizedArray(parts, name)
    for rows in (1, 8, 64):
        x = jax.ShapeDtypeStruct((rows, 3, 2048), jnp.bfloat16)
        assert "triton" in lowering.lower_for_cuda(lambda x, w: quant.matmul(x, w, implementation="pallas"), x, w)
