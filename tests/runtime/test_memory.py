"""What fits: the plan counts what is allocated, and the message names the largest context that works."""

import re

import jax
import jax.numpy as jnp
import pytest

from ds4jax import DS4Error
from ds4jax.model import Config, init_cache
from ds4jax.runtime import memory
from ds4jax.runtime.programs import chunk_length
from tests.runtime.conftest import make_config

GIB = 1 << 30
F32, BF16 = jnp.dtype("float32"), jnp.dtype("bfloat16")


@pytest.fixture(scope="module")
def flash() -> Config:
    """Sizes of DeepSeek V4 Flash, as far as the cache and what is computed beside it depend on them."""
    return make_config(
        num_hidden_layers=43, hidden_size=4096, vocab_size=129280, compress_ratios=[0, 0, *[4, 128] * 20, 4],
        num_attention_heads=64, head_dim=512, qk_rope_head_dim=64, o_groups=8, sliding_window=128, index_n_heads=64,
        index_head_dim=128, index_topk=512, n_routed_experts=256, num_experts_per_tok=6, moe_intermediate_size=2048,
        max_position_embeddings=1 << 20,
    )  # fmt: skip


@pytest.mark.parametrize("slots, context, dtype", [(1, 64, F32), (3, 1024, BF16)])
def test_plan_counts_every_byte_of_the_cache(config, slots, context, dtype):
    plan = memory.plan(config, 1000, slots=slots, context=context, dtype=dtype)
    cache = init_cache(config, slots, context, dtype)
    assert plan.cache == sum(a.nbytes for a in jax.tree.leaves(cache))
    assert plan.total == 1000 + plan.cache + plan.workspace
    assert (plan.slots, plan.context) == (slots, context)


def test_whatever_fits_passes(config):
    plan = memory.plan(config, GIB, slots=1, context=512, dtype=F32)
    for limit in (None, plan.total, plan.total + 1):
        assert memory.check_fits(config, GIB, limit, slots=1, context=512, dtype=F32) == plan
    with pytest.raises(DS4Error):
        memory.check_fits(config, GIB, plan.total - 1, slots=1, context=512, dtype=F32)


def test_message_says_what_is_needed_and_what_would_fit(flash):
    weights, device = 81 * GIB, 86 * GIB
    with pytest.raises(DS4Error) as e:
        memory.check_fits(flash, weights, device, slots=1, context=1 << 20, dtype=BF16)
    text = str(e.value)
    assert "\n" not in text
    needed, w, cache, work, has, fits = re.fullmatch(
        r"context 1048576 needs ([\d.]+) GiB \(([\d.]+) GiB weights, ([\d.]+) GiB cache, ([\d.]+) GiB workspace\) "
        r"and the device has ([\d.]+) GiB: context=(\d+) would fit",
        text,
    ).groups()
    assert float(w) == 81 and float(has) == 86
    assert abs(float(needed) - float(w) - float(cache) - float(work)) < 0.2
    fits = int(fits)
    assert fits > 0 and fits % 128 == 0
    memory.check_fits(flash, weights, device, slots=1, context=fits, dtype=BF16)
    with pytest.raises(DS4Error):
        memory.check_fits(flash, weights, device, slots=1, context=fits + 128, dtype=BF16)


def test_weights_that_do_not_fit(flash):
    with pytest.raises(DS4Error, match="not even the weights fit: use a smaller file or a larger device$"):
        memory.check_fits(flash, 81 * GIB, 80 * GIB, slots=1, context=4096, dtype=BF16)


def test_most_slots(config):
    args = dict(context=512, dtype=jnp.dtype("float32"))
    one = memory.plan(config, 0, slots=1, **args).cache
    base = GIB + memory.workspace(config, slots=64, **args)
    assert memory.most_slots(config, GIB, None, wanted=64, **args) == 64
    for room, slots in ((0, 1), (1, 1), (5, 5), (5.9, 5), (1000, 64)):
        assert memory.most_slots(config, GIB, base + int(room * one), wanted=64, **args) == slots


@pytest.mark.parametrize("slots, context", [(1, 1024), (40, 256)])
def test_workspace_is_what_a_chunk_of_prefill_takes(config, lm, slots, context):
    work = memory.workspace(config, slots=slots, context=context, dtype=F32)
    cache = jax.eval_shape(lambda: init_cache(config, slots, context, F32))
    tokens, n = (
        jax.ShapeDtypeStruct((slots, chunk_length(context, slots)), jnp.int32),
        jax.ShapeDtypeStruct((slots,), jnp.int32),
    )
    programs = lm.programs
    used = programs._prefill.lower(programs.state, cache, tokens, n, None).compile().memory_analysis()
    assert 0.7 < work / used.temp_size_in_bytes < 2.5


def test_workspace_follows_the_model(config, flash, monkeypatch):
    monkeypatch.setattr("ds4jax.runtime.programs.CHUNKS", (32, 256, 2048))  # as outside of these tests
    work = lambda c, context=8192, slots=1: memory.workspace(c, slots=slots, context=context, dtype=BF16) / GIB  # noqa: E731
    assert work(config) < 0.2 < 0.8 < work(flash) < 1.5
    assert work(config, 64) < work(config, 1024)  # a short context has no long chunks
    assert work(flash, 1 << 20) > work(flash) and work(flash, slots=4) > 2 * work(flash)
