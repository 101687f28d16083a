"""A sequence's logits do not depend on how it was cut into calls, nor on what the other slots were doing.

The model is tiny so that few programs, of few shapes, can play many cuts: chunks of 257 and of 7 tokens, of which any
number count, and single tokens. The yardstick is one chunk of 257.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds4jax import runtime
from ds4jax.model import Config, attention, init_cache, reset_slots
from tests.conftest import load_script

oracle = load_script("oracle_transformers")

CONFIG = Config(
    hidden_size=24, vocab_size=61, num_hidden_layers=3, compress_ratios=(0, 4, 128), num_attention_heads=2,
    head_dim=18, qk_rope_head_dim=6, q_lora_rank=12, o_groups=2, o_lora_rank=8, sliding_window=20, index_n_heads=16,
    index_head_dim=32, index_topk=5, n_routed_experts=5, num_experts_per_tok=2, moe_intermediate_size=8,
    num_hash_layers=1, rope_original_context=64, max_position_embeddings=4096,
)  # fmt: skip
ROWS, LENGTH = 3, 257  # the cache holds 257 tokens: 64 entries of 4 and 2 of 128, not one to spare
WIDE, NARROW, ONE = 257, 7, 1
EDGES = (1, 3, 4, 5, 127, 128, 129, 130, 255, 256, 257)
TOLERANCE = 1e-4
TOKENS = oracle.Random(1).integers((ROWS, LENGTH), CONFIG.vocab_size)


@functools.cache
def programs(cache_quant: bool) -> runtime.Programs:
    arrays = {path: jnp.asarray(a) for path, a in oracle.make_weights(CONFIG, 0).items()}
    return runtime.Programs(*runtime.build_model(CONFIG, arrays, dtype=jnp.float32, cache_quant=cache_quant))


def call(cache, cache_quant: bool, tokens, n_valid):
    logits, cache = programs(cache_quant).logits(cache, jnp.asarray(tokens), jnp.asarray(n_valid, jnp.int32))
    return np.asarray(logits), cache


@functools.cache
def one_pass(cache_quant: bool) -> np.ndarray:
    """[ROWS, LENGTH, V]"""
    return call(init_cache(CONFIG, ROWS, LENGTH), cache_quant, TOKENS, [LENGTH] * ROWS)[0]


def play(cuts, cache_quant=False, cache=None, seed=0):
    """Feed each row its sequence in pieces.

    Args:
      cuts: per row a list of pieces (width, n): n tokens in a call of `width`; rows that take no part in a call, and
        the rest of a piece's width, hold random tokens.

    Returns:
      Per row the logits [Σ n, V], and the cache.
    """
    random = np.random.default_rng(seed)
    cache = init_cache(CONFIG, ROWS, LENGTH) if cache is None else cache
    left = [list(pieces) for pieces in cuts]
    at, out = [0] * ROWS, [[np.zeros((0, CONFIG.vocab_size), np.float32)] for _ in cuts]
    while any(left):
        width = random.choice([pieces[0][0] for pieces in left if pieces])
        tokens = random.integers(0, CONFIG.vocab_size, (ROWS, width), dtype=np.int32)
        n_valid = [pieces[0][1] if pieces and pieces[0][0] == width else 0 for pieces in left]
        for row, n in enumerate(n_valid):
            tokens[row, :n] = TOKENS[row, at[row] : at[row] + n]
        logits, cache = call(cache, cache_quant, tokens, n_valid)
        for row, pieces in enumerate(left):
            if pieces and pieces[0][0] == width:
                n = pieces.pop(0)[1]
                out[row].append(logits[row, :n])
                at[row] += n
    assert cache.length.tolist() == [sum(n for _, n in pieces) for pieces in cuts]
    return [np.concatenate(pieces) for pieces in out], cache


def worst(rows, cache_quant=False) -> np.ndarray:
    """The largest difference from the one pass at every position played."""
    reference = one_pass(cache_quant)
    diffs = [np.abs(ours - reference[row, : len(ours)]).max(axis=-1) for row, ours in enumerate(rows)]
    diffs = np.concatenate(diffs)
    return np.where(np.isnan(diffs), np.inf, diffs)


def pieces(*counts):
    """Counts as pieces: single tokens through decode, the others through the narrowest chunk they fit."""
    return [(ONE if n == 1 else NARROW if n <= NARROW else WIDE, n) for n in counts]


@pytest.mark.parametrize("length", EDGES)
def test_padding_changes_nothing(length):
    rows, _ = play([[(WIDE, length)], [(WIDE, max(0, length - 1))], [(WIDE, 0)]])
    assert worst(rows).max() <= TOLERANCE


@pytest.mark.parametrize("edge", EDGES[:-1])
def test_two_chunks_meet_anywhere(edge):
    """Cuts at, before and after an edge; the three rows stand at different places."""
    cuts = [max(1, edge - 1), edge, min(LENGTH - 1, edge + 1)]
    rows, _ = play([[(WIDE, cut), (WIDE, LENGTH - cut)] for cut in cuts])
    assert sum(map(len, rows)) == ROWS * LENGTH
    assert worst(rows).max() <= TOLERANCE


@pytest.mark.parametrize("edge", EDGES[2:-1])
def test_single_tokens_cross_an_edge(edge):
    """A chunk, single tokens from three before an edge to three after it, a chunk again; alone, then in company."""
    before, after = max(0, edge - 3), min(LENGTH, edge + 3)
    steps = [(WIDE, before), *pieces(*[1] * (after - before)), (WIDE, LENGTH - after)]
    alone, _ = play([steps, [], []])
    together, _ = play([steps, pieces(7, 5, 3, 1, 1), [(WIDE, 131), *pieces(1, 1, 2, 3)]], seed=edge)
    assert worst(alone).max() <= TOLERANCE
    assert worst(together).max() <= TOLERANCE


def test_token_by_token():
    rows, _ = play([pieces(*[1] * LENGTH), [(WIDE, 126), *pieces(*[1] * 131)], pieces(*[1] * 40)])
    assert worst(rows).max() <= TOLERANCE


@st.composite
def cut(draw):
    """Any pieces that add up to at most LENGTH."""
    width = st.sampled_from([WIDE, NARROW, NARROW, ONE, ONE, ONE])
    out, total = [], 0
    for w in draw(st.lists(width, max_size=24)):
        n = draw(st.integers(0, min(w, LENGTH - total)))
        if w == WIDE and draw(st.booleans()):  # end beside a multiple of 128
            n = min(LENGTH - total, max(0, 128 - total % 128 + draw(st.integers(-1, 1))))
        out.append((w, n))
        total += n
    return out


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(cuts=st.tuples(*[cut()] * ROWS), seed=st.integers(0, 99))
def test_any_cut_in_any_company(cuts, seed):
    rows, _ = play(cuts, seed=seed)
    assert max(worst(rows), default=0) <= TOLERANCE


def test_a_slot_is_reset_and_used_again():
    """Row 1 starts over twice while rows 0 and 2 go on; what it left behind is far from what it writes next."""
    _, cache = play([[(WIDE, 100)], [(WIDE, 203)], [(WIDE, 6)]])
    cache = reset_slots(cache, jnp.array([False, True, False]))
    assert cache.length.tolist() == [100, 0, 6]
    logits, cache = call(cache, False, np.roll(TOKENS, 1, axis=0), [0, 130, 0])  # another sequence in row 1
    assert np.abs(logits[1, :130] - one_pass(False)[0, :130]).max() <= TOLERANCE
    cache = reset_slots(cache, jnp.array([False, True, False]))
    tokens = np.zeros((ROWS, WIDE), np.int32)
    starts, n_valid = [100, 0, 6], [157, 257, 122]
    for row in range(ROWS):
        tokens[row, : n_valid[row]] = TOKENS[row, starts[row] :][: n_valid[row]]
    logits, cache = call(cache, False, tokens, n_valid)
    for row in range(ROWS):
        wanted = one_pass(False)[row, starts[row] :][: n_valid[row]]
        assert np.abs(logits[row, : n_valid[row]] - wanted).max() <= TOLERANCE


def test_what_a_cache_held_before_is_never_seen():
    """Window slots, entries and indexer keys that were not written since the reset hold anything finite."""
    garbage = lambda a: jnp.asarray(30 * np.random.default_rng(a.size).standard_normal(a.shape), a.dtype)  # noqa: E731
    dirty = init_cache(CONFIG, ROWS, LENGTH)
    dirty = jax.tree.map(garbage, dirty)
    dirty = reset_slots(dirty, jnp.ones((ROWS,), bool))
    mixed = [[(WIDE, 140), *pieces(1, 1, 5)], pieces(1, 1, 1, 1, 6), [(WIDE, 3), *pieces(1, 1)]]
    rows, _ = play(mixed, cache=dirty)
    assert worst(rows).max() <= TOLERANCE


def test_gathering_entries_equals_masking_them(monkeypatch):
    """Long contexts take other paths: chosen entries gathered for each query, indexer scores and queries in tiles."""
    monkeypatch.setattr(attention, "dense_limit", lambda config: 0)
    monkeypatch.setattr(attention, "SCORE_BYTES", 1)
    fresh = runtime.Programs(programs(False).graphdef, programs(False).state)
    logits, _ = fresh.logits(init_cache(CONFIG, ROWS, LENGTH), jnp.asarray(TOKENS), jnp.array([LENGTH, 130, 0]))
    assert np.abs(logits[0] - one_pass(False)[0]).max() <= TOLERANCE
    assert np.abs(logits[1, :130] - one_pass(False)[1, :130]).max() <= TOLERANCE


def test_indexer_scores_in_tiles_equal_whole_ones(monkeypatch):
    random = np.random.default_rng(0)
    q, w, keys = (jnp.asarray(random.standard_normal(s), jnp.float32) for s in ((2, 3, 4, 8), (2, 3, 4), (2, 1300, 8)))
    whole = attention.index_scores(q, w, keys)
    monkeypatch.setattr(attention, "SCORE_BYTES", 1)
    tiled = attention.index_scores(q, w, keys)
    wanted = np.einsum("bqh,bqhn->bqn", w, np.maximum(0, np.einsum("bqhd,bnd->bqhn", q, keys)))
    np.testing.assert_allclose(whole, wanted, atol=1e-5)
    np.testing.assert_allclose(tiled, wanted, atol=1e-5)


@pytest.mark.parametrize("capacity", [3, 4])
def test_a_cache_smaller_than_a_block(capacity):
    """No room for an entry of 128, and one or none of 4; the window is longer than the cache."""
    cache = init_cache(CONFIG, 1, capacity)
    for i in range(capacity):
        logits, cache = call(cache, False, TOKENS[:1, i : i + 1], [1])
        assert np.abs(logits[0, 0] - one_pass(False)[0, i]).max() <= TOLERANCE


def test_cuts_with_the_rounded_cache():
    """A last bit may tip a rounding to the next 8-bit or 4-bit number, so a few positions may move."""
    company = [
        [(WIDE, 126), *pieces(*[1] * 6), (WIDE, 125)],
        pieces(*[1] * 135),
        [(WIDE, 5), (WIDE, 124), (WIDE, 0), (WIDE, 1), (WIDE, 127)],
    ]
    rows, _ = play(company, cache_quant=True)
    assert (worst(rows, cache_quant=True) <= TOLERANCE).mean() >= 0.99
    assert np.abs(one_pass(True) - one_pass(False)).max() > 100 * TOLERANCE  # the rounding was there
