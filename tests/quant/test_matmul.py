"""`quant.matmul` against NumPy in float64."""

import importlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from ds4jax import quant
from ds4jax.errors import DS4Error
from ds4jax.quant import FORMATS, api
from tests.quant.blocks import BLOCK_FORMATS, random_blocks, random_tensor

ROWS = (1, 3, 127, 128, 129)
PACKED = [*BLOCK_FORMATS, "FP8_128", "FP4_32"]
tiling = importlib.import_module("ds4jax.quant.matmul")  # the package exports the function of that name


def packed(rng, name, shape):
    """(QuantizedArray, float64 values)."""
    if name in BLOCK_FORMATS:
        raw, values = random_tensor(rng, name, shape)
        return quant.from_blocks(jnp.asarray(raw), name, shape), values.astype(np.float64)
    if name == "FP8_128":
        scale = rng.integers(120, 130, (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128)), dtype=np.uint8)
        w = quant.fp8(rng.integers(0, 120, shape, dtype=np.uint8), scale)
    else:
        scale = rng.integers(120, 130, (*shape[:-1], shape[-1] // 32), dtype=np.uint8)
        w = quant.fp4(rng.integers(0, 256, (*shape[:-1], shape[-1] // 2), dtype=np.uint8), scale)
    return w, np.asarray(quant.dequantize(w), np.float64)


def assert_close(got, x, w, eps=1e-6):
    """got ≈ x wᵀ with an error bounded by eps · |x| |w|ᵀ (and one rounding of the result, covered by eps)."""
    want, bound = x @ np.swapaxes(w, -1, -2), np.abs(x) @ np.abs(np.swapaxes(w, -1, -2))
    assert got.shape == want.shape
    worst = np.max(np.abs(np.asarray(got, np.float64) - want) / np.maximum(bound, 1e-30))
    assert worst <= eps


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiling, "TILE", 2**13)


@pytest.mark.parametrize(("name", "rows"), [(n, ROWS[i % 5]) for i, n in enumerate(PACKED) if n != "Q4_K"] +
                         [("Q4_K", r) for r in ROWS])  # fmt: skip
def test_packed_weights(name, rows, small_tiles):
    rng = np.random.default_rng(rows)
    w, values = packed(rng, name, (rows, FORMATS[name].block))
    x = rng.normal(size=(2, 3, w.shape[1])).astype(np.float32)
    got = quant.matmul(x, w)
    assert got.dtype == jnp.float32
    assert_close(got, x.astype(np.float64), values)
    assert_close(quant.matmul(x[0, 0], w)[None], x[0, :1].astype(np.float64), values)


@pytest.mark.parametrize("name", ["Q4_K", "FP8_128", "MXFP4"])
def test_tiles_that_overlap(name, small_tiles):
    # 129 rows of 1024 in tiles of 8: the last tile begins inside the one before.
    rng = np.random.default_rng(1)
    w, values = packed(rng, name, (129, 1024))
    count, rows = tiling.tiles(129, 1024, np.float32)
    assert count > 2 and count * rows > 129
    x = rng.normal(size=(5, 1024)).astype(np.float32)
    assert_close(jax.jit(quant.matmul)(x, w), x.astype(np.float64), values)
    g = rng.normal(size=(5, 129)).astype(np.float32)
    dx = jax.vjp(lambda x: quant.matmul(x, w), x)[1](jnp.asarray(g))[0]
    assert_close(dx, g.astype(np.float64), values.T)


def test_bfloat16_activations():
    rng = np.random.default_rng(2)
    w, values = packed(rng, "Q5_K", (64, 512))
    x = rng.normal(size=(4, 512)).astype(ml_dtypes.bfloat16)
    rounded = values.astype(ml_dtypes.bfloat16).astype(np.float64)
    for weight in (w, jnp.asarray(values, jnp.float32), jnp.asarray(values, jnp.bfloat16)):
        got = quant.matmul(x, weight)
        assert got.dtype == jnp.bfloat16
        want = x.astype(np.float64) @ rounded.T
        np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2**-8, atol=1e-4)
        wide = quant.matmul(x, weight, out_dtype=jnp.float32)
        assert wide.dtype == jnp.float32
        assert_close(wide, x.astype(np.float64), rounded)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_plain_weights(dtype):
    rng = np.random.default_rng(3)
    w = rng.normal(size=(3, 5, 64)).astype(dtype)
    x = rng.normal(size=(2, 7, 3, 64)).astype(np.float32)
    assert_close(quant.matmul(x, w[0]), x.astype(np.float64), w[0].astype(np.float64))
    got = quant.matmul(x, w)
    assert got.shape == (2, 7, 3, 5)
    for g in range(3):
        assert_close(got[:, :, g], x[:, :, g].astype(np.float64), w[g].astype(np.float64))


@pytest.mark.parametrize("tile", [2**23, 2**13])
@pytest.mark.parametrize("lead", [(), (2, 3)])
def test_packed_groups(tile, lead, monkeypatch):
    monkeypatch.setattr(tiling, "TILE", tile)
    rng = np.random.default_rng(4)
    w, values = packed(rng, "Q2_K", (4, 33, 512))
    x = rng.normal(size=(*lead, 4, 512)).astype(np.float32)
    g = rng.normal(size=(*lead, 4, 33)).astype(np.float32)
    got, pull = jax.vjp(lambda x: quant.matmul(x, w), jnp.asarray(x))
    dx = pull(jnp.asarray(g))[0]
    assert got.shape == (*lead, 4, 33) and dx.shape == x.shape
    for i in range(4):
        assert_close(got[..., i, :].reshape(-1, 33), x[..., i, :].reshape(-1, 512).astype(np.float64), values[i])
        assert_close(dx[..., i, :].reshape(-1, 512), g[..., i, :].reshape(-1, 33).astype(np.float64), values[i].T)


def test_gradients_in_plain_weights():
    rng = np.random.default_rng(5)
    x, w = rng.normal(size=(7, 16)).astype(np.float32), rng.normal(size=(5, 16)).astype(np.float32)
    g = rng.normal(size=(7, 5)).astype(np.float32)
    dx, dw = jax.vjp(quant.matmul, jnp.asarray(x), jnp.asarray(w))[1](jnp.asarray(g))
    assert_close(dx, g.astype(np.float64), w.T.astype(np.float64))
    assert_close(dw, g.T.astype(np.float64), x.T.astype(np.float64))
    half = jax.vjp(quant.matmul, jnp.asarray(x, jnp.bfloat16), jnp.asarray(w))[1](jnp.asarray(g, jnp.bfloat16))
    assert [a.dtype for a in half] == [jnp.bfloat16, jnp.float32]
    np.testing.assert_allclose(half[1], dw, atol=0.05 * np.abs(dw).max())


def test_vmap_and_scan_over_a_stack(small_tiles):
    rng = np.random.default_rng(6)
    w, values = packed(rng, "IQ4_XS", (3, 65, 256))
    x = rng.normal(size=(3, 2, 256)).astype(np.float32)
    mapped = jax.vmap(quant.matmul)(jnp.asarray(x), w)
    scanned = jax.lax.scan(lambda c, a: (c, quant.matmul(*a)), 0, (jnp.asarray(x), w))[1]
    for i in range(3):
        assert_close(mapped[i], x[i].astype(np.float64), values[i])
        assert_close(scanned[i], x[i].astype(np.float64), values[i])


def test_nan_scale_reaches_exactly_its_row(small_tiles):
    rng = np.random.default_rng(7)
    raw = random_blocks(rng, "Q8_0", 129 * 4).reshape(129, 4, 34)
    raw[77, 2, :2] = 0, 0x7E
    w = quant.from_blocks(raw, "Q8_0", (129, 128))
    x = rng.normal(size=(3, 128)).astype(np.float32)
    y = np.asarray(quant.matmul(x, w))
    assert np.isnan(y[:, 77]).all() and np.isfinite(np.delete(y, 77, 1)).all()
    dx = np.asarray(jax.grad(lambda x: quant.matmul(x, w).sum())(x))
    assert np.isnan(dx[:, 64:96]).all() and np.isfinite(np.delete(dx, np.s_[64:96], 1)).all()


def test_memory_stays_near_one_tile(monkeypatch):
    monkeypatch.setattr(tiling, "TILE", 2**16)  # 256 KiB in float32
    w, _ = packed(np.random.default_rng(8), "Q4_K", (2048, 512))  # 4 MiB in float32
    x = jnp.ones((2, 512))
    for f in (quant.matmul, jax.grad(lambda x, w: quant.matmul(x, w).sum())):
        memory = jax.jit(f).lower(x, w).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 2**20


def test_errors_name_shapes():
    w, _ = packed(np.random.default_rng(9), "Q8_0", (4, 64))
    for x, weight, words in (
        (np.ones((2, 32), np.float32), w, ["[2, 32]", "[4, 64]", "[..., in]"]),
        (np.ones((2, 64), np.int32), w, ["floating", "int32"]),
        (np.ones((2, 64), np.float32), w[0], ["[64]"]),
        (np.ones(64, np.float32), w.reshape(2, 2, 64), ["[64]", "[2, 2, 64]"]),
        (np.ones((3, 64), np.float32), w.reshape(2, 2, 64), ["[3, 64]", "[..., G, in]"]),
        (np.ones((2, 64), np.float32), np.ones((4, 65), np.float32), ["[4, 65]"]),
    ):
        with pytest.raises(DS4Error) as e:
            quant.matmul(x, weight)
        assert all(word in str(e.value) for word in words), str(e.value)


def test_choice_of_implementation(monkeypatch):
    w, values = packed(np.random.default_rng(10), "Q8_0", (4, 64))
    x = np.ones((1, 64), np.float32)
    assert_close(quant.matmul(x, w, implementation="xla"), x.astype(np.float64), values)
    with pytest.raises(DS4Error, match="'cudnn'.*xla"):
        quant.matmul(x, w, implementation="cudnn")

    def refuses(*args):
        raise NotImplementedError("only on Tuesdays")

    table = {"refuses": refuses, "takes": lambda a: ("took", a), "never": lambda a: 1 / 0}
    assert api.run("op", table, None, 3) == ("took", 3)
    with pytest.raises(DS4Error, match="refuses: only on Tuesdays"):
        api.run("op", table, "refuses", 3)
