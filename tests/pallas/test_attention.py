"""Attention of one token a slot, and of many: the kernels beside plain JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ds4jax.model.attention import _attend_kernel, _attend_many_kernel, _attend_many_rows, _attend_rows
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


# slots, tokens, heads, channels, window, entries, read of those (0: all that are finished), ratio, first positions
MANY = [
    (1, 1, 3, 64, 40, 0, 0, 0, [0]),
    (2, 5, 20, 32, 64, 0, 0, 0, [0, 77]),
    (2, 7, 16, 16, 33, 90, 0, 4, [0, 300]),
    (1, 3, 64, 16, 16, 3, 0, 128, [126]),
    (2, 9, 5, 32, 20, 140, 70, 4, [3, 500]),
    (1, 130, 2, 16, 8, 40, 8, 4, [0]),
]


def many_inputs(rng, B, T, H, d, W, N, K, ratio, start, dtype=jnp.bfloat16):
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    rows = np.full((B, T, K), -1, np.int32)
    for b, t in np.ndindex(B, T):
        finished = (start[b] + t + 1) // ratio if ratio else 0
        n = min(K, finished, N)
        rows[b, t, :n] = rng.choice(min(finished, N), n, replace=False) if n else 0
    entries = normal(B, N, d) if N else None
    args = normal(B, T, H, d), normal(B, W + T, d), jnp.asarray(start, jnp.int32), entries
    angle = rng.normal(size=(B, T, d // 8))
    cos_sin = (jnp.asarray(f(angle), jnp.float32) for f in (np.cos, np.sin))
    return *args, jnp.asarray(rows) if K else None, jnp.asarray(rng.normal(size=H), jnp.float32), *cos_sin, ratio


def by_numpy(q, keys, start, entries, rows, sink, cos, sin, ratio):
    """Token by token, head by head, in float64."""
    q, keys, sink = (np.asarray(a, np.float64) for a in (q, keys, sink))
    B, T, H, d = q.shape
    W, out = keys.shape[1] - T, np.zeros((B, T, H, d))
    for b, t, h in np.ndindex(B, T, H):
        at = int(start[b]) + t
        read = [keys[b, t + 1 + j] for j in range(W) if at - W + 1 + j >= 0]
        if entries is not None and rows is None:
            read += list(np.asarray(entries[b], np.float64)[: (at + 1) // ratio])
        elif rows is not None:
            read += [np.asarray(entries[b, i], np.float64) for i in np.asarray(rows[b, t]) if i >= 0]
        read = np.stack(read)
        p = np.exp(read @ q[b, t, h] * d**-0.5)
        out[b, t, h] = p @ read / (p.sum() + np.exp(sink[h]))
    pairs = out[..., -2 * cos.shape[-1] :].reshape(B, T, H, -1, 2)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.conj(np.asarray(cos) + 1j * np.asarray(sin))[:, :, None]
    out[..., -2 * cos.shape[-1] :] = np.stack([turned.real, turned.imag], axis=-1).reshape(B, T, H, -1)
    return out


@pytest.mark.parametrize("shape", MANY)
def test_many_tokens_equal_plain_and_numpy(rng, shape):
    args = many_inputs(rng, *shape)
    with lowering.interpreted():
        ours = np.asarray(jax.jit(attention.many, static_argnums=8)(*args), np.float64)
    np.testing.assert_allclose(ours, np.asarray(_attend_many_rows(*args), np.float64), atol=2e-2)
    np.testing.assert_allclose(ours, by_numpy(*args), atol=2e-2)
    exact = [a.astype(jnp.float32) if getattr(a, "dtype", None) == jnp.bfloat16 else a for a in args]
    np.testing.assert_allclose(_attend_many_rows(*exact), by_numpy(*args), atol=2e-5)


@pytest.mark.parametrize("block", [16, 32, 64])
def test_many_tokens_by_any_block_of_keys(rng, block):
    args = many_inputs(rng, 1, 3, 16, 32, 128, 300, 129, 4, [1100])
    with lowering.interpreted():
        ours = attention.many(*args, lowering.Tuning(rows=block))
    np.testing.assert_allclose(np.asarray(ours, np.float64), by_numpy(*args), atol=2e-2)


def test_gradients_of_many_tokens_are_those_of_the_plain_form(rng):
    q, keys, start, entries, rows, sink, *rest = many_inputs(rng, 1, 5, 4, 16, 8, 40, 12, 4, [200])

    def loss(fn):
        return lambda q, keys, entries, sink: jnp.sum(jnp.sin(fn(q, keys, start, entries, rows, sink, *rest)))

    with lowering.interpreted():
        ours = jax.grad(loss(_attend_many_kernel), argnums=(0, 1, 2, 3))(q, keys, entries, sink)
    plain = jax.grad(loss(_attend_many_rows), argnums=(0, 1, 2, 3))(q, keys, entries, sink)
    for mine, theirs in zip(ours, plain, strict=True):
        assert jnp.abs(theirs.astype(jnp.float32)).max() > 0
        np.testing.assert_allclose(np.float32(mine), np.float32(theirs), atol=2e-2)


def test_many_tokens_are_bfloat16():
    with lowering.interpreted(), pytest.raises(NotImplementedError, match="bfloat16"):
        attention.require_many(jnp.ones((1, 4, 16, 64)))
    with lowering.interpreted(), pytest.raises(NotImplementedError, match="channels"):
        attention.require_many(jnp.ones((1, 4, 16, 1024), jnp.bfloat16))


@pytest.mark.parametrize("read", [512, None])
def test_many_tokens_lower_for_cuda(read):
    shape = jax.ShapeDtypeStruct
    args = [shape((1, 256, 64, 512), jnp.bfloat16), shape((1, 384, 512), jnp.bfloat16), shape((1,), jnp.int32)]
    args += [shape((1, 2112, 512), jnp.bfloat16), shape((1, 256, read), jnp.int32) if read else None]
    args += [shape(n, jnp.float32) for n in ((64,), (1, 256, 32), (1, 256, 32))]
    assert "attention_many" in lowering.lower_for_cuda(lambda *a: attention.many(*a, 4), *args)
