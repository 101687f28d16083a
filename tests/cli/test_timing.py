"""Seconds and rates of an answer."""

import time

import jax
import jax.numpy as jnp
import pytest

from ds4jax.cli import timing
from ds4jax.lm import Chunk, Output


def test_overlapping_spans_count_once():
    spans = [(2.0, 3.0), (1.0, 4.0), (3.5, 5.0), (8.0, 9.0), (20.0, 30.0)]
    assert timing._covered(spans, 0, 10) == 5
    assert timing._covered(spans, 2.5, 8.5) == 3
    assert timing._covered([], 0, 10) == 0


def test_rates(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = timing.Clock(1)

    def stream():
        now[0] += 5
        clock._spans.append((101.0, 104.0))  # three of these seconds went into compiling
        yield Chunk(0, "", [1] * 8, [])
        now[0] += 4
        yield Chunk(0, "", [1] * 8, [], Output("", [1] * 16, "length", prompt_tokens=40, seed=3))

    for _ in clock.watch(stream()):
        pass
    assert clock.timings(0, kept=10) == {
        "first_s": 5, "total_s": 9, "compile_s": 3, "prefill_tokens_per_s": 15, "decode_tokens_per_s": 2
    }  # fmt: skip
    assert clock.summary(10) == (
        "10 tokens kept · prefill 30 tokens (15.0/s) · decode 16 tokens (2.0/s) · 9.00 s · seed 3 · "
        "cut at --max-tokens · compiling took 3.0 s"
    )
    clock._spans.pop()


def test_compiling_is_noticed():
    clock = timing.Clock(1)
    jax.jit(lambda x: jnp.sin(x) * 3.25)(jnp.ones(7))
    end = time.perf_counter() - clock.start
    assert 0 < clock.compiling(0, end) <= end
    assert timing.Clock(1).compiling(0, 1000) == pytest.approx(0)
