"""The cases that scripts/check_gpu.py compares on a GPU, at small sizes in interpret mode."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from ds4jax.pallas import lowering
from ds4jax.weights import synthetic
from scripts import check_gpu


def test_kernels_of_a_layer_agree():
    small = dict(
        num_attention_heads=16, head_dim=128, qk_rope_head_dim=64, sliding_window=32, hidden_size=256, index_n_heads=16,
        index_head_dim=128, n_routed_experts=64,
    )  # fmt: skip
    config = dataclasses.replace(synthetic.flash_config(3), **small)
    sizes = check_gpu.Sizes(config, slots=(2,), tokens=(5,), entries=70, chosen=24)
    names = set()
    for name, fn, arguments in check_gpu.layer_cases(sizes, np.random.default_rng(3)):
        with lowering.interpreted():
            ours = fn("pallas", jnp.bfloat16, *arguments)
        plain, exact = (fn("xla", dtype, *arguments) for dtype in (jnp.bfloat16, jnp.float32))
        assert np.isfinite(np.asarray(exact, np.float64)).all(), name
        assert check_gpu.error(ours, exact) <= max(2e-3, 1.5 * check_gpu.error(plain, exact)), name
        names.add(name.split(",")[0])
    assert len(names) >= 8
    # what agrees can also disagree
    assert check_gpu.error(exact + 0.01 * jnp.abs(exact).max(), exact) > 2e-3
