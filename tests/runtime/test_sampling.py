"""Sampling against the definition, in NumPy's float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ds4jax import DS4Error
from ds4jax.runtime import Sampling
from ds4jax.runtime.sampling import keep_mask, sample


def reference_keep(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> np.ndarray:
    """Tokens that survive, for one row: sort, then cut; what ties with the last survivor survives too."""
    x = np.asarray(logits, np.float64) / (temperature or 1.0)
    p = np.exp(x - x.max())
    alive = x > -np.inf
    keep = alive.copy()
    if top_k:
        keep &= x >= np.sort(x)[::-1][min(top_k, len(x)) - 1]
    if top_p < 1:
        order = np.argsort(-x, kind="stable")
        order = order[keep[order]]
        mass = np.cumsum(p[order]) / p[order].sum()
        last = order[min(int(np.searchsorted(mass, top_p)), len(order) - 1)]
        keep &= x >= x[last]
    return keep & (p >= min_p * p.max())


def kept(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> np.ndarray:
    rows = jnp.atleast_2d(jnp.asarray(logits, jnp.float32)) / (temperature or 1.0)
    full = lambda v, t: jnp.full((len(rows),), v, t)  # noqa: E731
    mask = jitted_mask(rows, full(top_k, jnp.int32), full(top_p, jnp.float32), full(min_p, jnp.float32))
    return np.asarray(mask)[0] if np.ndim(logits) == 1 else np.asarray(mask)


jitted, jitted_mask = jax.jit(sample), jax.jit(keep_mask)


def draw(logits, n, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, usable=None):
    """`n` draws from one row of logits, as the n first tokens of one seed."""
    # padded to few shapes, since each is compiled anew: rows are cut off again, and -inf is never drawn
    rows = 512 if n <= 512 else n
    vocab = 64 if len(logits) <= 64 else len(logits)
    padded = np.full((rows, vocab), -np.inf, np.float32)
    padded[:, : len(logits)] = logits
    may = np.ones(vocab, bool)
    may[: len(logits)] = True if usable is None else usable
    full = lambda v, t: np.full((rows,), v, t)  # noqa: E731
    tokens, logprobs = jitted(
        padded, full(temperature, np.float32), full(top_k, np.int32), full(top_p, np.float32), full(min_p, np.float32),
        full(seed, np.uint32), np.arange(rows, dtype=np.int32), may,
    )  # fmt: skip
    return np.asarray(tokens)[:n], np.asarray(logprobs)[:n]


RULES = [
    dict(),
    dict(top_k=1),
    dict(top_k=7),
    dict(top_k=300),  # V
    dict(top_k=10_000),
    dict(top_p=0.9),
    dict(top_p=0.5),
    dict(top_p=1e-7),
    dict(top_p=0.999999),
    dict(min_p=0.05),
    dict(min_p=1.0),
    dict(min_p=1e-30),
    dict(top_k=20, top_p=0.8),
    dict(top_k=20, top_p=0.8, min_p=0.1),
    dict(temperature=0.3, top_p=0.7),
    dict(temperature=5.0, min_p=0.2, top_k=50),
]


@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("spread", [0.1, 2.0, 30.0])
def test_kept_sets_equal_the_definition(rules, spread):
    rng = np.random.default_rng(int(spread * 10))
    logits = (spread * rng.normal(size=(8, 300))).astype(np.float32)
    ours = kept(logits, **rules)
    for row, mask in zip(logits, ours, strict=True):
        wanted = reference_keep(row, **rules)
        if "top_p" in rules and (mask != wanted).any():
            # the cumulative sum may fall on the other side of top_p by float32's rounding, at one token
            x = row.astype(np.float64) / rules.get("temperature", 1.0)
            inside = reference_keep(row, **(rules | {"top_p": 1.0, "min_p": 0.0}))
            p = np.exp(x - x.max()) * inside
            short, long = sorted((mask, wanted), key=np.sum)
            assert (long & short == short).all() and (long & ~short).sum() == 1
            assert abs(p[long].sum() / p.sum() - rules["top_p"]) < 1e-5 or (
                abs(p[short].sum() / p.sum() - rules["top_p"]) < 1e-5
            )
        else:
            np.testing.assert_array_equal(mask, wanted)


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_ties_are_kept_together(rules):
    # a handful of values that are exact in float32, each many times
    logits = np.repeat(np.log2([8.0, 4.0, 2.0, 1.0]).astype(np.float32), [3, 5, 9, 17])
    logits = np.random.default_rng(0).permutation(logits)
    mask = kept(logits, **rules)
    np.testing.assert_array_equal(mask, reference_keep(logits, **rules))
    for v in np.unique(logits):
        assert mask[logits == v].all() or not mask[logits == v].any()


def test_zeros_of_both_signs_tie():
    logits = np.array([0.0, -0.0, 0.0, -1.0], np.float32)
    tokens, _ = draw(logits, 400, top_k=1)
    assert set(tokens) == {0, 1, 2}


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_impossible_tokens_never_survive(rules):
    logits = np.array([-np.inf, 1.0, -np.inf, 0.5, -np.inf], np.float32)
    mask = kept(logits, **rules)
    np.testing.assert_array_equal(mask, reference_keep(logits, **rules))
    assert mask[1] and not mask[[0, 2, 4]].any()
    tokens, logprobs = draw(logits, 50, **rules)
    assert set(tokens) <= {1, 3} and np.isfinite(logprobs).all()


def test_huge_logits():
    logits = np.array([3e38, -3e38, 2.9e38, 0.0], np.float32)
    for rules in RULES:
        assert set(draw(logits, 20, **rules)[0]) == {0}, rules
    tokens, logprobs = draw(logits, 20, temperature=1e-30)  # a tiny temperature does not overflow
    assert set(tokens) == {0} and (logprobs == 0).all()


def test_rules_of_one_slot_leave_the_others_alone():
    rng = np.random.default_rng(1)
    row = rng.normal(size=100).astype(np.float32)
    ks, ps, ms = [0, 3, 0, 0, 5], [1.0, 1.0, 0.3, 1.0, 0.9], [0.0, 0.0, 0.0, 0.4, 0.2]
    rows = jnp.broadcast_to(jnp.asarray(row), (5, 100))
    together = jitted_mask(rows, jnp.asarray(ks, jnp.int32), jnp.asarray(ps), jnp.asarray(ms))
    for mask, k, p, m in zip(np.asarray(together), ks, ps, ms, strict=True):
        np.testing.assert_array_equal(mask, reference_keep(row, top_k=k, top_p=p, min_p=m))


@pytest.mark.parametrize(
    "rules", [dict(), dict(temperature=0.5), dict(temperature=2.0, top_k=5), dict(top_p=0.7), dict(min_p=0.2)], ids=str
)
def test_frequencies(rules):
    """20,000 draws: chi-square within 5 standard deviations of its mean."""
    n = 20_000
    logits = np.random.default_rng(2).normal(size=12)
    tokens, _ = draw(logits, n, **rules)
    x = logits.astype(np.float32).astype(np.float64) / rules.get("temperature", 1.0)
    keep = reference_keep(logits.astype(np.float32), **rules)
    p = np.where(keep, np.exp(x), 0)
    p /= p.sum()
    counts = np.bincount(tokens, minlength=12)
    assert (counts[~keep] == 0).all()
    chi2 = ((counts[keep] - n * p[keep]) ** 2 / (n * p[keep])).sum()
    degrees = keep.sum() - 1
    assert chi2 < degrees + 5 * np.sqrt(2 * degrees), (chi2, degrees)


def test_frequencies_over_seeds():
    """The first token of many seeds is spread as the model says, too."""
    n, p = 4000, np.array([0.5, 0.25, 0.125, 0.125])
    rows = jnp.broadcast_to(jnp.log(jnp.asarray(p, jnp.float32)), (n, 4))
    one, zero = jnp.ones(n), jnp.zeros(n, jnp.int32)
    tokens, _ = jitted(rows, one, zero, one, 0 * one, jnp.arange(n, dtype=jnp.uint32), zero)
    counts = np.bincount(np.asarray(tokens), minlength=4)
    assert ((counts - n * p) ** 2 / (n * p)).sum() < 3 + 5 * np.sqrt(6)


def test_temperature_zero_takes_the_likeliest():
    logits = np.random.default_rng(3).normal(size=(64, 50)).astype(np.float32)
    n = len(logits)
    full = lambda v, t=jnp.float32: jnp.full((n,), v, t)  # noqa: E731
    tokens, _ = jitted(
        jnp.asarray(logits), full(0), full(3, jnp.int32), full(0.5), full(0.05), full(9, jnp.uint32),
        jnp.arange(n, dtype=jnp.int32),
    )  # fmt: skip
    np.testing.assert_array_equal(tokens, logits.argmax(-1))


def test_seed_and_count_fix_the_draw():
    logits = np.zeros(1000, np.float32)
    first, again, other = draw(logits, 50, seed=1)[0], draw(logits, 50, seed=1)[0], draw(logits, 50, seed=2)[0]
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.9
    assert len(set(first)) > 40  # each place draws anew
    assert (draw(logits, 50, seed=2**32 - 1)[0] != first).mean() > 0.9


def test_logprobs_are_the_models_own():
    logits = np.random.default_rng(4).normal(size=40) * 3
    usable = np.arange(40) % 2 == 0
    tokens, logprobs = draw(logits, 100, temperature=0.5, top_k=9, min_p=0.01, usable=usable)
    x = logits.astype(np.float32).astype(np.float64)
    wanted = x - x.max() - np.log(np.exp(x - x.max()).sum())
    np.testing.assert_allclose(logprobs, wanted[tokens], atol=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 100.0])
def test_unusable_tokens_are_never_drawn(temperature):
    logits = np.array([50.0, 1.0, 60.0, 0.0, 60.0], np.float32)
    usable = np.array([False, True, False, True, False])
    tokens, _ = draw(logits, 300, temperature=temperature, usable=usable)
    assert set(tokens) == ({1} if temperature == 0 else {1, 3})
    # what may not be drawn does not set the scale of min_p or fill top_k either
    tokens, _ = draw(logits, 300, min_p=0.3, usable=usable)
    assert set(tokens) == {1, 3}
    tokens, _ = draw(logits, 300, top_k=2, usable=usable)
    assert set(tokens) == {1, 3}


@pytest.mark.parametrize(
    "option, value",
    [
        ("temperature", -0.1), ("temperature", float("nan")), ("temperature", float("inf")), ("temperature", "hot"),
        ("temperature", None), ("top_k", -1), ("top_k", 2.5), ("top_k", float("inf")), ("top_k", True), ("top_p", 0.0),
        ("top_p", -1.0), ("top_p", 1.1), ("top_p", float("nan")), ("top_p", "0.9"), ("min_p", -0.1), ("min_p", 1.5),
        ("min_p", float("nan")), ("seed", -1), ("seed", 2**32), ("seed", 0.5), ("seed", "lucky"),
    ],
)  # fmt: skip
def test_senseless_rules_are_refused(option, value):
    with pytest.raises(DS4Error, match=f"^{option} .*must be") as e:
        Sampling(**{option: value})
    assert "\n" not in str(e.value)


def test_whole_numbers_of_any_type_are_taken():
    Sampling(temperature=1, top_k=np.int64(5), top_p=1, min_p=np.float32(0.1), seed=np.uint32(7))
    Sampling(top_k=10**12)
