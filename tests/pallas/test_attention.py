"""Attention of one token a slot: the kernel beside plain JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ds4jax.model.attention import _attend_kernel, _attend_rows
from ds4jax.model.cache import Paged, flat, pick, rows_of
from ds4jax.pallas import attention, lowering

# slots, heads, channels, window, stored rows, rows read
SHAPES = [
    (1, 3, 64, 40, 0, 0),
    (2, 20, 32, 64, 70, 70),
    (2, 16, 16, 33, 300, 100),
    (9, 5, 16, 32, 40, 31),
    (1, 1, 16, 1, 1, 1),
]


def inputs(rng, B, H, d, W, N, K, dtype=jnp.float32):
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    rows = jnp.asarray(np.where(rng.random((B, K)) < 0.8, rng.integers(0, max(N, 1), (B, K)), -1), jnp.int32)
    live = jnp.asarray(rng.random((B, W)) < 0.8)
    stored = (normal(N, d), rows) if N else (None, None)
    angle = rng.normal(size=(B, d // 8))
    cos_sin = (jnp.asarray(f(angle), jnp.float32) for f in (np.cos, np.sin))
    return normal(B, H, d), normal(B, W, d), live, *stored, jnp.asarray(rng.normal(size=H), jnp.float32), *cos_sin


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 2e-6), (jnp.bfloat16, 2e-2)])
def test_kernel_equals_plain(rng, shape, dtype, tolerance):
    args = inputs(rng, *shape, dtype)
    with lowering.interpreted():
        ours = jax.jit(attention.decode)(*args)
    plain = _attend_rows(*args)
    assert ours.dtype == plain.dtype
    np.testing.assert_allclose(np.asarray(ours, np.float64), np.asarray(plain, np.float64), atol=tolerance)


def test_nothing_to_read_gives_the_sink_everything(rng):
    q, window, live, stored, rows, sink, *turn = inputs(rng, 2, 4, 16, 8, 40, 40)
    with lowering.interpreted():
        out = attention.decode(q, window, jnp.zeros_like(live), stored, jnp.full_like(rows, -1), sink, *turn)
    np.testing.assert_array_equal(out, 0)


def test_scores_far_apart_do_not_overflow(rng):
    q, window, live, stored, rows, sink, *turn = inputs(rng, 2, 4, 16, 8, 40, 40)
    args = (1e4 * q, window, live, stored, rows, sink, *turn)
    with lowering.interpreted():
        np.testing.assert_allclose(attention.decode(*args), _attend_rows(*args), atol=1e-5)


def test_gradients_are_those_of_the_plain_form(rng):
    q, window, live, stored, rows, sink, *turn = inputs(rng, 2, 4, 16, 8, 40, 12)

    def loss(fn):
        return lambda q, window, stored, sink: jnp.sum(jnp.sin(fn(q, window, live, stored, rows, sink, *turn)))

    with lowering.interpreted():
        ours = jax.grad(loss(_attend_kernel), argnums=(0, 1, 2, 3))(q, window, stored, sink)
    plain = jax.grad(loss(_attend_rows), argnums=(0, 1, 2, 3))(q, window, stored, sink)
    for mine, theirs in zip(ours, plain, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)


def test_rows_of_pages_and_arrays_are_where_entries_lie(rng):
    B, N, e, d = 2, 12, 4, 16
    pool = jnp.asarray(rng.normal(size=(7, e, d)))
    paged = Paged(pool, jnp.asarray([[5, 0, 7], [2, 3, 6]], jnp.int32))  # 7: no page
    index = jnp.asarray([[0, 3, 7, 4], [11, 4, 0, 9]], jnp.int32)
    for stored in (paged, jnp.asarray(rng.normal(size=(B, N, d)))):
        np.testing.assert_array_equal(flat(stored)[rows_of(stored, index)], pick(stored, index[:, None])[:, 0])
    everyone = rows_of(paged, jnp.arange(N, dtype=jnp.int32))
    assert everyone.shape == (B, N) and everyone.max() < 7 * e


@pytest.mark.parametrize("slots, read", [(1, 512), (64, 512), (1, None)])
def test_lowers_for_cuda(slots, read):
    shape = jax.ShapeDtypeStruct
    args = [shape((slots, 64, 512), jnp.bfloat16), shape((slots, 128, 512), jnp.bfloat16), shape((slots, 128), bool)]
    args += [shape((4096, 512), jnp.bfloat16), shape((slots, read), jnp.int32)] if read else [None, None]
    numbers = [shape(n, jnp.float32) for n in ((64,), (slots, 32), (slots, 32))]
    assert "decode_attention_join" in lowering.lower_for_cuda(attention.decode, *args, *numbers)
