"""The model against results of the reference code, transformers and ds4's file layout (tests/data/golden)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ds4jax import runtime, weights
from ds4jax.model import Tap
from tests.model.golden import reference, tiny, worst

LAYERS = 6
# With the cache's rounding simulated, a value within 1e-7 of the middle between two codes may go either way, and all
# later positions follow it. On the machine and release this was written on (x86, jax 0.10.2) every position agrees;
# another release or processor may make another choice somewhere, so everywhere only the positions before the first
# such choice can be asked for (without the rounding not even the first position agrees).
NEED = pytest.mark.parametrize("need", [0.05, pytest.param(0.99, marks=pytest.mark.full)])
SITES = ("attn_out", "ffn_out", "streams_out", "router.experts", "router.weights", "attn.indexer.topk")


@pytest.fixture(scope="module")
def simulated():
    """Everything the reference file has, computed in one pass with the cache's rounding simulated."""
    ref = reference("reference.npz")
    programs = tiny(True)
    names = [f"layers.{i}.{site}" for i in range(LAYERS) for site in SITES]

    @jax.jit
    def run(state, tokens, following):
        model = programs._model(state)
        tap = Tap(names=names)
        streams, _ = model.forward(tokens, tap=tap)
        return model.logits(streams), model.mtp_all(streams, following), tap.store

    tokens, following = (jnp.asarray(ref[n], jnp.int32)[None] for n in ("tokens", "mtp_next_tokens"))
    logits, mtp, sites = run(programs.state, tokens, following)
    return ref, logits[0], mtp[0], {name: np.asarray(a[0]) for name, a in sites.items()}


def close_share(ours, theirs, tolerance: float = 1e-3) -> float:
    return float((worst(ours, theirs) <= tolerance).mean())


def test_logits_equal_transformers_without_simulation():
    ref = reference("hf.npz")
    programs = tiny(False)
    logits = jax.jit(lambda state, t: programs._model(state)(t))(programs.state, jnp.asarray(ref["tokens"])[None])
    assert worst(logits[0], ref["logits"]).max() <= 1e-4


@NEED
def test_logits_equal_the_reference(simulated, need):
    ref, logits, _, _ = simulated
    assert close_share(logits, ref["logits"]) >= need


@NEED
def test_mtp_logits_equal_the_reference(simulated, need):
    ref, _, mtp, _ = simulated
    assert close_share(mtp, ref["mtp_logits"]) >= need


@NEED
@pytest.mark.parametrize("layer", range(LAYERS))
def test_sites_equal_the_reference(simulated, layer, need):
    ref, _, _, sites = simulated
    for ours, theirs in (("attn_out", "attn_out"), ("ffn_out", "ffn_out"), ("streams_out", "streams")):
        assert close_share(sites[f"layers.{layer}.{ours}"], ref[f"layers.{layer}.{theirs}"]) >= need, ours


@NEED
@pytest.mark.parametrize("layer", range(LAYERS))
def test_router_equals_the_reference(simulated, layer, need):
    ref, _, _, sites = simulated
    ours, theirs = sites[f"layers.{layer}.router.experts"], ref[f"layers.{layer}.router_experts"]
    same = (np.sort(ours) == np.sort(theirs)).all(axis=-1)
    assert same.mean() >= need
    order = lambda experts, weights: np.take_along_axis(weights, np.argsort(experts), axis=-1)  # noqa: E731
    mine = order(ours, sites[f"layers.{layer}.router.weights"])[same]
    assert close_share(mine, order(theirs, ref[f"layers.{layer}.router_weights"])[same]) >= need


@NEED
@pytest.mark.parametrize("layer", (2, 4))
def test_indexer_equals_the_reference(simulated, layer, need):
    ref, _, _, sites = simulated
    ours, theirs = sites[f"layers.{layer}.attn.indexer.topk"], ref[f"layers.{layer}.indexer_topk"]
    assert (np.sort(ours) == np.sort(theirs)).all(axis=-1).mean() >= need


@pytest.mark.full
def test_decode_equals_the_reference():
    ref = reference("reference.npz")
    programs = tiny(True)
    tokens = ref["tokens"].astype(np.int32)[None]
    cache = programs._model(programs.state).init_cache(1, 272)
    one = np.ones(1, np.int32)
    logits, cache = programs.logits(cache, tokens[:, :200], 200 * one)
    rows = [logits[0, -1]]
    for i in range(200, 272):
        logits, cache = programs.logits(cache, tokens[:, i : i + 1], one)
        rows.append(logits[0, 0])
    assert close_share(np.stack(rows), ref["decode_logits"]) >= 0.99


def test_mini_gguf_equals_the_reference(mini_gguf, golden_dir):
    """Real IQ2_XXS, Q2_K, Q8_0 and F16 blocks, computed in float32.

    An entry of the cache within 1e-7 of the middle between two FP8 values may be rounded either way, and one such
    choice moves later logits by 1e-3 to 3e-2. Every float32 evaluation makes a few of its own: this model computed in
    float64 is 0.002, 0.040 and 0.029 from the reference on the three prompts. Prompts cut in other places are other
    evaluations, and so are those of other processors (0.106 was seen of one): the best of them must agree, and all
    must stay in the range of such choices (without the rounding, the logits are 0.17 to 0.24 away).
    """
    with weights.open_checkpoint(mini_gguf) as ckpt:
        arrays = weights.load_arrays(ckpt, progress=False)
        programs = runtime.Programs(*runtime.build_model(ckpt.config, arrays, dtype=jnp.float32))
    model = programs._model(programs.state)
    errors = np.zeros((2, 3))
    for row, length in enumerate((100, 256)):
        with np.load(golden_dir / "mini" / "reference.npz") as ref:
            for i in range(3):
                tokens, theirs = ref[f"tokens_{i}"].astype(np.int32), ref[f"logits_{i}"]
                cache = model.init_cache(1, 640)
                for at in range(0, len(tokens), length):
                    piece = np.zeros((1, length), np.int32)
                    n = min(length, len(tokens) - at)
                    piece[0, :n] = tokens[at : at + n]
                    logits, cache = programs.logits(cache, piece, np.array([n], np.int32))
                ours = np.asarray(logits[0, n - 1])
                errors[row, i] = np.abs(ours - theirs).max()
                assert np.argmax(ours) == np.argmax(theirs)
                assert len(set(np.argsort(ours)[-20:]) & set(np.argsort(theirs)[-20:])) >= 17
    print(errors)
    assert errors.max() <= 0.15
    assert errors.min() <= 5e-3
