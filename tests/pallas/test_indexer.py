"""The indexer's kernels beside plain JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ds4jax.model import attention
from ds4jax.model.attention import choose_entries, choose_entries_many, index_scores, select_entries
from ds4jax.model.cache import Paged
from ds4jax.pallas import indexer, lowering


def inputs(rng, B, H, d, N, dtype=jnp.float32):
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    return normal(B, H, d), jnp.asarray(rng.normal(size=(B, H)), jnp.float32), normal(B, N, d)


@pytest.mark.parametrize("N, seen", [(1, [1, 0]), (63, [63, 5]), (64, [64, 1]), (130, [129, 65]), (300, [300, 0])])
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_scores(rng, N, seen, dtype, tolerance):
    q, w, keys = inputs(rng, 2, 16, 32, N, dtype)
    rows = jnp.asarray(rng.permutation(2 * N).reshape(2, N), jnp.int32)
    flat = jnp.zeros((2 * N, 32), dtype).at[rows].set(keys)
    with lowering.interpreted():
        ours = np.asarray(indexer.scores(q, w, flat, rows, jnp.asarray(seen, jnp.int32)))
    product = np.einsum("bhd,bnd->bhn", np.float64(q), np.float64(keys))
    want = np.einsum("bh,bhn->bn", np.float64(w), np.maximum(product, 0))
    for b, n in enumerate(seen):
        np.testing.assert_allclose(ours[b, :n], want[b, :n], atol=tolerance * np.abs(want).max())
        assert (ours[b, n:] == -np.inf).all()


@pytest.mark.parametrize("pairs", [0, 1 << 28])  # by the K-th value's bits, and by counting
@pytest.mark.parametrize(
    "N, K", [(1, 1), (7, 3), (31, 5), (32, 32), (33, 1), (128, 128), (129, 16), (1000, 512), (3000, 300), (20000, 64)]
)
def test_best_are_those_of_top_k(rng, monkeypatch, N, K, pairs):
    monkeypatch.setattr(indexer, "PAIRS", pairs)
    monkeypatch.setattr(indexer, "PAIRS_OF_MANY", pairs)
    values = rng.normal(size=(2, N)).astype(np.float32)
    values[1] = np.round(values[1])  # many equal ones
    values[1, : N // 2] = -np.inf
    with lowering.interpreted():
        ours = np.asarray(indexer.best(jnp.asarray(values), K))
    top, index = jax.lax.top_k(jnp.asarray(values), K)
    want = np.where(np.asarray(top) == -np.inf, -1, np.asarray(index))
    for mine, theirs in zip(ours, want, strict=True):
        assert sorted(mine) == sorted(theirs)


def test_extremes():
    tiny = np.float32(1e-45)
    values = np.asarray([[0.0, -0.0, tiny, -tiny, np.inf, 3e38, -3e38, -np.inf]], np.float32)
    with lowering.interpreted():
        for K, want in ((1, [4]), (2, [4, 5]), (3, [2, 4, 5]), (8, [-1, 0, 1, 2, 3, 4, 5, 6])):
            assert sorted(np.asarray(indexer.best(jnp.asarray(values), K))[0]) == want


@pytest.mark.parametrize("paged", [False, True])
def test_choice_equals_the_plain_one(rng, paged):
    q, w, keys = inputs(rng, 2, 16, 32, 96)
    seen = jnp.asarray([90, 11], jnp.int32)
    stored = keys
    if paged:
        pages = jnp.asarray([[2, 0, 5], [1, 4, 6]], jnp.int32)  # 6: no page
        pool = jnp.zeros((6, 32, 32)).at[pages].set(keys.reshape(2, 3, 32, 32), mode="drop")
        stored = Paged(pool, pages)
    with lowering.interpreted():
        ours = np.asarray(choose_entries(q, w, stored, seen, 24, implementation="pallas"))
    plain = np.asarray(choose_entries(q, w, stored, seen, 24, implementation="xla"))
    assert [set(r) for r in ours] == [set(r) for r in plain]
    assert (plain[1] >= 0).sum() == 11


def test_many_queries_choose_as_one_does(rng):
    scores = jnp.asarray(rng.normal(size=(2, 5, 70)), jnp.float32)
    visible = jnp.arange(70) < jnp.asarray([[70, 3, 0, 24, 25]] * 2)[..., None]
    with lowering.interpreted():
        ours = np.asarray(select_entries(scores, visible, 24, ordered=False, implementation="pallas"))
    plain = np.asarray(select_entries(scores, visible, 24))
    assert ours.shape == plain.shape
    np.testing.assert_array_equal(np.sort(ours), np.sort(plain))


@pytest.mark.parametrize("T, N, start", [(1, 5, [0]), (3, 64, [250]), (16, 65, [0]), (17, 200, [600]), (40, 130, [9])])
def test_scores_of_many_queries(rng, T, N, start):
    q, w, _ = inputs(rng, T, 16, 32, 1)
    keys = jnp.asarray(rng.normal(size=(1, N, 32)), jnp.float32)
    with lowering.interpreted():
        ours = np.asarray(indexer.scores_many(q[None], w[None], keys, jnp.asarray(start, jnp.int32), 4))[0]
    want = np.asarray(index_scores(q[None], w[None], keys))[0]
    for t in range(T):
        seen = min(N, (start[0] + t + 1) // 4)
        np.testing.assert_allclose(ours[t, :seen], want[t, :seen], atol=1e-5 * np.abs(want).max())
        assert (ours[t, seen:] == -np.inf).all()


@pytest.mark.parametrize("nbytes", [attention.SCORE_BYTES, 2048])
def test_many_tokens_choose_as_plain_jax_does(rng, monkeypatch, nbytes):
    monkeypatch.setattr(attention, "SCORE_BYTES", nbytes)  # the second: a few tokens at a time
    B, T, N, K, start = 2, 21, 70, 24, jnp.asarray([0, 200], jnp.int32)
    q, w, _ = inputs(rng, B * T, 16, 32, 1)
    q, w = q.reshape(B, T, 16, 32), w.reshape(B, T, 16)
    keys = jnp.asarray(rng.normal(size=(B, N, 32)), jnp.float32)
    with lowering.interpreted():
        ours = np.asarray(choose_entries_many(q, w, keys, start, K, 4, implementation="pallas"))
    finished = (start[:, None] + jnp.arange(1, T + 1)) // 4
    plain = np.asarray(select_entries(index_scores(q, w, keys), jnp.arange(N) < finished[..., None], K))
    np.testing.assert_array_equal(np.sort(ours), np.sort(plain))
    own = np.asarray(choose_entries_many(q, w, keys, start, K, 4, implementation="xla"))
    np.testing.assert_array_equal(np.sort(own), np.sort(plain))
    assert (np.diff((ours < 0).astype(int)) >= 0).all()  # what is missing comes last


def test_as_many_as_there_are_need_no_scores(rng):
    q, w, keys = inputs(rng, 2, 16, 32, 24)
    seen = jnp.asarray([20, 3], jnp.int32)
    few = np.asarray(choose_entries(q, w, keys, seen, 24))
    scored = np.asarray(choose_entries(q, w, jnp.pad(keys, ((0, 0), (0, 1), (0, 0))), seen, 24, implementation="xla"))
    np.testing.assert_array_equal(np.sort(few), np.sort(scored))


def test_a_choice_has_no_gradient(rng):
    q, w, keys = inputs(rng, 1, 16, 32, 64)

    def loss(q):
        return jnp.sum(q) + jnp.sum(choose_entries(q, w, keys, jnp.asarray([60]), 8, implementation="pallas"))

    with lowering.interpreted():
        np.testing.assert_array_equal(jax.grad(loss)(q), 1)


@pytest.mark.parametrize(
    "B, H, d, K", [(257, 16, 32, 8), (1, 8, 32, 8), (1, 24, 32, 8), (1, 16, 48, 8), (1, 16, 32, 5000)]
)
def test_what_no_kernel_takes_is_left_to_xla(B, H, d, K):
    with lowering.interpreted(), pytest.raises(NotImplementedError):
        indexer.require(jnp.ones((B, H, d)), K)


@pytest.mark.parametrize("N", [1040, 65536])
def test_lowers_for_cuda(N):
    shape = jax.ShapeDtypeStruct
    args = shape((1, 64, 128), jnp.bfloat16), shape((1, 64), jnp.float32), shape((1, N, 128), jnp.bfloat16)

    def run(q, w, keys, seen):
        return choose_entries(q, w, keys, seen, 512, implementation="pallas")

    text = lowering.lower_for_cuda(run, *args, shape((1,), jnp.int32))
    assert "index_scores" in text and "index_best" in text


@pytest.mark.parametrize("T, N", [(1, 3), (5, 700), (4096, 65536)])
def test_many_tokens_lower_for_cuda(T, N):
    shape = jax.ShapeDtypeStruct
    args = shape((1, T, 64, 128), jnp.bfloat16), shape((1, T, 64), jnp.float32), shape((1, N, 128), jnp.bfloat16)

    def run(q, w, keys, start):
        return choose_entries_many(q, w, keys, start, 512, 4, implementation="pallas")

    text = lowering.lower_for_cuda(run, *args, shape((1,), jnp.int32))
    assert "index_scores_many" in text and "index_best" in text
