"""Routed experts on integer tensor cores, in interpret mode, beside plain JAX in float32."""

import concurrent.futures
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ds4jax import quant
from ds4jax.pallas import experts, integers, lowering, tuned
from ds4jax.quant.matmul import codebook
from tests.pallas.tensors import activations, error, weight

E, OUT, K = 5, 37, 3  # OUT: the last program's rows are partly masked
LIMIT = 2.0
TOP = 127 * 256
IDS = {"random": range(E), "one expert": [2], "the ends": [0, E - 1], "outside": [-7, -1, E, 10 * E]}
EXACT = 5e-7  # what float32 sums lose


def shape(warps=1, **kw):
    return lowering.Tuning(stages=1, warps=warps, **kw)


def choices(rng, tokens, which):
    if which == "uneven":  # tiles of many lengths, and experts without any
        return jnp.asarray(rng.permutation(np.repeat([0, 2, 4], [1, 6, tokens * K - 7])).reshape(tokens, K), jnp.int32)
    return jnp.asarray(rng.choice(IDS[which], (tokens, K)), jnp.int32)


def whole(rng, shape):
    """bfloat16 numbers that two bytes hold exactly: every block's largest is 127·256, so its scale is 1."""
    x = rng.integers(-255, 256, shape) << rng.integers(0, 7, shape)
    x[..., rng.integers(0, 256) :: 256] = rng.choice([-TOP, TOP])
    return jnp.asarray(x, jnp.bfloat16)


def stack(w):
    return experts.Stack(w.parts, w.format, codebook(w.format))


@pytest.fixture
def by(monkeypatch):
    """Chooses the way of batches of IQ2_XXS."""
    return lambda way: monkeypatch.setattr(integers, "RUNS_UP_TO", {"runs": 10**6, "tokens": 0}[way])


@pytest.fixture
def in_float32(monkeypatch):
    """`integers.down` rounds its sums no more."""
    monkeypatch.setattr(integers, "combine", lambda y, T, dtype: experts.combine(y, T, jnp.float32))


def down(h, w, ids, tuning):
    with lowering.interpreted():
        return jax.jit(lambda h, w: integers.down(h, stack(w), ids, tuning))(h, w)


def plain_down(h, w, ids):
    return quant.expert_down(h.astype(jnp.float32), w, ids, implementation="xla")


def swiglu(x, gate, up, ids, weights, tuning):
    with lowering.interpreted():
        run = lambda x, g, u: integers.swiglu(x, stack(g), stack(u), ids, weights, LIMIT, tuning)  # noqa: E731
        return jax.jit(run)(x, gate, up)


def plain_swiglu(x, gate, up, ids, weights):
    return quant.expert_swiglu(x.astype(jnp.float32), gate, up, ids, weights, LIMIT, implementation="xla")


@pytest.mark.parametrize("name, tokens, which, F, tuning", [
    ("IQ2_XXS", 8, "outside", 1280, shape(2, parts=2)),  # spans of two blocks reach past the end
    ("Q2_K", 1, "random", 768, shape(4, parts=4)),  # a part of nothing but zeros
    ("Q2_K", 3, "random", 512, shape(2, parts=2)),
])  # fmt: skip
def test_few_tokens(rng, in_float32, name, tokens, which, F, tuning):
    w, h, ids = weight(rng, name, (E, OUT, F)), whole(rng, (tokens, K, F)), choices(rng, tokens, which)
    assert error(down(h, w, ids, tuning), plain_down(h, w, ids)) < EXACT


@pytest.mark.parametrize("name, way, tokens, which, F, tuning", [
    ("IQ2_XXS", "runs", 9, "uneven", 256, shape(2, tokens=4, parts=2)),
    ("IQ2_XXS", "tokens", 9, "one expert", 768, shape(2, tokens=8, parts=2)),
    ("Q2_K", "tokens", 21, "uneven", 512, shape(tokens=16)),
    ("IQ2_XXS", "runs", 9, "uneven", 512, shape(tokens=4)),
])  # fmt: skip
def test_batches(rng, in_float32, by, name, way, tokens, which, F, tuning):
    by(way)
    w, h, ids = weight(rng, name, (E, OUT, F)), whole(rng, (tokens, K, F)), choices(rng, tokens, which)
    assert error(down(h, w, ids, tuning), plain_down(h, w, ids)) < EXACT


@pytest.mark.full
@pytest.mark.parametrize("tokens, which, F, parts", [
    (1, "random", 768, 2), (3, "the ends", 256, 1), (3, "one expert", 512, 4), (8, "outside", 768, 1),
])  # fmt: skip
@pytest.mark.parametrize("name", integers.TOKENS)
def test_more_of_few_tokens(rng, in_float32, name, tokens, which, F, parts):
    w, h, ids = weight(rng, name, (E, 19, F)), whole(rng, (tokens, K, F)), choices(rng, tokens, which)
    assert error(down(h, w, ids, shape(parts, parts=parts)), plain_down(h, w, ids)) < EXACT


@pytest.mark.full
@pytest.mark.parametrize("name, way, M, parts", [
    ("IQ2_XXS", "runs", 1, 1), ("IQ2_XXS", "runs", 2, 4), ("IQ2_XXS", "runs", 8, 1), ("IQ2_XXS", "tokens", 4, 1),
    ("IQ2_XXS", "tokens", 16, 4), ("Q2_K", "tokens", 2, 1), ("Q2_K", "tokens", 8, 2), ("Q2_K", "tokens", 16, 4),
])  # fmt: skip
@pytest.mark.parametrize("which, F", [("the ends", 768), ("uneven", 512)])
def test_more_batches(rng, in_float32, by, name, way, M, parts, which, F):
    by(way)
    w, h, ids = weight(rng, name, (E, 19, F)), whole(rng, (21, K, F)), choices(rng, 21, which)
    assert error(down(h, w, ids, shape(parts, parts=parts, tokens=M)), plain_down(h, w, ids)) < EXACT


@pytest.mark.parametrize("name, way, tokens, tuning", [
    ("IQ2_XXS", "runs", 3, shape(2, parts=2)),
    pytest.param("IQ2_XXS", "runs", 9, shape(tokens=4), marks=pytest.mark.full),
    pytest.param("IQ2_XXS", "tokens", 9, shape(2, tokens=8, parts=2), marks=pytest.mark.full),
    pytest.param("Q2_K", "tokens", 3, shape(2, parts=2), marks=pytest.mark.full),
    ("Q2_K", "tokens", 9, shape(4, tokens=4)),
    pytest.param("Q2_K", "tokens", 21, shape(2, tokens=16), marks=pytest.mark.full),
])  # fmt: skip
def test_swiglu(rng, by, name, way, tokens, tuning):
    by(way)
    gate, up = (weight(rng, name, (E, OUT, 768)) for _ in range(2))
    # products of about 1, by a power of two: they stay whole numbers
    x, weights = 2.0**-17 * whole(rng, (tokens, 768)), jnp.asarray(rng.random((tokens, K)), jnp.float32)
    ids = choices(rng, tokens, "the ends" if tokens == 9 else "random")
    x = x.at[1].set(0)
    want = np.asarray(plain_swiglu(x, gate, up, ids, weights).astype(jnp.bfloat16))
    got = swiglu(x.at[0, 700].set(float(rng.choice([jnp.nan, jnp.inf, -jnp.inf]))), gate, up, ids, weights, tuning)
    assert got.dtype == jnp.bfloat16
    assert error(got[1:], want[1:]) < 3e-4  # a few are between two bfloat16
    assert np.isnan(np.asarray(got[0])).all() and not np.asarray(got[1]).any()


@pytest.mark.parametrize("name, way, tokens", [
    ("Q2_K", "tokens", 2), *(pytest.param(*case, marks=pytest.mark.full) for case in (
        ("IQ2_XXS", "runs", 2), ("IQ2_XXS", "tokens", 10), ("Q2_K", "tokens", 10))),
])  # fmt: skip
def test_any_activations_keep_16_bits(rng, in_float32, by, name, way, tokens):
    by(way)
    w, h, ids = weight(rng, name, (E, 19, 512)), activations(rng, (tokens, K, 512)), choices(rng, tokens, "one expert")
    factor = jnp.asarray([1e-20, 1e20], jnp.bfloat16)[jnp.arange(tokens) % 2]
    got, want = down(h * factor[:, None, None], w, ids, shape(tokens=8)), plain_down(h * factor[:, None, None], w, ids)
    for of_size in (slice(0, None, 2), slice(1, None, 2)):
        assert error(got[of_size], want[of_size]) < 5e-5


@pytest.mark.parametrize("name, way, tokens", [
    ("Q2_K", "tokens", 5), *(pytest.param(*case, marks=pytest.mark.full) for case in (
        ("IQ2_XXS", "runs", 5), ("IQ2_XXS", "runs", 9), ("IQ2_XXS", "tokens", 9), ("Q2_K", "tokens", 9))),
])  # fmt: skip
def test_what_is_not_finite_shows_in_its_row_alone(rng, in_float32, by, name, way, tokens):
    by(way)
    w, ids = weight(rng, name, (E, 19, 768)), choices(rng, tokens, "the ends")
    h = whole(rng, (tokens, K, 768)).at[2].set(0)
    broken = h.at[0, 1, 700].set(jnp.inf).at[3, 0, 0].set(-jnp.inf).at[3, 2].set(jnp.nan).at[4, 1, 300].set(jnp.nan)
    got, want = np.asarray(down(broken, w, ids, shape(tokens=4))), plain_down(h, w, ids)
    whole_rows = np.delete(np.arange(tokens), [0, 3, 4])
    assert np.isnan(got[[0, 3, 4]]).all() and (got[2] == 0).all()
    assert error(got[whole_rows], want[whole_rows]) < EXACT


# ---- activations -----------------------------------------------------------------------------------------------------

ORDERS = {"IQ2_XXS": integers.TOKENS["IQ2_XXS"], "Q2_K": integers.TOKENS["Q2_K"], "runs": integers.RUNS["IQ2_XXS"]}


def split(x, how, blocks):
    with lowering.interpreted():
        return jax.jit(lambda x: integers.split(x, how, blocks))(x)


def whole_numbers(digits, how):
    """The two bytes [rows, elements, 2] of `Digits`, by its description."""
    words = np.asarray(digits.words)
    rows, products = len(words), len(how.order)
    its = words.view(np.int8).reshape(rows, -1, products // 2, 4, 2, 2, 8)  # span, p, t, byte, product, element
    its = np.moveaxis(its, 5, 3).reshape(rows, -1, products, 4, 2, 8)
    out = np.zeros((rows, its.shape[1], how.order.size, 8, 2), np.int64)
    out[:, :, how.order] = np.moveaxis(its, 4, 5)
    return out.reshape(rows, -1, 2)


@pytest.mark.parametrize("name", ORDERS)
def test_digits_hold_16_bits(rng, name):
    how = ORDERS[name]
    x = np.asarray(activations(rng, (4, 768)) * jnp.asarray([1e-20, 1.0, 1e20, 0.0])[:, None], np.float64)
    x[1, 256:512] *= 1e-10  # a block has a scale of its own
    digits = split(jnp.asarray(x, jnp.bfloat16), how, 4)
    both = whole_numbers(digits, how)
    x, scale = np.pad(np.float64(jnp.asarray(x, jnp.bfloat16)), ((0, 0), (0, 256))), np.asarray(digits.scale)
    got = (256 * both[..., 0] + both[..., 1]) * scale.astype(np.float64).repeat(256, 1)
    peak = np.abs(x).reshape(4, 4, 256).max(-1).repeat(256, 1)
    assert (np.abs(got - x) <= peak / 65_000).all()
    assert np.isfinite(scale).all() and not both[3].any() and not both[:, 768:].any()
    assert (digits.sums is not None) == (name == "Q2_K")


def test_sums_are_those_of_the_digits(rng):
    how = ORDERS["Q2_K"]
    x = np.float32(activations(rng, (3, 512)))
    x[1], x[2] = 1, rng.choice([-1, 1], 512)  # nothing but the largest
    digits = split(jnp.asarray(x, jnp.bfloat16), how, 2)
    parts = np.asarray(digits.sums).view(np.int8).astype(np.int64).reshape(3, 2, 2, 2, 2, 2, 4)
    assert (-8 <= parts[..., 0, :]).all() and (parts[..., 0, :] < 8).all()
    sums = parts[..., 0, :] + 16 * parts[..., 1, :]  # row, block, chunk, half, byte, field
    sums = sums.transpose(0, 1, 2, 5, 3, 4).reshape(3, 32, 2)
    np.testing.assert_array_equal(sums, whole_numbers(digits, how).reshape(3, 32, 16, 2).sum(2))


@pytest.mark.parametrize("name", ["Q2_K", *(pytest.param(f, marks=pytest.mark.full) for f in ("IQ2_XXS", "runs"))])
def test_a_block_that_is_not_finite(rng, name):
    x = activations(rng, (4, 512))
    broken = x.at[0, 5].set(jnp.nan).at[1, 300].set(jnp.inf).at[2, 511].set(-jnp.inf)
    got, want = (split(a, ORDERS[name], 2) for a in (broken, x.at[0, 5].set(0).at[1, 300].set(0).at[2, 511].set(0)))
    bad = np.asarray([[1, 0], [0, 1], [0, 1], [0, 0]], bool)
    np.testing.assert_array_equal(np.isnan(got.scale), bad)
    np.testing.assert_array_equal(np.asarray(got.scale)[~bad], np.asarray(want.scale)[~bad])
    np.testing.assert_array_equal(got.words, want.words)


# ---- which calls -----------------------------------------------------------------------------------------------------


def test_refusals(rng):
    ids, ones = choices(rng, 2, "random"), jnp.ones((2, K))
    iq2, q2, q8 = (weight(rng, name, (E, 19, 256)) for name in ("IQ2_XXS", "Q2_K", "Q8_0"))
    x, h = (activations(rng, s, jnp.float32) for s in ((2, 256), (2, K, 256)))
    for gate, up, dtype, message in (
        (iq2, iq2, jnp.float32, "IQ2_XXS and IQ2_XXS, rows of 256, with float32"),
        (q8, q8, jnp.bfloat16, "Q8_0 and Q8_0"), (iq2, q2, jnp.bfloat16, "IQ2_XXS and Q2_K"),
    ):  # fmt: skip
        with pytest.raises(NotImplementedError, match=f"no integer products of {message}"):
            swiglu(x.astype(dtype), gate, up, ids, ones, shape())
    for w, dtype in ((q2, jnp.float32), (q2, jnp.float16), (q8, jnp.bfloat16)):
        with pytest.raises(NotImplementedError, match=f"no integer products of {w.format}"):
            down(h.astype(dtype), w, ids, shape())


def packed(name, *shape):
    fmt = quant.FORMATS[name]
    parts = {n: jax.ShapeDtypeStruct((*shape[:-1], shape[-1] // p.per), p.dtype) for n, p in fmt.parts.items()}
    return quant.QuantizedArray(parts, name)


def layer(formats, tokens, dtype=jnp.bfloat16, experts=4, F=256, D=512, k=6):
    """The text of a layer's experts for CUDA: formats of gate, up and down."""

    def run(x, gate, up, down, ids, weights):
        h = quant.expert_swiglu(x, gate, up, ids, weights, 10.0, implementation="pallas")
        return quant.expert_down(h, down, ids, implementation="pallas")

    stacks = [packed(name, experts, *s) for name, s in zip(formats, ((F, D), (F, D), (D, F)), strict=True)]
    ids, weights = (jax.ShapeDtypeStruct((tokens, k), t) for t in (jnp.int32, jnp.float32))
    return lowering.lower_for_cuda(run, jax.ShapeDtypeStruct((tokens, D), dtype), *stacks, ids, weights)


def kernels(text):
    return [name for name in ("integers_swiglu_iq2_xxs", "integers_down_q2_k") if name in text]


@pytest.mark.parametrize("tokens, capability", [(1, 9.0), (2, 9.0), (8, 9.0), (9, 8.0), (16, 8.0)])
def test_what_goes_to_integer_tensor_cores(on_device, tokens, capability):
    on_device(capability)
    names = kernels(layer(("IQ2_XXS", "IQ2_XXS", "Q2_K"), tokens))
    assert names == ["integers_swiglu_iq2_xxs", "integers_down_q2_k"][: 1 if 1 < tokens <= 8 else 2]


def test_what_does_not_go_to_integer_tensor_cores():
    assert not kernels(layer(("IQ2_XXS", "IQ2_XXS", "Q2_K"), 9))  # 54 assignments for 4 experts
    assert not kernels(layer(("IQ2_XXS", "IQ2_XXS", "Q2_K"), 5, jnp.float32))
    assert kernels(layer(("IQ2_XXS", "Q2_K", "Q2_K"), 9, experts=8)) == ["integers_down_q2_k"]


def test_experts_that_do_not_exist_in_a_batch(rng, monkeypatch):
    """As plain JAX takes them: the nearest that exists."""
    monkeypatch.setitem(tuned._DEFAULT, "integers", shape(tokens=4))
    h, w, ids = activations(rng, (9, K, 256)), weight(rng, "Q2_K", (E, 19, 256)), choices(rng, 9, "outside")
    with lowering.interpreted():
        ours = quant.expert_down(h, w, ids, implementation="pallas")
    assert ours.dtype == jnp.bfloat16 and error(ours, plain_down(h, w, jnp.clip(ids, 0, E - 1))) < 4e-3


@pytest.mark.parametrize("tokens, runs", [(1, True), (32, True), (64, False), (512, False)])
def test_flash_lowers_for_cuda(tokens, runs):
    text = layer(("IQ2_XXS", "IQ2_XXS", "Q2_K"), tokens, experts=256, F=2048, D=4096)
    assert len(kernels(text)) == 2 and all(f"m16n8k32.row.col.s32.{t}8.s8.s32" in text for t in "su")
    assert ("add.f32 $0, $1, y" in text) == runs  # the four threads of a row meet


def test_a_limit_of_registers_reaches_the_assembler():
    values = jax.ShapeDtypeStruct((128,), jnp.float32)

    def kernel(most, x_ref, out_ref):
        at = lowering.limit_registers(jnp.arange(128, dtype=jnp.int32), most)
        lowering.store(out_ref, (at,), lowering.load(x_ref, (at,)))

    for most in (0, 80):
        run = lambda x, most=most: lowering.call(  # noqa: E731
            functools.partial(kernel, most), values, x, grid=(1,), tuning=lowering.Tuning(), name="limited"
        )
        assert ("ttg.maxnreg" in lowering.lower_for_cuda(run, values)) == bool(most)


@pytest.mark.parametrize("name, way, tokens, tuning", [
    *(("IQ2_XXS", "runs", 1, shape(8, parts=p)) for p in (1, 8)),
    *(("IQ2_XXS", "runs", 64, shape(4, tokens=m)) for m in (1, 4)),
    *((name, "tokens", 64, shape(8, tokens=16, parts=2)) for name in integers.TOKENS),
    ("Q2_K", "tokens", 1, shape(8, parts=8)),
    ("IQ2_XXS", "runs", 1, shape(4, parts=4, ahead=2)),
    ("IQ2_XXS", "tokens", 64, shape(8, tokens=8, ahead=1)),
    ("Q2_K", "tokens", 64, shape(4, tokens=8, ahead=1)),
])  # fmt: skip
def test_shapes_of_work_lower_for_cuda(by, name, way, tokens, tuning):
    by(way)
    h, w = jax.ShapeDtypeStruct((tokens, 6, 2048), jnp.bfloat16), packed(name, 256, 4096, 2048)

    def run(h, w, ids):
        return integers.down(h, stack(w), ids, tuning)

    text = lowering.lower_for_cuda(run, h, w, jax.ShapeDtypeStruct((tokens, 6), jnp.int32))
    assert f"integers_down_{name.lower()}" in text
    for instruction in ("cp.async.cg.shared.global", "%dynamic_smem_size"):  # a ring, and where its memory is
        assert (instruction in text) == bool(tuning.ahead)


def test_kernels_lower_side_by_side():
    """Programs are compiled in threads; a kernel that stops at addresses must not keep another's loads from loading."""

    def text(i):
        name, tokens = list(integers.TOKENS)[i % 2], (1, 10, 40)[i % 3]
        h, w = jax.ShapeDtypeStruct((tokens, 6, 512), jnp.bfloat16), packed(name, 64, 256, 512)
        ids = jax.ShapeDtypeStruct((tokens, 6), jnp.int32)
        return lowering.lower_for_cuda(lambda h, w, ids: integers.down(h, stack(w), ids), h, w, ids)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            texts = list(pool.map(text, range(18)))
    finally:
        sys.setswitchinterval(before)
    assert [len(t) for t in texts[:6]] * 3 == [len(t) for t in texts]
