"""Routed experts against a slow NumPy loop, and gradients against the formulation that computes every expert."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ds4jax import quant
from ds4jax.errors import DS4Error
from ds4jax.quant import QuantizedArray, experts
from tests.quant.blocks import random_blocks, random_tensor

D, F, LIMIT = 64, 32, 1.5
FORMATS_OF = {"gate": "Q8_0", "up": "IQ4_NL", "down": "MXFP4"}


def stacks(rng, n_experts, packed):
    """(gate, up, down) as arrays of the wanted kind and as float64."""
    shapes = {"gate": (n_experts, F, D), "up": (n_experts, F, D), "down": (n_experts, D, F)}
    if packed:
        made = {k: random_tensor(rng, FORMATS_OF[k], shape) for k, shape in shapes.items()}
        arrays = [quant.from_blocks(jnp.asarray(made[k][0]), FORMATS_OF[k], shapes[k]) for k in shapes]
        return arrays, [made[k][1].astype(np.float64) for k in shapes]
    values = [(rng.normal(size=shape) / 6).astype(np.float32) for shape in shapes.values()]
    return [jnp.asarray(v) for v in values], [v.astype(np.float64) for v in values]


def inputs(rng, tokens, packed):
    """x [T, D] that takes the activations to both sides of the limit."""
    return (rng.normal(size=(tokens, D)) * (0.2 if packed else 1)).astype(np.float32)


def oracle(x, gate, up, down, ids, weights):
    h = np.zeros((*ids.shape, F))
    y = np.zeros((len(x), D))
    for t, j in np.ndindex(*ids.shape):
        e = ids[t, j]
        a, b = np.minimum(gate[e] @ x[t], LIMIT), np.clip(up[e] @ x[t], -LIMIT, LIMIT)
        h[t, j] = weights[t, j] * a / (1 + np.exp(-a)) * b
        y[t] += down[e] @ h[t, j]
    return h, y


@jax.jit
def run(x, gate, up, down, ids, weights):
    h = quant.expert_swiglu(x, gate, up, ids, weights, LIMIT)
    return h, quant.expert_down(h, down, ids)


def assert_near(got, want, tolerance=4e-6):
    assert got.shape == want.shape
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0, atol=tolerance * np.abs(want).max())


def check(rng, ids, n_experts, packed):
    arrays, values = stacks(rng, n_experts, packed)
    x = inputs(rng, len(ids), packed)
    weights = rng.uniform(0.1, 1, ids.shape).astype(np.float32)
    h, y = run(x, *arrays, ids, weights)
    want_h, want_y = oracle(x.astype(np.float64), *values, ids, weights.astype(np.float64))
    assert h.dtype == y.dtype == jnp.float32
    assert_near(h, want_h)
    assert_near(y, want_y)


def distinct(rng, tokens, k, n_experts):
    return np.argsort(rng.random((tokens, n_experts)), axis=1)[:, :k].astype(np.int32)


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 127, 128, 129])
def test_packed(tokens):
    rng = np.random.default_rng(tokens)
    check(rng, distinct(rng, tokens, 3, 26), 26, packed=True)


@pytest.mark.parametrize(("tokens", "n_experts"), [(1, 26), (4, 26), (129, 26), (1, 5), (129, 5)])
def test_plain(tokens, n_experts):
    # 26 experts: each and grouped; 5: dense.
    rng = np.random.default_rng(tokens)
    check(rng, distinct(rng, tokens, 3, n_experts), n_experts, packed=False)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tokens", [7, 90])
@pytest.mark.parametrize("kind", ["one expert", "last expert", "repeated", "few"])
def test_uneven_routing(kind, tokens, packed):
    rng = np.random.default_rng(0)
    ids = {
        "one expert": np.full((tokens, 3), 11),
        "last expert": np.full((tokens, 3), 25),
        "repeated": np.stack([rng.integers(0, 26, tokens)] * 2 + [rng.integers(0, 26, tokens)], axis=1),
        "few": rng.choice([0, 7, 8, 25], (tokens, 3)),
    }[kind]
    check(rng, ids.astype(np.int32), 26, packed)


def test_repeated_experts_on_the_dense_path():
    rng = np.random.default_rng(1)
    check(rng, rng.integers(0, 3, (9, 4)).astype(np.int32), 3, packed=False)


def test_one_assignment_per_token():
    rng = np.random.default_rng(2)
    check(rng, rng.integers(0, 26, (70, 1)).astype(np.int32), 26, packed=True)


def test_experts_larger_than_a_tile(monkeypatch):
    monkeypatch.setattr(importlib.import_module("ds4jax.quant.matmul"), "TILE", 8 * D)
    rng = np.random.default_rng(3)
    arrays, values = stacks(rng, 20, packed=True)
    ids, weights = distinct(rng, 2, 3, 20), np.ones((2, 3), np.float32)
    x = inputs(rng, 2, True)
    h, y = run.__wrapped__(x, *arrays, ids, weights)
    want = oracle(x.astype(np.float64), *values, ids, weights)
    assert_near(h, want[0])
    assert_near(y, want[1])


def every_expert(x, gate, up, down, ids, weights):
    """The dense formulation, by einsum over all experts and one-hot choices: for jax.grad to differentiate."""
    high = jax.lax.Precision.HIGHEST
    one_hot = jax.nn.one_hot(ids, gate.shape[0])
    g = jnp.minimum(jnp.einsum("td,efd->tef", x, gate, precision=high), LIMIT)
    u = jnp.clip(jnp.einsum("td,efd->tef", x, up, precision=high), -LIMIT, LIMIT)
    h = jnp.einsum("tke,tk,tef->tkef", one_hot, weights, jax.nn.silu(g) * u, precision=high)
    return jnp.einsum("tkef,edf->td", h, down, precision=high)


@pytest.mark.parametrize(
    ("tokens", "n_experts", "packed"),
    [(4, 26, False), (40, 26, False), (40, 5, False), (4, 26, True), (60, 26, True)],
)
def test_gradients(tokens, n_experts, packed):
    rng = np.random.default_rng(4)
    arrays, values = stacks(rng, n_experts, packed)
    ids = rng.integers(0, n_experts, (tokens, 3)).astype(np.int32)  # some twice, and experts without tokens
    ids[:, 2] = np.where(rng.random(tokens) < 0.5, ids[:, 0], ids[:, 2])
    x = jnp.asarray(inputs(rng, tokens, packed))
    weights = jnp.asarray(rng.uniform(0.1, 1, ids.shape), jnp.float32)
    dy = jnp.asarray(rng.normal(size=(tokens, D)), jnp.float32)

    @jax.jit
    def pull(x, weights, arrays):
        if packed:  # integers inside: not differentiated
            f = lambda x, weights: run(x, *arrays, ids, weights)[1]  # noqa: E731
            return jax.vjp(f, x, weights)[1](dy)
        f = lambda x, weights, gate, up, down: run(x, gate, up, down, ids, weights)[1]  # noqa: E731
        return jax.vjp(f, x, weights, *arrays)[1](dy)

    f = jax.jit(lambda x, weights, *w: every_expert(x, *w, ids, weights))
    want = jax.vjp(f, x, weights, *(jnp.asarray(v, jnp.float32) for v in values))[1](dy)
    got = pull(x, weights, arrays)
    assert len(got) == (2 if packed else 5)
    for a, b in zip(got, want, strict=False):
        assert a.dtype == b.dtype
        assert_near(a, np.asarray(b, np.float64), 1e-5)


@pytest.mark.parametrize(("n_experts", "packed"), [(26, True), (5, False)])
def test_bfloat16(n_experts, packed):
    rng = np.random.default_rng(5)
    arrays, values = stacks(rng, n_experts, packed)
    ids = distinct(rng, 40, 3, n_experts)
    x = jnp.asarray(inputs(rng, 40, packed), jnp.bfloat16)
    weights = rng.uniform(0.1, 1, ids.shape).astype(np.float32)
    h, y = run(x, *arrays, ids, weights)
    want = oracle(np.asarray(x, np.float64), *values, ids, weights)
    assert h.dtype == y.dtype == jnp.bfloat16
    for a, b in zip((h, y), want, strict=True):
        error = np.asarray(a, np.float64) - b
        assert np.sqrt(np.mean(error**2)) < 0.01 * np.sqrt(np.mean(b**2))
    dx = jax.grad(lambda x: run(x, *arrays, ids, weights)[1].astype(jnp.float32).sum())(x)
    wide = jax.grad(lambda x: run(x, *arrays, ids, weights)[1].sum())(x.astype(jnp.float32))
    assert dx.dtype == jnp.bfloat16
    error = np.asarray(dx, np.float64) - wide
    assert np.sqrt(np.mean(error**2)) < 0.1 * np.sqrt(np.mean(np.square(wide)))


def test_nan_scale_reaches_the_tokens_of_its_expert_only():
    rng = np.random.default_rng(6)
    (gate, up, down), _ = stacks(rng, 26, packed=True)
    raw = random_blocks(rng, "Q8_0", 26 * F * D // 32).reshape(26, F, -1)
    raw[9, 3, :2] = 0, 0x7E
    gate = quant.from_blocks(raw, "Q8_0", (26, F, D))
    for tokens in (8, 80):
        ids = np.concatenate([[[9, 2, 9]], distinct(rng, tokens - 1, 3, 26)])
        x = rng.normal(size=(tokens, D)).astype(np.float32)
        h, y = run(x, gate, up, down, ids, np.ones(ids.shape, np.float32))
        chose = (ids == 9).any(1)
        assert 0 < chose.sum() < tokens
        np.testing.assert_array_equal(np.isnan(y).all(1), chose)
        np.testing.assert_array_equal(np.isnan(y).any(1), chose)
        np.testing.assert_array_equal(np.isnan(h[..., 3]), ids == 9)
    dx = jax.grad(lambda x: run(x, gate, up, down, ids, np.ones(ids.shape, np.float32))[1][~chose].sum())(x)
    assert np.isfinite(dx[~chose]).all() and np.isnan(dx[chose]).any()


@pytest.mark.parametrize("tokens", [4, 128])
def test_memory_stays_near_one_expert(tokens):
    # 32 experts of 256 KiB in float32 each.
    shape = (32, 128, 512)
    raw = jnp.asarray(random_tensor(np.random.default_rng(7), "IQ2_XXS", shape)[0])
    gate = quant.from_blocks(raw, "IQ2_XXS", shape)
    x, ids, weights = jnp.ones((tokens, 512)), jnp.zeros((tokens, 2), jnp.int32), jnp.ones((tokens, 2))

    def loss(x):
        return quant.expert_swiglu(x, gate, gate, ids, weights, LIMIT).sum()

    for f in (loss, jax.grad(loss)):
        memory = jax.jit(f).lower(x).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 2**21  # 8 MiB a stack


@pytest.mark.full
def test_under_vmap():
    rng = np.random.default_rng(8)
    (gate, up, _), values = stacks(rng, 26, packed=True)
    for tokens in (2, 30):
        ids = rng.integers(0, 26, (2, tokens, 3)).astype(np.int32)
        x = np.stack([inputs(rng, tokens, True) for _ in range(2)])
        weights = rng.uniform(0.1, 1, ids.shape).astype(np.float32)
        h = jax.vmap(lambda *a: quant.expert_swiglu(a[0], gate, up, a[1], a[2], LIMIT))(x, ids, weights)
        for i in range(2):
            assert_near(h[i], oracle(x[i].astype(np.float64), *values, ids[i], weights[i])[0])


def test_errors_name_shapes():
    x, ids, weights = np.ones((2, D), np.float32), np.zeros((2, 3), np.int32), np.ones((2, 3), np.float32)
    gate, up, down = stacks(np.random.default_rng(9), 4, packed=True)[0]
    assert isinstance(gate, QuantizedArray)
    h = np.ones((2, 3, F), np.float32)
    for call, words in (
        (lambda: quant.expert_swiglu(x[:, :32], gate, up, ids, weights, 1), ["gate", "[4, 32, 64]", "[4, 32, 32]"]),
        (lambda: quant.expert_swiglu(x, gate, up[:3], ids, weights, 1), ["up", "[3, 32, 64]"]),
        (lambda: quant.expert_swiglu(x, gate[0], up, ids, weights, 1), ["[32, 64]", "[E, F, D]"]),
        (lambda: quant.expert_swiglu(x, gate, up, ids, weights[:, :2], 1), ["weights", "[2, 2]"]),
        (lambda: quant.expert_swiglu(x, gate, up, ids[:1], weights[:1], 1), ["x is [2, 64]", "[1, 64]"]),
        (lambda: quant.expert_swiglu(x, gate, up, ids[0], weights, 1), ["ids", "[3]"]),
        (lambda: quant.expert_swiglu(x, gate, up, ids.astype(np.float32), weights, 1), ["integers", "float32"]),
        (lambda: quant.expert_swiglu(x[:0], gate, up, ids[:0], weights[:0], 1), ["T, k ≥ 1"]),
        (lambda: quant.expert_swiglu(ids, gate, up, ids, weights, 1), ["floating", "int32"]),
        (lambda: quant.expert_down(h[:, :2], down, ids), ["h is [2, 2, 32]"]),
        (lambda: quant.expert_down(h[..., :16], down, ids), ["down", "[4, 64, 32]"]),
        (lambda: quant.expert_down(h[0], down, ids), ["[T, k, F]"]),
        (lambda: quant.expert_down(h, down, ids, implementation="fast"), ["fast", "pallas", "xla"]),
    ):
        with pytest.raises(DS4Error) as e:
            call()
        assert all(word in str(e.value) for word in words), str(e.value)


def test_choice_of_path():
    # What the tests above rely on to reach all three.
    rng = np.random.default_rng(10)
    plain, packed = stacks(rng, 26, False)[0][0], stacks(rng, 26, True)[0][0]
    ids = jnp.zeros((4, 3), jnp.int32)
    assert not experts._is_dense(ids, F, plain) and experts._is_dense(ids, F, plain[:24])
    assert not experts._is_dense(ids, F, packed[:24]) and not experts._is_dense(ids, 2**24, plain[:24])
