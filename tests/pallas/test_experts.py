"""Routed experts by kernels, in interpret mode, beside plain JAX in float32."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ds4jax import quant
from ds4jax.pallas import decode, experts, lowering, matrix, tuned
from ds4jax.quant.matmul import codebook
from tests.pallas.tensors import FORMATS, activations, error, weight

E, F, D, K = 5, 19, 512, 3
LIMIT = 2.0
SCALE = 0.05  # products of about 1: an exponential makes a small relative error of a large one great
SMALL = lowering.Tuning(rows=8, units=4)
TILE = lowering.Tuning(rows=16, units=2, tokens=16)
BATCH = lowering.Tuning(rows=4, units=4, tokens=2)
GRIDS = [name for name, decoder in decode.DECODERS.items() if decoder.codebook == "grid"]


def choices(rng, tokens, which="random"):
    if which == "one expert":
        return jnp.full((tokens, K), 2, jnp.int32)
    if which == "outside":
        return jnp.asarray(rng.choice([-7, -1, E, 10 * E], (tokens, K)), jnp.int32)
    if which == "the ends":
        return jnp.asarray(rng.choice([0, E - 1], (tokens, K)), jnp.int32)
    return jnp.asarray(rng.integers(0, E, (tokens, K)), jnp.int32)


def stack(w):
    return experts.Stack(w.parts, w.format, codebook(w.format))


def check_swiglu(rng, tokens, ids, run, tuning, names=("Q8_0", "Q8_0"), tolerance=5e-3, dtype=jnp.bfloat16):
    gate, up = (weight(rng, name, (E, F, D)) for name in names)
    x, weights = SCALE * activations(rng, (tokens, D), dtype), jnp.asarray(rng.random((tokens, K)), jnp.float32)
    want = quant.expert_swiglu(x.astype(jnp.float32), gate, up, ids, weights, LIMIT, implementation="xla")
    with lowering.interpreted():
        got = jax.jit(lambda x, g, u: run(x, stack(g), stack(u), ids, weights, LIMIT, tuning))(x, gate, up)
    assert got.dtype == x.dtype
    assert error(got, want) < tolerance


def check_down(rng, tokens, ids, run, tuning, name="Q8_0", tolerance=4e-3, dtype=jnp.bfloat16):
    w, h = weight(rng, name, (E, 37, 256)), activations(rng, (tokens, K, 256), dtype)
    want = quant.expert_down(h.astype(jnp.float32), w, ids, implementation="xla")
    with lowering.interpreted():
        got = jax.jit(lambda h, w: run(h, stack(w), ids, tuning))(h, w)
    assert got.dtype == h.dtype
    assert error(got, want) < tolerance


@pytest.mark.parametrize("tokens, which", [(1, "random"), (8, "random"), (3, "one expert"), (2, "outside")])
def test_few_tokens(rng, tokens, which):
    ids = choices(rng, tokens, which)
    check_swiglu(rng, tokens, ids, experts.swiglu, SMALL, tolerance=1e-5, dtype=jnp.float32)
    check_down(rng, tokens, ids, experts.down, SMALL, tolerance=1e-5, dtype=jnp.float32)


@pytest.mark.parametrize("tokens, which", [(1, "random"), (40, "random"), (40, "one expert"), (23, "the ends")])
def test_grouped(rng, monkeypatch, tokens, which):
    monkeypatch.setattr(matrix, "LEAST", 8)  # tiles of which less than half is filled are multiplied by half
    ids = choices(rng, tokens, which)
    check_swiglu(rng, tokens, ids, matrix.grouped_swiglu, TILE)
    check_down(rng, tokens, ids, matrix.grouped_down, TILE)


def test_experts_that_do_not_exist_in_a_batch(rng):
    """As plain JAX takes them: the nearest that exists."""
    x, w, ids = activations(rng, (9, K, 256)), weight(rng, "Q8_0", (E, 37, 256)), choices(rng, 9, "outside")
    with lowering.interpreted():
        ours = quant.expert_down(x, w, ids, implementation="pallas")
    assert error(ours, quant.expert_down(x, w, jnp.clip(ids, 0, E - 1), implementation="xla")) < 4e-3


@pytest.mark.parametrize("tokens, which", [(9, "random"), (11, "one expert"), (23, "the ends")])
def test_batches_by_byte_products(rng, tokens, which):
    ids = choices(rng, tokens, which)
    if which == "random":
        check_swiglu(rng, tokens, ids, experts.grouped_swiglu, BATCH)
    check_down(rng, tokens, ids, experts.grouped_down, BATCH, tolerance=1e-5, dtype=jnp.float32)


@pytest.mark.full
@pytest.mark.parametrize("name", [*GRIDS, "Q2_K"])
def test_batches_by_byte_products_of_codebooks(rng, name):
    ids = choices(rng, 10)
    check_down(rng, 10, ids, experts.grouped_down, BATCH, name)


@pytest.mark.parametrize("M", [1, pytest.param(4, marks=pytest.mark.full)])
def test_any_number_of_assignments_a_program(rng, M):
    ids = choices(rng, 9, "the ends")
    check_down(rng, 9, ids, experts.grouped_down, lowering.Tuning(rows=16, units=4, tokens=M))


def test_gate_and_up_of_different_formats(rng):
    ids = choices(rng, 2)
    check_swiglu(rng, 2, ids, experts.swiglu, SMALL, ("IQ2_XXS", "Q2_K"))
    check_swiglu(rng, 2, ids, experts.grouped_swiglu, BATCH, ("IQ2_XXS", "Q2_K"))
    with pytest.raises(NotImplementedError, match="gate in Q4_K and up in Q2_K"):
        check_swiglu(rng, 20, choices(rng, 20), matrix.grouped_swiglu, TILE, ("Q4_K", "Q2_K"))


@pytest.mark.parametrize("gate, up", [pytest.param("IQ2_XXS", "IQ2_XXS", marks=pytest.mark.full), ("IQ2_XXS", "Q2_K")])
def test_experts_loaded_ahead(rng, gate, up):
    few, batch, tile = (dataclasses.replace(t, ahead=1) for t in (SMALL, BATCH, TILE))
    check_swiglu(rng, 2, choices(rng, 2), experts.swiglu, few, (gate, up))
    check_swiglu(rng, 9, choices(rng, 9, "the ends"), experts.grouped_swiglu, batch, (gate, up))
    if gate == up:
        check_swiglu(rng, 20, choices(rng, 20), matrix.grouped_swiglu, tile, (gate, up))


@pytest.mark.full
@pytest.mark.parametrize("name", FORMATS)
def test_every_format(rng, name):
    for tokens, swiglu, down, tuning in (
        (2, experts.swiglu, experts.down, SMALL), (9, experts.grouped_swiglu, experts.grouped_down, BATCH),
        (20, matrix.grouped_swiglu, matrix.grouped_down, TILE),
    ):  # fmt: skip
        ids = choices(rng, tokens)
        check_swiglu(rng, tokens, ids, swiglu, tuning, (name, name))
        check_down(rng, tokens, ids, down, tuning, name)


@pytest.mark.parametrize("which", ["random", "one expert", "the ends"])
@pytest.mark.parametrize("M", [4, 16])
@pytest.mark.parametrize("tokens", [1, 7, 50])
def test_schedule_covers_every_assignment_once(rng, tokens, which, M):
    ids = choices(rng, tokens, which)
    plain = jax.jit(lambda ids: experts.schedule_plain(ids, E, M))(ids)
    with lowering.interpreted():
        plan = jax.jit(lambda ids: experts.schedule(ids, E, M))(ids)
    used = np.asarray(plain.count) > 0
    for ours, theirs in zip(plan, plain, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    for name in ("order", "count"):
        np.testing.assert_array_equal(getattr(plan, name), getattr(plain, name))
    for name in ("expert", "start"):
        np.testing.assert_array_equal(np.asarray(getattr(plan, name))[used], np.asarray(getattr(plain, name))[used])
    seen = []
    for expert, start, count in zip(*(np.asarray(a) for a in plan[1:]), strict=True):
        assert 0 <= count <= M
        rows = np.asarray(plan.order)[start : start + count]
        assert (np.asarray(ids).reshape(-1)[rows] == expert).all()
        seen += rows.tolist()
    assert sorted(seen) == list(range(ids.size))
    assert len(plan.expert) <= ids.size // M + min(E, ids.size)


def test_long_runs_go_to_tensor_cores():
    assert tuned.by_bytes("Q8_0", 8 * E, E) and not tuned.by_bytes("Q8_0", 8 * E + 1, E)


def test_the_public_functions_reach_the_kernels(rng, monkeypatch):
    monkeypatch.setitem(tuned._DEFAULT, "bytes", BATCH)
    monkeypatch.setitem(tuned._DEFAULT, "swiglu", SMALL)
    gate, up, down = (weight(rng, "Q8_0", s) for s in ((E, F, D), (E, F, D), (E, 37, 256)))
    for tokens in (2, 9, 14):  # few, a batch by bytes, and on tensor cores
        ids, x, h = choices(rng, tokens), SCALE * activations(rng, (tokens, D)), activations(rng, (tokens, K, 256))
        weights = jnp.ones((tokens, K))
        with lowering.interpreted():
            got = [
                quant.expert_swiglu(x, gate, up, ids, weights, LIMIT, implementation="pallas"),
                quant.expert_down(h, down, ids, implementation="pallas"),
            ]
        plain = quant.expert_swiglu(x, gate, up, ids, weights, LIMIT), quant.expert_down(h, down, ids)
        for a, b in zip(got, plain, strict=True):
            assert error(a, b) < 6e-3


def test_gradients_are_the_plain_ones(rng):
    gate, up, down = (weight(rng, "Q8_0", s) for s in ((E, F, 64), (E, F, 64), (E, 8, 64)))
    ids, x, h = choices(rng, 2), activations(rng, (2, 64), jnp.float32), activations(rng, (2, K, 64), jnp.float32)
    weights = jnp.asarray(rng.random((2, K)), jnp.float32)

    def loss(x, weights, h, how):
        a = quant.expert_swiglu(x, gate, up, ids, weights, LIMIT, implementation=how)
        return jnp.sum(a**2) + jnp.sum(quant.expert_down(h, down, ids, implementation=how) ** 2)

    with lowering.interpreted():
        got = jax.grad(loss, (0, 1, 2))(x, weights, h, "pallas")
    for a, b in zip(got, jax.grad(loss, (0, 1, 2))(x, weights, h, "xla"), strict=True):
        assert error(a, b) < 1e-5


@pytest.mark.parametrize("tokens", [1, 64, 512])
def test_lowers_for_cuda(tokens):
    def shapes(name, *shape):
        fmt = quant.FORMATS[name]
        parts = {n: jax.ShapeDtypeStruct((*shape[:-1], shape[-1] // p.per), p.dtype) for n, p in fmt.parts.items()}
        return quant.QuantizedArray(parts, name)

    def layer(x, gate, up, down, ids, weights):
        h = quant.expert_swiglu(x, gate, up, ids, weights, 10.0, implementation="pallas")
        return quant.expert_down(h, down, ids, implementation="pallas")

    gate, down = shapes("IQ2_XXS", 256, 2048, 4096), shapes("Q2_K", 256, 4096, 2048)
    ids, weights = (jax.ShapeDtypeStruct((tokens, 6), t) for t in (jnp.int32, jnp.float32))
    x = jax.ShapeDtypeStruct((tokens, 4096), jnp.bfloat16)
    text = lowering.lower_for_cuda(layer, x, gate, gate, down, ids, weights)
    assert text.count("xla.gpu.triton") >= 2
