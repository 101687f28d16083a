"""Products by warpgroups, in interpret mode, beside plain JAX in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ds4jax import quant
from ds4jax.pallas import experts, lowering, tuned, warpgroups
from ds4jax.quant.matmul import codebook
from tests.pallas.tensors import activations, error, weight

E, K, LIMIT = 5, 3, 2.0
IDS = {"random": range(E), "one expert": [2], "the ends": [0, E - 1]}
HALF = 4e-4  # what weights lose that are rounded to float16
BFLOAT16 = 4e-3  # what results lose


def shape(warps=4, **kw):
    return lowering.Tuning(**{"stages": 1, "warps": warps, "tokens": 16, "ahead": 1} | kw)


def stack(w):
    return experts.Stack(w.parts, w.format, codebook(w.format))


def choices(rng, tokens, which):
    return jnp.asarray(rng.choice(IDS[which], (tokens, K)), jnp.int32)


def down(h, w, ids, tuning=None):
    with lowering.interpreted():
        return jax.jit(lambda h, w: warpgroups.down(h, stack(w), ids, tuning))(h, w)


def plain_down(h, w, ids):
    return quant.expert_down(h.astype(jnp.float32), w, ids, implementation="xla")


def matmul(x, w, tuning=None, out_dtype=jnp.float32):
    with lowering.interpreted():
        return jax.jit(lambda x, w: warpgroups.matmul(x, w.parts, w.format, out_dtype, tuning=tuning))(x, w)


def plain(x, w):
    return quant.matmul(x.astype(jnp.float32), w, implementation="xla")


# ---- formats ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", warpgroups.FORMATS)
def test_every_column_has_a_place(name):
    format = warpgroups.FORMATS[name]
    order = warpgroups._order(format, 2 * format.span)
    assert sorted(order) == list(range(2 * format.span))


# ---- activations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", warpgroups.FORMATS)
def test_panels_hold_the_activations(rng, name):
    format, x = warpgroups.FORMATS[name], np.float32(activations(rng, (6, 768)))
    x[:4] *= np.float32([1e30, 1e-30, 0.0, 1.0])[:, None]
    x = jnp.asarray(x, jnp.bfloat16)
    source = jnp.asarray([5, 0, 1, 1, 2, 3, 4, 0], jnp.int32)
    with lowering.interpreted():
        words, undo = warpgroups._panels(x, format, source)
    assert words.shape == (768 // 64, 8, 32)
    row, word = np.arange(8)[:, None], np.arange(32)
    chunk = np.asarray(lowering.panel_chunk(jnp.asarray(row), jnp.asarray(word >> 2)))
    lines = np.asarray(words)[:, row, 4 * chunk + (word & 3)]  # [panels, 8, 32]
    numbers = np.ascontiguousarray(lines).view(np.float16).astype(np.float64).transpose(1, 0, 2).reshape(8, 768)
    assert np.abs(numbers).max() < 2**15
    got = numbers * np.asarray(undo, np.float64)[:, None] * 2.0**format.shift
    want = np.asarray(x, np.float64)[np.asarray(source)][:, warpgroups._order(format, 768)]
    np.testing.assert_allclose(got, want, rtol=2**-11, atol=1e-45)


def test_rows_of_any_size(rng):
    """Every row has a range of its own, and what is not finite shows in its row alone."""
    w, x = weight(rng, "Q8_0", (19, 256)), np.float32(activations(rng, (12, 256)))
    sizes = [1e30, 1e-30, 1e36, 1.0, 0.0]
    x[: len(sizes)] *= np.asarray(sizes, np.float32)[:, None]
    x = jnp.asarray(x, jnp.bfloat16)
    broken = x.at[6, 0].set(jnp.nan).at[7, 255].set(jnp.inf).at[8, 80].set(-jnp.inf)
    got, want = np.asarray(matmul(broken, w)), np.asarray(plain(x, w))
    for i in (0, 1, 2, 3, 4, 5, 9, 10, 11):
        assert np.array_equal(got[i], want[i]) if i == 4 else error(got[i], want[i]) < HALF, i
    assert np.isnan(got[6:9]).all()


# ---- one matrix ------------------------------------------------------------------------------------------------------


# out of 37 and 70: the last program's rows are partly masked; 130 rows of activations are two tiles
@pytest.mark.parametrize("rows, out, K, tuning", [
    (1, 37, 256, shape()), (9, 37, 384, shape()), (64, 70, 256, shape(parts=2)), (130, 37, 256, shape(parts=2)),
    (33, 70, 512, None), pytest.param(127, 64, 128, shape(8), marks=pytest.mark.full),
    pytest.param(128, 64, 1024, shape(8, parts=4), marks=pytest.mark.full),
    pytest.param(129, 257, 512, shape(16, ahead=1), marks=pytest.mark.full),
])  # fmt: skip
def test_equals_plain_jax(rng, rows, out, K, tuning):
    w, x = weight(rng, "Q8_0", (out, K)), activations(rng, (rows, K))
    assert error(matmul(x, w, tuning), plain(x, w)) < HALF


def test_stacks(rng):
    w, x = weight(rng, "Q8_0", (3, 19, 256)), activations(rng, (10, 3, 256))
    got = matmul(x, w, shape(parts=2), jnp.bfloat16)
    assert got.dtype == jnp.bfloat16 and got.shape == (10, 3, 19)
    assert error(got, plain(x, w)) < BFLOAT16


def test_refusals(rng):
    w = weight(rng, "Q8_0", (16, 256))
    with pytest.raises(NotImplementedError, match="3 rows of float32 and Q8_0"):
        matmul(activations(rng, (3, 256), jnp.float32), w)
    with pytest.raises(NotImplementedError, match="rows of 96"):
        matmul(activations(rng, (3, 96)), weight(rng, "Q8_0", (16, 96)))
    with pytest.raises(NotImplementedError, match="2 spans are not 3 equal parts"):
        matmul(activations(rng, (3, 256)), w, shape(parts=3))
    with pytest.raises(NotImplementedError, match="Q4_K, rows of 256"):
        down(activations(rng, (4, K, 256)), weight(rng, "Q4_K", (E, 16, 256)), choices(rng, 4, "random"))


# ---- routed experts --------------------------------------------------------------------------------------------------


# of IQ2_XXS, which takes longest to compile, one width: that of its tiles
@pytest.mark.parametrize("name, tokens, which, tuning", [
    ("IQ2_XXS", 11, "random", shape(tokens=8)), ("Q2_K", 1, "random", shape()), ("Q2_K", 11, "random", shape()),
    ("Q8_0", 11, "one expert", shape()), ("Q8_0", 7, "the ends", shape(tokens=8)),
    *(pytest.param(name, *case, marks=pytest.mark.full) for name in warpgroups.FORMATS for case in (
        (1, "random", shape()), (11, "one expert", shape()), (60, "random", shape(8, tokens=32)),
        (130, "the ends", shape(16, tokens=128)),
    )),
])  # fmt: skip
def test_down(rng, name, tokens, which, tuning):
    h, w, ids = activations(rng, (tokens, K, 256)), weight(rng, name, (E, 70, 256)), choices(rng, tokens, which)
    got = down(h, w, ids, tuning)
    assert got.dtype == jnp.bfloat16 and error(got, plain_down(h, w, ids)) < BFLOAT16


@pytest.mark.parametrize("name, tokens, which, M", [
    ("IQ2_XXS", 11, "random", 8), ("Q2_K", 5, "one expert", 16),
    *(pytest.param(name, 23, "the ends", 16, marks=pytest.mark.full) for name in warpgroups.FORMATS),
])  # fmt: skip
def test_swiglu(rng, name, tokens, which, M):
    x, (gate, up) = activations(rng, (tokens, 512)), (weight(rng, name, (E, 37, 512)) for _ in range(2))
    ids, weights = choices(rng, tokens, which), jnp.asarray(rng.random((tokens, K)), jnp.float32)

    def run(x, gate, up):
        return warpgroups.swiglu(x, stack(gate), stack(up), ids, weights, LIMIT, shape(tokens=M))

    with lowering.interpreted():
        got = jax.jit(run)(x, gate, up)
    want = quant.expert_swiglu(x.astype(jnp.float32), gate, up, ids, weights, LIMIT, implementation="xla")
    assert got.dtype == jnp.bfloat16 and error(got, want) < BFLOAT16


@pytest.mark.parametrize("tokens, which, M, apart", [
    (1, "random", 8, 8), (3, "one expert", 16, 8), (23, "the ends", 8, 8), (130, "random", 64, 16), (9, "random", 4, 1),
])  # fmt: skip
def test_tiles_that_stand_apart(rng, tokens, which, M, apart):
    ids = np.asarray(choices(rng, tokens, which))
    plan = jax.tree.map(np.asarray, experts.schedule_plain(jnp.asarray(ids), E, M, apart))
    met = []
    for e, start, count in zip(plan.expert, plan.start, plan.count, strict=True):
        if count:
            assert start % apart == 0 and start + M <= len(plan.order)
            its = plan.order[start : start + count]
            assert (ids.reshape(-1)[its] == e).all()
            met += list(its)
    assert sorted(met) == list(range(ids.size))
    assert ((plan.order >= 0) & (plan.order < ids.size)).all()


def test_what_shared_memory_holds(monkeypatch):
    room = warpgroups._Memory.room
    assert [room(warpgroups.FORMATS[name], 16, 128, 1) for name in ("IQ2_XXS", "Q2_K", "Q8_0")] == [4, 4, 3]
    assert room(warpgroups.FORMATS["Q8_0"], 16, 128, 2) == 0 and room(warpgroups.FORMATS["Q8_0"], 8, 128, 2) == 4


# ---- the choice ------------------------------------------------------------------------------------------------------


def packed(name, *shape):
    fmt = quant.FORMATS[name]
    parts = {n: jax.ShapeDtypeStruct((*shape[:-1], shape[-1] // p.per), p.dtype) for n, p in fmt.parts.items()}
    return quant.QuantizedArray(parts, name)


def layer(tokens, k=6, E=8, F=256, D=512):
    def run(x, gate, up, down, ids, weights):
        h = quant.expert_swiglu(x, gate, up, ids, weights, 10.0, implementation="pallas")
        return quant.expert_down(h, down, ids, implementation="pallas")

    stacks = [
        packed(name, E, *s) for name, s in zip(("IQ2_XXS", "IQ2_XXS", "Q2_K"), ((F, D), (F, D), (D, F)), strict=True)
    ]
    ids, weights = (jax.ShapeDtypeStruct((tokens, k), t) for t in (jnp.int32, jnp.float32))
    return lowering.lower_for_cuda(run, jax.ShapeDtypeStruct((tokens, D), jnp.bfloat16), *stacks, ids, weights)


def product(rows, *shape):
    run = lambda x, w: quant.matmul(x, w, implementation="pallas")  # noqa: E731
    return lowering.lower_for_cuda(run, jax.ShapeDtypeStruct((rows, shape[-1]), jnp.bfloat16), packed("Q8_0", *shape))


def names(text):
    return [n for n in ("warpgroups_swiglu_iq2_xxs", "warpgroups_down_q2_k", "warpgroups_q8_0") if n in text]


def test_what_goes_to_warpgroups():
    assert not names(layer(16))  # 96 assignments for 8 experts
    text = layer(17)
    assert names(text) == ["warpgroups_swiglu_iq2_xxs", "warpgroups_down_q2_k"]
    assert "m64n16k16.f32.f16.f16" in text and "cp.async.bulk.shared::cluster.global" in text
    assert names(product(33, 512, 1024)) == ["warpgroups_q8_0"] and names(product(128, 512, 1024)) == [
        "warpgroups_q8_0"
    ]
    assert not names(product(32, 512, 1024)) and not names(product(129, 512, 1024)) and not names(product(40, 512, 96))


@pytest.mark.parametrize("capability", [8.0, 8.9, 10.0])
def test_other_devices_go_without(on_device, capability):
    """No path is Hopper's alone."""
    on_device(capability)
    assert not names(layer(17)) and "integers_down_q2_k" in layer(17)
    assert "grouped_swiglu_iq2_xxs" in layer(33)
    assert "fragments_q8_0" in product(64, 512, 1024) and "expand_q8_0" in product(65, 512, 1024)


@pytest.mark.parametrize("tokens", [1024, 8192])
def test_flash_lowers_for_cuda(tokens):
    text = layer(tokens, E=256, F=2048, D=4096)
    assert len(names(text)) == 2
    assert f"m64n{tuned.warpgroups('Q2_K', 4096, 2048, 6 * tokens, 256).tokens}k16" in text
