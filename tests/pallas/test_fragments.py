"""Batches whose operands never leave registers, in interpret mode, beside plain JAX in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ds4jax import quant
from ds4jax.pallas import fragments, lowering, tuned
from tests.pallas.tensors import activations, error, weight

EXACT = 5e-7  # what float32 sums lose
HALF = 4e-4  # what weights lose that are rounded to float16


def shape(warps=1, rows=16, parts=1):
    return lowering.Tuning(rows=rows, warps=warps, stages=1, parts=parts)


def exact_weight(rng, name, shape):
    """Weights that float16 holds: their scales are small whole numbers times powers of two."""
    w = weight(rng, name, shape)
    powers = (2.0 ** rng.integers(-9, -5, w.parts["d"].shape)).astype(np.float16).view(np.uint16)
    parts = {n: jnp.asarray(powers) if n in ("d", "dmin") else p for n, p in w.parts.items()}
    return quant.QuantizedArray(parts, name)


def product(x, w, tuning, out_dtype=jnp.float32):
    with lowering.interpreted():
        return jax.jit(lambda x, w: fragments.matmul(x, w.parts, w.format, out_dtype, tuning=tuning))(x, w)


def plain(x, w):
    return quant.matmul(x.astype(jnp.float32), w, implementation="xla")


# out of 37: the last program's rows are partly masked; Q8_0 with 160 elements: the last step's units are
@pytest.mark.parametrize("name, rows, K, tuning", [
    ("Q8_0", 9, 160, shape()), ("Q8_0", 33, 160, shape(2, rows=32, parts=2)), ("Q4_K", 16, 512, shape(2, parts=2)),
    pytest.param("Q8_0", 64, 256, shape(), marks=pytest.mark.full),
])  # fmt: skip
def test_equals_plain_jax(rng, name, rows, K, tuning):
    w, x = exact_weight(rng, name, (37, K)), activations(rng, (rows, K))
    assert error(product(x, w, tuning), plain(x, w)) < EXACT


@pytest.mark.full
@pytest.mark.parametrize("rows, tile, parts", [(9, 16, 4), (16, 32, 2), (33, 16, 2), (33, 32, 4), (64, 32, 1)])
@pytest.mark.parametrize("name, K", [("Q8_0", 480), ("Q4_K", 1024)])
def test_shapes(rng, name, K, rows, tile, parts):
    w, x = exact_weight(rng, name, (70, K)), activations(rng, (rows, K))
    assert error(product(x, w, shape(2, tile, parts)), plain(x, w)) < EXACT


@pytest.mark.parametrize("name, K", [("Q8_0", 160), pytest.param("Q4_K", 256, marks=pytest.mark.full)])
def test_any_weights(rng, name, K):
    w, x = weight(rng, name, (19, K)), activations(rng, (10, K))
    assert error(product(x, w, shape()), plain(x, w)) < HALF


@pytest.mark.parametrize(
    "out_dtype, bound", [(jnp.float32, EXACT), pytest.param(jnp.bfloat16, 4e-3, marks=pytest.mark.full)]
)
def test_stacks(rng, out_dtype, bound):
    w, x = exact_weight(rng, "Q8_0", (3, 19, 160)), activations(rng, (10, 3, 160))
    got = product(x, w, shape(parts=2), out_dtype)
    assert got.dtype == out_dtype and got.shape == (10, 3, 19)
    assert error(got, plain(x, w)) < bound


def test_rows_of_any_size(rng):
    """Every row has a range of its own, and what is not finite shows in its row alone."""
    w, x = exact_weight(rng, "Q8_0", (19, 160)), np.float32(activations(rng, (12, 160)))
    sizes = [1e30, 1e-30, 1e36, 1e-32, 1.0, 0.0]
    x[: len(sizes)] *= np.asarray(sizes, np.float32)[:, None]
    x = jnp.asarray(x, jnp.bfloat16)
    broken = x.at[6, 0].set(jnp.nan).at[7, 159].set(jnp.inf).at[8, 80].set(-jnp.inf)
    got, want = np.asarray(product(broken, w, shape(parts=2))), np.asarray(plain(x, w))
    for i in (0, 1, 2, 3, 4, 9, 10, 11):
        assert error(got[i], want[i]) < EXACT, i
    assert (got[5] == 0).all() and np.isnan(got[6:9]).all()


def test_small_numbers_beside_large_ones(rng):
    """The steps of a row are at most 2⁻³⁸ of its largest."""
    x = activations(rng, (9, 160)) * 2.0**-20
    at, large = rng.integers(0, 160, 9), jnp.asarray(rng.choice([-3.0, 3.0], 9), jnp.bfloat16)
    both = x.at[np.arange(9), at].set(large)
    with lowering.interpreted():
        order = fragments._order("Q8_0", 160)
        words, undo = fragments.halves(both, order)
    numbers = np.asarray(words).view(np.float16).astype(np.float64) * 2.0**fragments.SHIFT
    got = np.zeros((9, 161))
    got[:, order] = numbers * np.asarray(undo, np.float64)[:, None]
    want = np.asarray(both, np.float64)
    assert (np.abs(got[:, :160] - want) <= 2.0**-38).all() and not got[:, 160].any()


@pytest.mark.parametrize("name, K", [("Q8_0", 160), ("Q8_0", 256), ("Q4_K", 512)])
def test_activations_are_read_once(name, K):
    order = fragments._order(name, K)
    assert sorted(order[order < K]) == list(range(K)) and (order <= K).all()


def test_parts_are_whole_steps():
    for N, out, matrices, steps in ((9, 4096, 1, 32), (33, 1024, 8, 24), (64, 515, 1, 6), (16, 37, 1, 7)):
        t = tuned.fragments(N, out, matrices, steps)
        assert steps % t.parts == 0 and t.rows in (16, 32)


def test_refusals(rng):
    w, x = weight(rng, "Q8_0", (19, 160)), activations(rng, (65, 160))
    for a, b in ((x, w), (x[:9].astype(jnp.float32), w), (activations(rng, (9, 256)), weight(rng, "Q2_K", (19, 256)))):
        with pytest.raises(NotImplementedError, match=f"{len(a)} rows of {a.dtype} and weights in {b.format}"):
            product(a, b, shape())
    with pytest.raises(NotImplementedError, match="2 steps are not 4 equal parts"):
        product(x[:9], w, shape(parts=4))


def packed(name, *shape):
    fmt = quant.FORMATS[name]
    parts = {n: jax.ShapeDtypeStruct((*shape[:-1], shape[-1] // p.per), p.dtype) for n, p in fmt.parts.items()}
    return quant.QuantizedArray(parts, name)


def text(name, x, *shape, dtype=jnp.bfloat16):
    run = lambda x, w: quant.matmul(x, w, implementation="pallas")  # noqa: E731
    return lowering.lower_for_cuda(run, jax.ShapeDtypeStruct(x, dtype), packed(name, *shape))


@pytest.mark.parametrize("name", fragments.FORMATS)
@pytest.mark.parametrize("rows", [9, 33, 64])
def test_lowers_for_cuda(on_device, name, rows):
    on_device(8.0)  # Hopper has warpgroups for more than 32 rows of Q8_0
    its = text(name, (rows, 4096), 512, 4096)
    assert f"fragments_{name.lower()}" in its and "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32" in its
    assert f"fragments_{name.lower()}" in text(name, (rows, 8, 1024), 8, 256, 1024)


def test_rows_that_no_power_of_two_of_warps_divides():
    assert "fragments_" in text("Q8_0", (20, 768), 64, 768)
    assert [lowering.warps_for(n) for n in (32, 256, 736, 768, 1536, 4096, 8192)] == [1, 1, 2, 4, 8, 16, 16]
    with pytest.raises(ValueError, match="kernel k: 3 warps"):
        lowering.call(None, None, grid=(1,), tuning=lowering.Tuning(warps=3), name="k")


def test_which_calls(rng):
    assert "fragments_" not in text("Q8_0", (8, 256), 64, 256) and "fragments_" not in text("Q8_0", (65, 256), 64, 256)
    assert "fragments_" not in text("Q2_K", (33, 256), 64, 256)
    w, x = weight(rng, "Q8_0", (19, 160)), activations(rng, (3, 7, 160))
    with lowering.interpreted():
        ours = quant.matmul(x, w, implementation="pallas")
    assert ours.shape == (3, 7, 19) and error(ours, plain(x, w)) < 4e-3
