"""A million tokens of context: positions and entries at the far end, and what a call needs besides the cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ds4jax import runtime
from ds4jax.model import Config, Tap, Transformer, attention, init_cache
from tests.conftest import load_script
from tests.model.quick import compiled

oracle = load_script("oracle_transformers")

MILLION = 2**20


def config(*ratios: int) -> Config:
    return Config(
        hidden_size=16, vocab_size=61, num_hidden_layers=len(ratios), compress_ratios=ratios, num_attention_heads=4,
        head_dim=8, qk_rope_head_dim=4, q_lora_rank=12, o_groups=2, o_lora_rank=8, sliding_window=20, index_n_heads=8,
        index_head_dim=8, index_topk=16, n_routed_experts=2, num_experts_per_tok=1, moe_intermediate_size=8,
        num_hash_layers=1,
    )  # fmt: skip


def temporaries(ratio: int, tokens: int, capacity: int = MILLION) -> int:
    """Bytes that the compiled forward pass of one layer needs besides weights, cache and results. Nothing is run."""
    c = config(ratio)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Transformer(c, cache_quant=False, rngs=nnx.Rngs(0))))

    def step(state, cache, tokens):
        streams, cache = nnx.merge(graphdef, state).forward(tokens, cache)
        return streams[:, -1:], cache

    cache = jax.eval_shape(lambda: init_cache(c, 1, capacity))
    jitted = jax.jit(step, donate_argnums=1)
    memory = compiled(jitted, state, cache, jax.ShapeDtypeStruct((1, tokens), jnp.int32)).memory_analysis()
    if memory is None:
        pytest.skip("this backend does not tell how much memory a program needs")
    assert memory.alias_size_in_bytes >= cache.nbytes  # the donated cache is updated in place
    return memory.temp_size_in_bytes


@pytest.mark.parametrize("ratio", [4, 128])
def test_no_array_of_tokens_by_context(ratio):
    """2048 tokens at a million of context, with the few small heads where nothing else bounds the work.

    Queries go block by block: one block may hold its scores of all entries a few times over (masked, sorted), several
    together at most about SCORE_BYTES at a time. An array of all the call's scores would not fit in that.
    """
    tokens, entries = 2048, MILLION // ratio
    block = 4 * attention.QUERY_BLOCK * entries
    per_entry = 4 + 8 if ratio == 4 else 3 * 4  # the indexer's copies and heads; or a few copies of 4 heads' scores
    allowed = max(per_entry * block, 3 * attention.SCORE_BYTES)
    everything = 4 * tokens * entries * (1 if ratio == 4 else 4)
    grown = temporaries(ratio, tokens) - temporaries(ratio, 32)
    assert grown < allowed
    if ratio == 4:
        assert allowed < everything  # so the test can fail


@pytest.mark.parametrize("ratio", [4, 128])
def test_a_step_needs_no_more_than_scores(ratio):
    """Decode: a row of scores per head, and at worst a rearranged copy or two of what it reads (XLA's CPU products)."""
    entries = MILLION // ratio
    heads = 8 if ratio == 4 else 4
    copies = 2 * 4 * 8 * entries
    need = temporaries(ratio, 1) - temporaries(0, 1)
    assert need <= 4 * (2 * heads + 4) * entries + copies


@functools.cache
def at_the_end():
    """(programs, a cache of a million tokens that stands 140 before its end, 140 tokens to come)."""
    c = config(0, 4, 128)
    arrays = {path: jnp.asarray(a) for path, a in oracle.make_weights(c, 8).items()}
    programs = runtime.Programs(*runtime.build_model(c, arrays, dtype=jnp.float32, cache_quant=False))
    random = np.random.default_rng(0)
    fill = lambda a: jnp.asarray(random.standard_normal(a.shape), jnp.float32)  # noqa: E731
    cache = init_cache(c, 1, MILLION)
    # as if 2^20 - 140 tokens had passed: entries and windows are full of something, no block is half done (140 is a
    # multiple of 4; the open block of 128 began at 2^20 - 256 and is taken to hold only what comes now)
    layers = tuple(
        jax.tree.map(fill, layer) if layer.entries is None else layer_with(layer, fill) for layer in cache.layers
    )
    cache = type(cache)(jnp.full((1,), MILLION - 140, jnp.int32), layers, None)
    return programs, cache, oracle.Random(9).integers((1, 140), c.vocab_size)


def layer_with(layer, fill):
    keys = None if layer.index_keys is None else fill(layer.index_keys)
    return type(layer)(fill(layer.window), fill(layer.entries), layer.compressor, keys, layer.index_compressor)


def copy(cache):
    return jax.tree.map(lambda a: a.copy(), cache)


def test_the_last_tokens_of_a_million():
    """One chunk and a chunk with single tokens agree, at positions and entry numbers up to the last."""
    programs, before, tokens = at_the_end()
    one = compiled(programs._logits, programs.state, before, tokens[:, :1], jnp.array([1]))
    many = compiled(programs._logits, programs.state, before, tokens, jnp.array([1]))
    whole, after = many(programs.state, copy(before), tokens, jnp.array([140]))
    assert int(after.length[0]) == MILLION and np.isfinite(whole).all()
    for layer, ratio in ((1, 4), (2, 128)):
        changed = np.nonzero((before.layers[layer].entries != after.layers[layer].entries).any(axis=-1)[0])[0]
        first = (MILLION - 140) // ratio
        np.testing.assert_array_equal(changed, np.arange(first, MILLION // ratio))
    padded = np.zeros((1, 140), np.int32)
    padded[:, :136] = tokens[:, :136]
    part, cache = many(programs.state, copy(before), padded, jnp.array([136]))
    rows = [np.asarray(part[0, :136])]
    for i in range(136, 140):
        logits, cache = one(programs.state, cache, tokens[:, i : i + 1], jnp.array([1]))
        rows.append(np.asarray(logits[0]))
    assert np.abs(np.concatenate(rows) - whole[0]).max() <= 1e-4
    for a, b in zip(jax.tree.leaves(cache), jax.tree.leaves(after), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_the_indexer_chooses_from_a_million():
    """Every query's choice is the best of all entries before it, wherever they are."""
    programs, before, tokens = at_the_end()
    names = ("layers.1.attn.indexer.scores", "layers.1.attn.indexer.topk")

    def run(state, cache):
        tap = Tap(names=names)
        programs._model(state).forward(jnp.asarray(tokens[:, 132:]), cache, tap=tap)
        return [tap.store[name][0] for name in names]

    cache = type(before)(before.length + 132, before.layers, None)
    scores, topk = map(np.asarray, compiled(run, programs.state, cache)(programs.state, cache))
    for query in range(8):
        visible = (MILLION - 8 + query + 1) // 4
        assert np.isneginf(scores[query, visible:]).all() and np.isfinite(scores[query, :visible]).all()
        best = np.argsort(-scores[query], kind="stable")[:16]
        np.testing.assert_array_equal(np.sort(topk[query]), np.sort(best))
    assert topk.min() < MILLION // 8 < topk.max()  # far and near
