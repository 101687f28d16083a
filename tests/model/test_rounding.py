"""The small parts against ml_dtypes and NumPy: cache rounding, Hadamard, Sinkhorn, rope, top-k, routing."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from ds4jax.model import NO_TAP, Config, layers
from ds4jax.model.attention import attend, select_entries
from ds4jax.model.hyper_connections import sinkhorn
from ds4jax.model.moe import Router

FP8, FP4 = ml_dtypes.float8_e4m3fn, ml_dtypes.float4_e2m1fn
WAYS = pytest.mark.parametrize("way", [lambda f: f, jax.jit], ids=["eager", "jit"])


def delicate(dtype, codes) -> np.ndarray:
    """float32: every value of an 8- or 4-bit format, every tie between two, and their float32 neighbours; ± each."""
    values = np.arange(codes, dtype=np.uint8).view(dtype).astype(np.float32)
    values = np.sort(values[np.isfinite(values)])
    ties = (values[1:] + values[:-1]) / 2
    x = np.concatenate([values, ties])
    x = np.concatenate([x, np.nextafter(x, np.float32(np.inf)), np.nextafter(x, np.float32(0))])
    x = x[x <= values.max()]
    return np.concatenate([x, -x])


def in_groups(values: np.ndarray, size: int, largest: float) -> np.ndarray:
    """[n, size], each row with `largest` as its first element, which fixes the row's scale."""
    values = np.concatenate([values, np.zeros(-len(values) % (size - 1), np.float32)]).reshape(-1, size - 1)
    return np.concatenate([np.full((len(values), 1), largest, np.float32), values], axis=1)


def power_of_two_scale(amax: np.ndarray, top: float) -> np.ndarray:
    """The least power of two s with amax / s ≤ top, exactly (float64 holds every quotient of float32s far enough)."""
    mantissa, exponent = np.frexp(amax.astype(np.float64) / top)
    return np.where(mantissa == 0.5, 2.0 ** (exponent - 1), 2.0**exponent)


def numpy_fp8(x: np.ndarray, rotary: int) -> np.ndarray:
    """MODEL's rule in float64 with ml_dtypes' cast."""
    out = x.astype(np.float32).copy()
    for at in range(0, x.shape[-1] - rotary, 64):
        part = slice(at, min(at + 64, x.shape[-1] - rotary))
        amax = np.abs(out[..., part]).max(axis=-1, keepdims=True)
        scale = power_of_two_scale(np.maximum(amax, np.float32(1e-4)), 448)
        out[..., part] = (out[..., part] / scale).astype(FP8).astype(np.float64) * scale
    return out


@WAYS
@pytest.mark.parametrize("exponent", [-20, -1, 0, 1, 30, 100])
def test_fp8_is_ml_dtypes_at_every_value_and_tie(way, exponent):
    x = in_groups(delicate(FP8, 127), 64, 448.0)
    got = way(lambda x: layers.simulate_fp8(x, 0))(jnp.asarray(x * np.float32(2.0**exponent)))
    np.testing.assert_array_equal(np.asarray(got) / np.float32(2.0**exponent), x.astype(FP8).astype(np.float32))


@WAYS
def test_fp8_scale_is_the_least_power_of_two_that_fits(way):
    """Largest elements on, just below and just above 448 · 2ⁿ, where a scale taken from a product would tip over."""
    top = np.float32(448) * 2.0 ** np.arange(-20, 60, dtype=np.float32)
    top = np.concatenate([top, np.nextafter(top, np.float32(0)), np.nextafter(top, np.float32(np.inf)), top / 7 * 5])
    rest = np.random.default_rng(0).uniform(-1, 1, (len(top), 63)).astype(np.float32)
    x = np.concatenate([top[:, None], rest * top[:, None]], axis=1)
    got = way(lambda x: layers.simulate_fp8(x, 0))(jnp.asarray(x))
    np.testing.assert_array_equal(np.asarray(got), numpy_fp8(x, 0))


@WAYS
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("width, rotary", [(128, 64), (150, 6), (64, 0), (20, 4)])
def test_fp8_groups_and_rotary_channels(way, dtype, width, rotary):
    """Groups of 64 from the left, the last one short, each with its own scale; rotary channels untouched."""
    random = np.random.default_rng(1)
    x = random.standard_normal((40, 3, width)) * np.exp(8 * random.standard_normal((40, 3, width)))
    x = np.asarray(jnp.asarray(x, dtype))
    got = np.asarray(way(lambda x: layers.simulate_fp8(x, rotary))(jnp.asarray(x)))
    assert got.dtype == x.dtype
    np.testing.assert_array_equal(got.astype(np.float32), numpy_fp8(x, rotary))
    np.testing.assert_array_equal(got[..., width - rotary :], x[..., width - rotary :])


def test_fp8_all_rotary_is_the_identity():
    x = jnp.linspace(-3, 3, 24).reshape(2, 12)
    np.testing.assert_array_equal(layers.simulate_fp8(x, 12), x)


@WAYS
def test_fp8_of_nothing_and_next_to_nothing(way):
    """Zeros stay zeros; below 1e-4 the scale stops shrinking at 2⁻²²: e4m3's least step is then 2⁻³¹."""
    x = np.zeros((4, 64), np.float32)
    x[1] = 1e-5
    x[2] = 2.0**-32  # half the least step: a tie, to zero
    x[3] = np.nextafter(np.float32(2.0**-32), np.float32(1))
    got = np.asarray(way(lambda x: layers.simulate_fp8(x, 0))(jnp.asarray(x)))
    np.testing.assert_array_equal(got, numpy_fp8(x, 0))
    assert not got[0].any() and not got[2].any()
    np.testing.assert_array_equal(got[3], np.float32(2.0**-31))


@WAYS
def test_fp8_shows_what_is_not_finite(way):
    """A NaN stays NaN, an infinity makes its whole group NaN; other groups do not notice."""
    x = np.ones((2, 128), np.float32)
    x[0, 5], x[1, 5] = np.nan, np.inf
    got = np.asarray(way(lambda x: layers.simulate_fp8(x, 0))(jnp.asarray(x)))
    assert np.isnan(got[0, 5]) and np.isnan(got[1, :64]).all()
    np.testing.assert_array_equal(got[:, 64:], 1)


@WAYS
def test_e2m1_is_ml_dtypes_at_every_value_and_tie(way):
    x = np.concatenate([delicate(FP4, 8), np.linspace(-6, 6, 100001, dtype=np.float32)])
    got = np.asarray(way(layers.round_e2m1)(jnp.asarray(x)))
    np.testing.assert_array_equal(got, x.astype(FP4).astype(np.float32))


def test_e2m1_saturates():
    x = jnp.array([6.5, 7, 1e30, jnp.inf, -jnp.inf, -8, jnp.nan])
    np.testing.assert_array_equal(layers.round_e2m1(x), [6, 6, 6, 6, -6, -6, np.nan])


def sylvester(n: int) -> np.ndarray:
    """±1 by the parity of the bits that row and column share."""
    return np.array([[(-1.0) ** (i & j).bit_count() for j in range(n)] for i in range(n)])


@pytest.mark.parametrize("n", [1, 2, 32, 128])
def test_hadamard(n):
    x = np.random.default_rng(n).standard_normal((5, 3, n)).astype(np.float32)
    got = np.asarray(layers.hadamard(jnp.asarray(x)))
    np.testing.assert_allclose(got, x.astype(np.float64) @ sylvester(n) * n**-0.5, atol=2e-6)
    np.testing.assert_allclose(layers.hadamard(jnp.asarray(got)), x, atol=4e-6)  # it is its own inverse


@WAYS
@pytest.mark.parametrize("exponent", [-40, -3, 0, 1, 40])
def test_fp4_rounds_what_hadamard_gives(way, exponent):
    """Two groups with scales of their own. All numbers are multiples of 1/8 so that the transform is exact."""
    random = np.random.default_rng(2)
    y = random.integers(-48, 49, (200, 64)).astype(np.float32) / 8
    y[:, 0], y[:, 32] = 6, 12  # scales 1 and 2
    y[:, 32:] *= 2
    y[1::4, 0] = 6.125  # just over: scale 2
    y[2::4, 32:] = 0  # a silent group
    y[3::4, 32:] /= 4  # another scale, ties and all
    factor = np.float32(2.0**exponent)
    x = (y @ sylvester(64) / 8).astype(np.float32)
    assert (x.astype(np.float64) @ sylvester(64) / 8 == y).all()
    grouped = y.reshape(200, 2, 32)
    amax = np.maximum(np.abs(grouped).max(axis=-1, keepdims=True), np.float32(6 * 2.0**-126))
    scale = power_of_two_scale(amax, 6)
    wanted = ((grouped / scale).astype(FP4).astype(np.float64) * scale).reshape(200, 64)
    got = np.asarray(way(layers.simulate_fp4)(jnp.asarray(x * factor))) / factor
    np.testing.assert_array_equal(got, wanted)


def numpy_sinkhorn(logits: np.ndarray, iterations: int, eps: float) -> np.ndarray:
    c = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    c = c / c.sum(axis=-1, keepdims=True) + eps
    c = c / (c.sum(axis=-2, keepdims=True) + eps)
    for _ in range(iterations - 1):
        c = c / (c.sum(axis=-1, keepdims=True) + eps)
        c = c / (c.sum(axis=-2, keepdims=True) + eps)
    return c


@pytest.mark.parametrize("size, iterations, eps, spread", [(4, 20, 1e-6, 1), (4, 20, 1e-6, 20), (3, 1, 1e-3, 2),
                                                          (2, 3, 1e-6, 5), (5, 7, 1e-2, 3)])  # fmt: skip
def test_sinkhorn(size, iterations, eps, spread):
    logits = (spread * np.random.default_rng(size).standard_normal((50, size, size))).astype(np.float32)
    got = np.asarray(sinkhorn(jnp.asarray(logits), iterations, eps))
    np.testing.assert_allclose(got, numpy_sinkhorn(logits, iterations, eps), atol=3e-6)
    if iterations == 20:  # columns come last, so they sum to one
        np.testing.assert_allclose(got.sum(axis=-2), 1, atol=1e-5)


FLASH = dict(
    hidden_size=8, vocab_size=8, num_hidden_layers=1, compress_ratios=(0,), num_attention_heads=1, head_dim=512,
    qk_rope_head_dim=64, q_lora_rank=4, o_groups=1, o_lora_rank=4, sliding_window=128, index_n_heads=1,
    index_head_dim=128, index_topk=3, n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=4,
    num_hash_layers=0,
)  # fmt: skip


def test_frequencies_of_flash():
    """By hand: 64 ln(65536 / 64π) / 2 ln 160000 = 15.5 and 64 ln(65536 / 2π) / 2 ln 160000 = 24.7, so 15 and 25."""
    config = Config(**FLASH)
    i = np.arange(32)
    np.testing.assert_allclose(layers.rope_frequencies(config, 0), 10000.0 ** (-i / 32), rtol=1e-6)
    plain = 160000.0 ** (-i / 32)
    yarn = layers.rope_frequencies(config, 4)
    np.testing.assert_allclose(yarn[:16], plain[:16], rtol=1e-6)
    np.testing.assert_allclose(yarn[25:], plain[25:] / 16, rtol=1e-6)
    share = (i[16:25] - 15) / 10
    np.testing.assert_allclose(yarn[16:25], plain[16:25] * (1 - share + share / 16), rtol=1e-6)
    np.testing.assert_array_equal(yarn, layers.rope_frequencies(config, 128))
    flat = layers.rope_frequencies(Config(**FLASH, rope_factor=1.0), 4)
    np.testing.assert_allclose(flat, plain, rtol=1e-6)


@pytest.mark.parametrize("shape", [(2, 7, 10), (2, 7, 3, 10), (2, 7, 3, 2, 6)])
@pytest.mark.parametrize("inverse", [False, True])
def test_rope_is_a_product_of_complex_numbers(shape, inverse):
    random = np.random.default_rng(3)
    x = random.standard_normal(shape).astype(np.float32)
    freqs = np.array([1.0, 0.37, 0.011], np.float32)
    positions = np.stack([np.arange(7), 2**20 - 7 + np.arange(7)]).astype(np.int32)
    got = np.asarray(layers.rotate(jnp.asarray(x), jnp.asarray(positions), freqs, inverse=inverse))
    np.testing.assert_array_equal(got[..., :-6], x[..., :-6])
    # the angle is a float32 product, as in the model's own code; at a million it is known to a few hundredths only
    angle = (positions.astype(np.float32)[..., None] * freqs).astype(np.float64)
    angle = angle.reshape(angle.shape[:2] + (1,) * (x.ndim - 3) + (3,))
    turned = (x[..., -6::2] + 1j * x[..., -5::2]) * np.exp((-1j if inverse else 1j) * angle)
    np.testing.assert_allclose(got[..., -6::2], turned.real, atol=2e-6)
    np.testing.assert_allclose(got[..., -5::2], turned.imag, atol=2e-6)


def select(scores, visible, k):
    chosen = select_entries(jnp.asarray(scores)[None, None], jnp.asarray(visible)[None, None], k)
    return np.asarray(chosen)[0, 0].tolist()


def test_topk_of_visible_entries():
    scores, everything = np.float32([3, -1, 7, 0, 5]), [True] * 5
    assert select(scores, everything, 3) == [2, 4, 0]
    assert select(scores, [True, True, False, True, False], 2) == [0, 3]
    assert select(scores, [True, True, False, False, False], 3) == [0, 1, -1]  # fewer candidates than k
    assert select(scores, [False] * 5, 3) == [-1, -1, -1]
    assert select(scores, everything, 9) == [2, 4, 0, 3, 1]  # fewer entries than k
    assert select(-np.float32([3, 1, 7, 1e30, 5]), everything, 5) == [1, 0, 4, 2, 3]  # negative scores count


def test_topk_ties_go_to_the_earliest():
    assert select(np.zeros(6, np.float32), [True] * 6, 4) == [0, 1, 2, 3]
    assert select(np.float32([1, 2, 1, 2, 1]), [True, True, True, True, False], 3) == [1, 3, 0]


@pytest.mark.parametrize("normalise", [True, False])
def test_router_bias_selects_and_does_not_weigh(normalise):
    config = Config(**FLASH, norm_topk_prob=normalise)
    router = Router(config, False, rngs=nnx.Rngs(0))
    random = np.random.default_rng(4)
    bias = random.standard_normal(8).astype(np.float32)
    router.bias = nnx.Param(jnp.asarray(bias))
    x = 3 * random.standard_normal((50, 8)).astype(np.float32)
    experts, weights = router(jnp.asarray(x), None, NO_TAP)
    p = np.sqrt(np.logaddexp(0, x.astype(np.float64) @ np.asarray(layers.value(router.weight), np.float64).T))
    wanted = np.argsort(-(p + bias), axis=-1)[:, :3]
    np.testing.assert_array_equal(experts, wanted)
    chosen = np.take_along_axis(p, wanted, axis=-1)
    chosen = 1.5 * chosen / (chosen.sum(axis=-1, keepdims=True) if normalise else 1)
    np.testing.assert_allclose(weights, chosen, rtol=1e-5)


def test_attend_with_a_sink():
    """Against float64; a query that sees nothing gives its probability to the sink and gets zeros."""
    random = np.random.default_rng(5)
    q, near = (random.standard_normal(s).astype(np.float32) for s in ((2, 3, 4, 6), (2, 5, 6)))
    own = random.standard_normal((2, 3, 2, 6)).astype(np.float32)
    sink = np.float32([-2, 0, 1, 50])
    masks = random.random((2, 3, 5)) < 0.6, random.random((2, 3, 2)) < 0.6
    masks[0][0, 0] = masks[1][0, 0] = False
    sets = [(jnp.asarray(keys), jnp.asarray(mask)) for keys, mask in zip((near, own), masks, strict=True)]
    o, p = attend(jnp.asarray(q), sets, jnp.asarray(sink))
    keys = np.concatenate([np.broadcast_to(near[:, None], (2, 3, 5, 6)), own], axis=2).astype(np.float64)
    e = np.exp(np.einsum("bqhd,bqnd->bqhn", q, keys) * 6**-0.5) * np.concatenate(masks, axis=-1)[:, :, None]
    wanted = e / (e.sum(axis=-1, keepdims=True) + np.exp(sink.astype(np.float64))[:, None])
    np.testing.assert_allclose(p, wanted, atol=1e-6)
    np.testing.assert_allclose(o, np.einsum("bqhn,bqnd->bqhd", wanted, keys), atol=2e-6)
    assert not np.asarray(o[0, 0]).any()
