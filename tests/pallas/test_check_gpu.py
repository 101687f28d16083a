"""The cases that scripts/check_gpu.py compares on a GPU, at small sizes in interpret mode."""

import dataclasses
import inspect
import itertools
import pkgutil
import re
from importlib import import_module

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ds4jax import pallas
from ds4jax.pallas import lowering
from ds4jax.quant import api
from ds4jax.runtime import bench
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


@pytest.mark.full
def test_tiny_runs_every_kernel(monkeypatch):
    called = set()

    def call(kernel, out, *args, name, **kw):
        called.add(name)
        return jax.tree.map(lambda o: jnp.zeros(o.shape, o.dtype), out)

    random_weight = bench.random_weight
    alike = lambda key, *of: jax.eval_shape(lambda k: random_weight(k, *of), key)  # noqa: E731
    monkeypatch.setattr(bench, "random_weight", alike)
    monkeypatch.setattr(lowering, "call", call)
    monkeypatch.setattr(api, "once", lambda fn, *args: fn(*args))  # nothing traced here must serve others
    modules = [import_module(f"ds4jax.pallas.{m.name}") for m in pkgutil.iter_modules(pallas.__path__)]
    kernels = set(re.findall(r'\bname=f?"(\w+)', "".join(map(inspect.getsource, modules))))
    rng = np.random.default_rng(0)
    products = check_gpu.cases(["Q8_0", "IQ2_XXS"], rng, tiny=True)
    every = itertools.chain(check_gpu.layer_cases(check_gpu.TINY, rng), products)
    with lowering.interpreted():
        for _, fn, arguments in every:
            jax.eval_shape(lambda *a, fn=fn: fn("pallas", jnp.bfloat16, *a), *arguments)
    assert len(kernels) > 15 and not [k for k in kernels if not any(c.startswith(k) for c in called)]
