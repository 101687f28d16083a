"""Unusual shapes against transformers' `deepseek_v4` (scripts/oracle_transformers.py; tests/data/oracle)."""

import jax.numpy as jnp
import numpy as np
import pytest

from ds4jax import runtime, weights
from tests.conftest import ROOT, load_script

oracle = load_script("oracle_transformers")


@pytest.fixture(scope="module", params=oracle.SHAPES)
def checkpoint(request, tmp_path_factory):
    """(name, folder of the checkpoint, transformers' logits)."""
    folder = tmp_path_factory.mktemp(request.param)
    oracle.write_checkpoint(folder, request.param)
    with np.load(ROOT / "tests" / "data" / "oracle" / f"{request.param}.npz") as z:
        np.testing.assert_array_equal(z["tokens"], oracle.make_tokens(request.param))
        return request.param, folder, z["logits"]


def test_logits_equal_transformers(checkpoint):
    name, folder, theirs = checkpoint
    ours, margin = oracle.our_logits(folder, oracle.make_tokens(name))
    assert np.abs(ours - theirs).max() <= oracle.TOLERANCE
    # were two choices closer than rounding, equality would be luck and the seed should be another
    assert margin > 1e-5


@pytest.mark.full
def test_cached_steps_equal_transformers(checkpoint):
    """Chunks that no block, window or ratio divides, and single tokens across the end of a 128 block."""
    name, folder, theirs = checkpoint
    tokens = oracle.make_tokens(name)
    with weights.open_checkpoint(folder) as ckpt:
        arrays = weights.load_arrays(ckpt, progress=False)
        programs = runtime.Programs(*runtime.build_model(ckpt.config, arrays, dtype=jnp.float32, cache_quant=False))
    cache = programs._model(programs.state).init_cache(1, len(tokens))
    steps = [83, 42, *[1] * 9, 83]  # 125 tokens, nine alone, and on
    steps += [min(83, len(tokens) - at) for at in range(sum(steps), len(tokens), 83)]
    ours = []
    for n in steps:
        chunk = np.zeros((1, 1 if n == 1 else 83), np.int32)
        chunk[0, :n] = tokens[sum(map(len, ours)) :][:n]
        logits, cache = programs.logits(cache, chunk, np.array([n], np.int32))
        ours.append(np.asarray(logits[0, :n]))
    assert int(cache.length[0]) == len(tokens)
    assert np.abs(np.concatenate(ours) - theirs).max() <= oracle.TOLERANCE


@pytest.mark.full
def test_stored_logits_are_transformers_own(checkpoint):
    """Rebuild the reference from the installed transformers."""
    try:
        from transformers import DeepseekV4ForCausalLM  # noqa: F401
    except ImportError as e:  # absent, too old, or at odds with another package
        pytest.skip(f"needs the `oracle` extra (torch, transformers): {e}")
    name, folder, stored = checkpoint
    live = oracle.transformers_logits(folder, oracle.make_tokens(name))
    assert np.abs(live - stored).max() <= oracle.TOLERANCE / 10
