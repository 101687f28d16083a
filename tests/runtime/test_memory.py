"""What fits: the plan counts what is allocated, and the message names the largest context that works."""

import re

import jax
import jax.numpy as jnp
import pytest

from ds4jax import DS4Error
from ds4jax.model import Config, init_cache
from ds4jax.runtime import memory
from tests.runtime.conftest import make_config

GIB = 1 << 30


@pytest.fixture(scope="module")
def flash() -> Config:
    """Sizes of DeepSeek V4 Flash, as far as the cache depends on them."""
    return make_config(
        num_hidden_layers=43, compress_ratios=[0, 0, *[4, 128] * 20, 4], head_dim=512, qk_rope_head_dim=64,
        sliding_window=128, index_head_dim=128, num_attention_heads=64, o_groups=8, max_position_embeddings=1 << 20,
    )  # fmt: skip


@pytest.mark.parametrize("slots, context, dtype", [(1, 64, jnp.float32), (3, 1024, jnp.bfloat16)])
def test_plan_counts_every_byte_of_the_cache(config, slots, context, dtype):
    plan = memory.plan(config, 1000, slots=slots, context=context, dtype=dtype)
    cache = init_cache(config, slots, context, dtype)
    assert plan.cache == sum(a.nbytes for a in jax.tree.leaves(cache))
    assert plan.total == 1000 + plan.cache + plan.workspace
    assert (plan.slots, plan.context) == (slots, context)


def test_whatever_fits_passes(config):
    plan = memory.plan(config, GIB, slots=1, context=512, dtype=jnp.float32)
    for limit in (None, plan.total, plan.total + 1):
        assert memory.check_fits(config, GIB, limit, slots=1, context=512, dtype=jnp.float32) == plan
    with pytest.raises(DS4Error):
        memory.check_fits(config, GIB, plan.total - 1, slots=1, context=512, dtype=jnp.float32)


def test_message_says_what_is_needed_and_what_would_fit(flash):
    weights, device = 81 * GIB, 86 * GIB
    with pytest.raises(DS4Error) as e:
        memory.check_fits(flash, weights, device, slots=1, context=1 << 20, dtype=jnp.bfloat16)
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
    memory.check_fits(flash, weights, device, slots=1, context=fits, dtype=jnp.bfloat16)
    with pytest.raises(DS4Error):
        memory.check_fits(flash, weights, device, slots=1, context=fits + 128, dtype=jnp.bfloat16)


def test_weights_that_do_not_fit(flash):
    with pytest.raises(DS4Error, match="not even the weights fit: use a smaller file or a larger device$"):
        memory.check_fits(flash, 81 * GIB, 80 * GIB, slots=1, context=4096, dtype=jnp.bfloat16)


def test_most_slots(config):
    one = memory.plan(config, 0, slots=1, context=512, dtype=jnp.float32).cache
    args = dict(context=512, dtype=jnp.float32)
    base = GIB + memory.WORKSPACE
    assert memory.most_slots(config, GIB, None, wanted=64, **args) == 64
    for room, slots in ((0, 1), (1, 1), (5, 5), (5.9, 5), (1000, 64)):
        assert memory.most_slots(config, GIB, base + int(room * one), wanted=64, **args) == slots
