"""The model is differentiable end to end.

What has no gradient, by design: the choice of experts (so the selection bias) and of entries (so the indexer, which
learns from its own divergence alone), and the roundings of the cache, whose gradient passes straight through.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ds4jax import runtime
from ds4jax.model import Config, Tap, layers
from ds4jax.model.params import param_shapes
from tests.conftest import load_script
from tests.model.quick import compiled

oracle = load_script("oracle_transformers")

CONFIG = Config(
    hidden_size=24, vocab_size=61, num_hidden_layers=2, compress_ratios=(4, 128), num_attention_heads=2,
    head_dim=18, qk_rope_head_dim=6, q_lora_rank=12, o_groups=2, o_lora_rank=8, sliding_window=20, index_n_heads=16,
    index_head_dim=32, index_topk=64, n_routed_experts=5, num_experts_per_tok=2, moe_intermediate_size=8,
    num_hash_layers=1, rope_original_context=64, max_position_embeddings=4096, num_nextn_predict_layers=1,
)  # fmt: skip
# index_topk is more than there are entries, and `weights` fixes which experts scores choose: no step of a difference
# quotient may change a choice. The hash layer still sends every token elsewhere.
LENGTH = 150  # past the first entry of 128
TOKENS = oracle.Random(7).integers((1, LENGTH + 2), CONFIG.vocab_size)
PATHS = [path for path, (_, kind) in param_shapes(CONFIG).items() if kind != "ids"]
UNTRAINED = [path for path in PATHS if ".indexer." in path or path.endswith("gate.bias")]


def weights(dtype=jnp.float32) -> dict[str, jax.Array]:
    arrays = oracle.make_weights(CONFIG, 5)
    arrays |= {path: np.float32([0, 30, 10, 40, 20]) for path in PATHS if path.endswith("gate.bias")}
    return {path: jnp.asarray(arrays[path], dtype) for path in PATHS}


def losses(dtype=jnp.float32, cache_quant=False):
    """weights → each token's loss [2, T] (next token; by MTP the one after) and the indexer's divergence [1, T]."""
    ids = {path: a for path, a in oracle.make_weights(CONFIG, 5).items() if path not in PATHS}
    site = "layers.0.attn.indexer.kl"

    def run(arrays):
        arrays = arrays | {path: jnp.asarray(a) for path, a in ids.items()}
        model = nnx.merge(*runtime.build_model(CONFIG, arrays, dtype=dtype, cache_quant=cache_quant))
        tap = Tap(names=[site])
        streams, _ = model.forward(jnp.asarray(TOKENS[:, :LENGTH]), tap=tap)
        following = jnp.asarray(TOKENS[:, 1:])
        logits = jnp.concatenate([model.logits(streams), model.mtp_all(streams, following[:, :LENGTH])])
        targets = jnp.concatenate([following[:, :LENGTH], following[:, 1:]])
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)
        return -chosen[..., 0], tap.store[site]

    return run


@functools.cache
def gradients(dtype, cache_quant):
    """(gradient of the summed loss, gradient of the summed divergence): dicts by path of float64 arrays."""

    def both(arrays):
        _, pull = jax.vjp(lambda a: [x.sum() for x in losses(dtype, cache_quant)(a)], arrays)
        grads = jax.vmap(pull)([jnp.float32([1, 0]), jnp.float32([0, 1])])[0]  # one backward program for both
        return [jax.tree.map(lambda a: a[i], grads) for i in range(2)]  # noqa: B023

    arrays = weights(dtype)
    return jax.tree.map(lambda a: np.asarray(a, np.float64), compiled(both, arrays)(arrays))


BFLOAT16 = pytest.param(jnp.bfloat16, True, id="bfloat16", marks=pytest.mark.full)


@pytest.mark.parametrize("dtype, cache_quant", [pytest.param(jnp.float32, False, id="float32"), BFLOAT16])
def test_every_parameter_that_should_has_a_finite_gradient(dtype, cache_quant):
    of_loss, of_divergence = gradients(dtype, cache_quant)
    for path in PATHS:
        assert np.isfinite(of_loss[path]).all() and np.isfinite(of_divergence[path]).all(), path
        assert of_loss[path].any() == (path not in UNTRAINED), path
        assert of_divergence[path].any() == (".indexer." in path), path


def test_embeddings_of_absent_tokens_have_none():
    absent = np.setdiff1d(np.arange(CONFIG.vocab_size), TOKENS)
    present = np.setdiff1d(np.arange(CONFIG.vocab_size), absent)
    of_embed = gradients(jnp.float32, False)[0]["embed.weight"]
    assert len(absent) and not of_embed[absent].any() and of_embed[present].any(axis=-1).all()


@pytest.mark.full
def test_bfloat16_points_the_same_way():
    """Roundings change some choices, and those the gradient; most of its direction stays."""
    flat = lambda g: np.concatenate([g[path].ravel() for path in PATHS])  # noqa: E731
    a, b = flat(gradients(jnp.float32, False)[0]), flat(gradients(jnp.bfloat16, True)[0])
    assert a @ b / np.sqrt((a @ a) * (b @ b)) > 0.9


CHECKED = [
    "embed.weight", "layers.0.hc_attn.fn", "layers.0.hc_attn.base", "layers.0.hc_ffn.scale",
    "layers.0.attn.wq_a.weight", "layers.0.attn.sink", "layers.0.ffn.gate.weight", "layers.0.attn.wkv.weight",
    "layers.0.attn.compressor.ape", "layers.0.attn.compressor.wgate.weight", "layers.0.attn.wo_a.weight",
    "layers.0.attn.indexer.wq_b.weight", "layers.0.attn.indexer.weights_proj.weight",
    "layers.0.attn.indexer.compressor.wgate.weight", "layers.1.ffn.experts.w1", "layers.1.ffn.experts.w2",
    "layers.1.ffn.gate.weight", "layers.1.attn.compressor.wkv.weight", "layers.1.attn.compressor.norm.weight",
    "layers.1.ffn.shared_experts.w3.weight", "hc_head.fn", "norm.weight", "head.weight", "mtp.e_proj.weight",
    "mtp.hnorm.weight", "mtp.attn.wq_b.weight", "mtp.hc_head.base",
]  # fmt: skip


@pytest.fixture(scope="module")
def run():
    return compiled(losses(), weights())


@pytest.mark.parametrize("path", CHECKED)
def test_directional_derivative(run, path):
    """Central differences in float32, along the gradient where they are least drowned by rounding.

    The indexer's are of its divergence.
    """
    which = int(".indexer." in path)
    gradient = gradients(jnp.float32, False)[which][path]
    slope = np.sqrt((gradient**2).sum())
    arrays = weights()
    at = np.asarray(arrays[path], np.float64)
    step = 3e-3 * np.sqrt((at**2).sum())
    sides = []
    for sign in (1, -1):
        moved = jnp.asarray(at + sign * step * gradient / slope, jnp.float32)
        sides.append(np.asarray(run(arrays | {path: moved})[which], np.float64).sum())  # tokens' roundings average out
    measured = (sides[0] - sides[1]) / (2 * step)
    assert abs(measured - slope) <= 0.01 * slope, (measured, slope)


@pytest.mark.full
def test_recomputing_layers_gives_the_same_gradient():
    config = dataclasses.replace(CONFIG, num_nextn_predict_layers=0)
    arrays = {path: jnp.asarray(a) for path, a in oracle.make_weights(config, 6).items()}
    ids = {path: arrays.pop(path) for path in list(arrays) if path.endswith("tid2eid")}

    def loss(arrays, remat):
        model = nnx.merge(*runtime.build_model(config, arrays | ids, dtype=jnp.float32, cache_quant=True))
        return (model(jnp.asarray(TOKENS[:, :130]), remat=remat) ** 2).mean()

    plain, remade = (
        compiled(jax.grad(functools.partial(loss, remat=remat)), arrays)(arrays) for remat in (False, True)
    )
    for path in arrays:
        np.testing.assert_allclose(remade[path], plain[path], atol=1e-5 * float(jnp.abs(plain[path]).max() + 1e-6))


def test_roundings_pass_gradients_straight_through():
    x, w = (jnp.asarray(np.random.default_rng(i).standard_normal((3, 96)), jnp.float32) for i in range(2))
    of_fp8 = jax.grad(lambda x: jnp.sum(w * layers.simulate_fp8(x, 20)))(x)
    np.testing.assert_array_equal(of_fp8, w)
    x, w = x[:, :64], w[:, :64]
    of_fp4 = jax.grad(lambda x: jnp.sum(w * layers.simulate_fp4(x)))(x)
    np.testing.assert_allclose(of_fp4, layers.hadamard(w), atol=1e-6)
