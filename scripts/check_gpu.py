"""Compare every kernel with plain JAX on this GPU, on fresh random inputs.

Each line: kernel, format, shape, ‖kernel − exact‖ / ‖exact‖ with the exact result from plain JAX in float32, and for
comparison what plain JAX reaches with bfloat16 activations. A kernel passes at 2e-3, or where rounding the result (and,
on tensor cores, the weights) to bfloat16 alone costs more, at 1.5 times what plain JAX loses. Exit code 1 if one fails.

--tiny runs every kernel on little work, for a checker of memory; every buffer is then an allocation of its own, so that
what reads or writes past one is seen:

    compute-sanitizer --tool memcheck python scripts/check_gpu.py --tiny

usage: python scripts/check_gpu.py [--seed N] [--formats Q8_0,…] [--fast | --tiny] [--only attention] [--threads 12]
                                   [--verbose]
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import os
import secrets
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from ds4jax import quant
from ds4jax.model import attention, heads, hyper_connections, moe
from ds4jax.model.layers import angles, rope_frequencies
from ds4jax.pallas import attention as attention_kernels
from ds4jax.pallas import decode, expand, fragments, indexer, integers, lowering
from ds4jax.quant.matmul import codebook
from ds4jax.runtime import bench
from ds4jax.weights import synthetic

LIMIT = 10.0
PUBLISHED = ("Q8_0", "Q2_K", "Q4_K", "IQ2_XXS", "MXFP4", "FP8_128", "FP4_32")


def error(got, want) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of what `layer_cases` makes: those of Flash."""

    config: object = synthetic.flash_config(3)
    slots: tuple[int, ...] = (1, 3, 64)
    tokens: tuple[int, ...] = (33, 1000)
    entries: int = 1200
    chosen: int = 512


TINY = Sizes(slots=(1, 9), tokens=(5, 259), entries=203, chosen=51)


def layer_cases(sizes: Sizes, rng: np.random.Generator):
    """As `cases`, of the kernels that are not products of packed weights."""
    c = sizes.config
    H, d, W, D, S = c.num_attention_heads, c.head_dim, c.sliding_window, c.hidden_size, c.hc_mult
    N, K = sizes.entries, sizes.chosen
    array = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    half = lambda *shape: array(*shape).astype(jnp.bfloat16)  # noqa: E731
    freqs = jnp.asarray(rope_frequencies(c, 4), jnp.float32)

    def one(how, dtype, q, window, stored, rows, sink, cos, sin):
        q, window, stored = (a.astype(dtype) for a in (q, window, stored))
        live = jnp.broadcast_to(jnp.arange(W) < W - 3, window.shape[:2])
        fn = attention_kernels.decode if how == "pallas" else attention._attend_rows
        return fn(q, window, live, stored, rows, sink, cos, sin)

    def many(how, dtype, q, keys, start, entries, rows, sink, cos, sin):
        q, keys, entries = (a.astype(dtype) for a in (q, keys, entries))
        fn = attention_kernels.many if how == "pallas" else attention._attend_many_rows
        return fn(q, keys, start, entries, rows, sink, cos, sin, 4)

    def scores(how, dtype, q, w, keys, start):
        q, keys = q.astype(dtype), keys.astype(dtype)
        T = q.shape[1]
        seen = jnp.arange(N) < (start[:, None, None] + jnp.arange(1, T + 1)[:, None]) // 4
        if how == "pallas":
            return jnp.where(seen, indexer.scores_many(q, w, keys, start, 4), 0)
        return jnp.where(seen, attention.index_scores(q, w, keys), 0)

    def scores_of_one(how, dtype, q, w, keys, start):
        q, keys = q.astype(dtype), keys.astype(dtype)
        seen = jnp.full(q.shape[:1], N - 5, jnp.int32)
        rows = jnp.arange(q.shape[0] * N, dtype=jnp.int32).reshape(-1, N)
        if how == "pallas":
            out = indexer.scores(q[:, 0], w[:, 0], keys.reshape(-1, keys.shape[-1]), rows, seen)
        else:
            out = attention.index_scores(q[:, :1], w[:, :1], keys)[:, 0]
        return jnp.where(jnp.arange(N) < N - 5, out, 0)

    def choice(how, dtype, values):
        del dtype
        if how == "pallas":
            return jnp.sort(indexer.best(values, K), axis=-1)
        return jnp.sort(jax.lax.top_k(values, K)[1], axis=-1)

    def finished(rules, how, dtype, raw, positions, weight):
        return heads.finish(raw.astype(dtype), positions, freqs, weight=weight, implementation=how, **rules)[0]

    def route(how, dtype, logits, bias):
        del dtype
        probs, experts, weights = moe.choose(logits, bias, c.num_experts_per_tok, True, 1.5, implementation=how)
        return jnp.concatenate([probs, experts.astype(jnp.float32), weights], axis=-1)

    def enter(how, dtype, streams, fn, base, scale, weight):
        x, pre, post, comb = hyper_connections.enter(
            streams.astype(dtype), fn.astype(dtype), base, scale, weight, iterations=c.hc_sinkhorn_iters,
            hc_eps=c.hc_eps, rms_eps=c.rms_norm_eps, implementation=how,
        )  # fmt: skip
        weights = jnp.concatenate([pre, post, comb.reshape(*comb.shape[:2], -1)], axis=-1)
        return jnp.concatenate([x.astype(jnp.float32), weights], axis=-1)

    for B in sizes.slots:
        rows = jnp.asarray(np.where(rng.random((B, K)) < 0.9, rng.integers(0, B * N, (B, K)), -1), jnp.int32)
        cos_sin = angles(jnp.asarray(rng.integers(0, 5000, B), jnp.int32), freqs)
        given = half(B, H, d), half(B, W, d), half(B * N, d), rows, array(H), *cos_sin
        yield f"attention, a token of {B} slots", one, given
        index = half(B, 1, c.index_n_heads, c.index_head_dim), array(B, 1, c.index_n_heads)
        start = jnp.full((B,), 4 * N, jnp.int32)
        yield f"indexer, a token of {B} slots", scores_of_one, (*index, half(B, N, c.index_head_dim), start)
    for T in sizes.tokens:
        start = jnp.asarray([4 * N - T // 2], jnp.int32)
        positions = start[:, None] + jnp.arange(T, dtype=jnp.int32)
        rows = jnp.asarray(np.sort(np.stack([rng.choice(N - T // 4, K, replace=False) for _ in range(T)])), jnp.int32)
        given = half(1, T, H, d), half(1, W + T, d), start, half(1, N, d)
        rest = array(H), *angles(positions, freqs)
        yield f"attention, {T} tokens, {K} entries each", many, (*given, rows[None], *rest)
        yield f"attention, {T} tokens, all entries", lambda how, dtype, *a: many(how, dtype, *a[:4], None, *a[4:]), (
            *given, *rest,
        )  # fmt: skip
        index = half(1, T, c.index_n_heads, c.index_head_dim), array(1, T, c.index_n_heads)
        yield f"indexer, {T} tokens", scores, (*index, half(1, N, c.index_head_dim), start)
        yield f"indexer's choice, {T} tokens", choice, (array(T, N),)
    for R in (*sizes.slots, *sizes.tokens):
        positions = jnp.asarray(rng.integers(0, 10**5, R), jnp.int32)
        for name, n, width, rules in (
            ("queries", H, d, {"eps": 1e-6}), ("keys, FP8", 1, d, {"eps": 1e-6, "rounding": "fp8"}),
            ("indexer's queries, FP4", c.index_n_heads, c.index_head_dim, {"rounding": "fp4"}),
        ):  # fmt: skip
            weight = 1 + array(width) / 10 if "keys" in name else None
            fn = functools.partial(finished, rules)
            yield f"{name}, {R} rows", fn, (half(R, n, width), positions, weight)
        yield f"router, {R} rows", route, (array(R, c.n_routed_experts), array(c.n_routed_experts) / 100)
        parts = (2 + S) * S
        fn = half(parts, S * D) * (S * D) ** -0.5
        given = half(1, R, S, D), fn, array(parts), jnp.full((3,), 0.5), 1 + array(D) / 9
        yield f"hyper-connections, {R} rows", enter, given


def cases(formats: list[str], rng: np.random.Generator, fast: bool = False, tiny: bool = False):
    """(name, function of (implementation, dtype, *arguments), arguments)."""
    normal = lambda *shape: jax.random.normal(jax.random.key(int(rng.integers(2**31))), shape, jnp.bfloat16)  # noqa: E731
    weight = lambda f, *shape: bench.random_weight(jax.random.key(int(rng.integers(2**31)), impl="rbg"), f, shape)  # noqa: E731

    def expanded(how, dtype, w):
        if how == "pallas":
            return expand.expand(w.parts, w.format, w.shape[-1], dtype, codebook(w.format))
        return quant.dequantize(w, dtype)

    def product(how, dtype, x, w):
        return quant.matmul(x.astype(dtype), w, out_dtype=jnp.float32, implementation=how)

    def swiglu(how, dtype, x, gate, up, ids, weights):
        return quant.expert_swiglu(x.astype(dtype), gate, up, ids, weights, LIMIT, implementation=how)

    def down(how, dtype, h, w, ids):
        return quant.expert_down(h.astype(dtype), w, ids, implementation=how)

    for f in formats:
        # by what they run on: byte products up to 8 rows; tensor cores, for some formats up to 64 rows from registers
        few, batch = ((2048, 4096, 1), (515, 768, 8), (1024, 2048, 3)), ((515, 768, 100), (4096, 4096, 64))
        batch += ((515, 768, 300),)  # by an expanded weight
        if f in fragments.FORMATS:
            ragged = 736 if f == "Q8_0" else 768  # no whole number of steps
            batch += (515, 768, 20), (515, ragged, 33), (2048, 4096, 9), (1024, 8192, 16)
        if tiny:
            few, batch = ((68, 1024, 1), (67, 768, 3)), ((67, 768, 70), (67, 768, 200))
            batch += ((67, 736 if f == "Q8_0" else 768, 20),) if f in fragments.FORMATS else ()
        for out, K, rows in few + batch:
            if not fast or (out, rows) in ((2048, 1), (515, 8), (515, 100), (515, 20), (515, 300)):
                yield f"matmul {f} [{rows}, {K}] · [{out}, {K}]", product, (normal(rows, K), weight(f, out, K))
        for shape in ((515, 768),) if fast or tiny else ((515, 768), (3, 130, 1024), (4096, 8192)):
            yield f"expand {f} {list(shape)}", expanded, (weight(f, *shape),)
        if not fast:
            for rows in (2, 20, 130) if f in fragments.FORMATS else (2, 130):
                yield f"matmul {f} stack of 8, {rows} rows", product, (normal(rows, 8, 1024), weight(f, 8, 256, 1024))
        E, F, D, k = (8, 256, 768, 2) if tiny else (32, 512, 1024, 6)
        gate, up, last = weight(f, E, F, D), weight(f, E, F, D), weight(f, E, D, F)
        # by what they run on: an assignment a program; byte products, or tensor cores of integers; tensor cores
        few, batch, many = ((1, "random"), (8, "random"), (8, "one expert")), ((20, "random"), (26, "one expert")), (
            (200, "random"), (130, "one expert"),
        )  # fmt: skip
        some = few[0], batch[0], many[0]
        runs = (10, "random")
        if f in integers.TOKENS:  # threads with runs of their own, and almost as many assignments as go there
            some, batch = (*some, runs), (*batch, runs, (120, "random"))
        if tiny:  # byte products of one format alone: nothing takes longer to compile
            some = few[0], *(batch[:1] if f == "Q8_0" or f in integers.TOKENS else ()), (100, "random")
        for tokens, which in some if fast or tiny else few + batch + many:
            chosen = (tokens, 2 if (tokens, which) == runs else k)
            ids = np.full(chosen, 5) if which == "one expert" else rng.integers(0, E - 3, chosen)
            ids = jnp.asarray(ids, jnp.int32)  # the last three experts stay empty
            weights = jnp.asarray(rng.random(chosen), jnp.float32)
            what = f"{f} {tokens} tokens, {which}"
            yield f"experts gate, up {what}", swiglu, (3 * normal(tokens, D), gate, up, ids, weights)
            yield f"experts down {what}", down, (normal(*chosen, F), last, ids)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--formats", default="")
    parser.add_argument("--fast", action="store_true", help="fewer formats and shapes")
    parser.add_argument("--tiny", action="store_true", help="every kernel on little work, for a checker of memory")
    parser.add_argument("--verbose", action="store_true", help="print to stderr what is being compiled")
    parser.add_argument("--only", default="", help="kernels with this in their name")
    parser.add_argument("--threads", type=int, default=12)
    args = parser.parse_args()
    if args.tiny:  # read when JAX first looks for a device
        os.environ.setdefault("XLA_PYTHON_CLIENT_ALLOCATOR", "platform")
    if reason := lowering.device_reason():
        print(f"check_gpu: {reason}", file=sys.stderr)
        return 2
    seed = args.seed if args.seed is not None else secrets.randbits(31)
    some = PUBLISHED if args.fast or args.tiny else decode.DECODERS
    formats = args.formats.split(",") if args.formats else [f for f in decode.DECODERS if f in some]
    print(f"{lowering.device_kind()}, jax {jax.__version__}, seed {seed}", flush=True)
    begin, failed, n = time.monotonic(), [], 0

    def build(name, fn, arguments):
        versions = (("pallas", jnp.bfloat16), ("xla", jnp.bfloat16), ("xla", jnp.float32))
        start = time.monotonic()
        if args.verbose:  # what has begun and not ended is what a compiler that ends the process was at
            print(f"compiling {name}", file=sys.stderr, flush=True)
        # else XLA leaves out plain JAX's own rounding to bfloat16 in the midst of a fusion
        options = {"xla_allow_excess_precision": False}
        if args.tiny:  # nothing is timed, least of all by a checker of memory
            options["xla_gpu_autotune_level"] = 0
        built = [jax.jit(lambda *a, v=v: fn(*v, *a)).lower(*arguments).compile(options) for v in versions]
        if args.verbose:
            print(f"compiled {name} in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
        return built

    def compare(name, arguments, job):
        nonlocal n
        n += 1
        try:
            ours, plain, exact = (run(*arguments) for run in job.result())
            mine, theirs = error(ours, exact), error(plain, exact)
            again = np.array_equal(np.asarray(ours), np.asarray(job.result()[0](*arguments)), equal_nan=True)
            good = mine <= max(2e-3, 1.5 * theirs) and again
            note = "" if good else "FAILED" if again else "FAILED: changes from run to run"
            print(f"{mine:8.1e}  (plain bf16 {theirs:.1e})  {name}  {note}")
        except Exception as e:  # what does not compile or run is a failure of its line
            good = False
            print(f"{'':8}  {name}  FAILED: {type(e).__name__}: {(str(e).splitlines() or [''])[0][:120]}")
        if not good:
            failed.append(name)
        sys.stdout.flush()

    def settle(running, most):
        """Compare what is compiled by now, and wait while more than `most` cases are not."""
        while running:
            wait = None if len(running) > most else 0
            done, _ = concurrent.futures.wait(running, wait, concurrent.futures.FIRST_COMPLETED)
            if not done:
                return
            for job in done:
                compare(*running.pop(job), job)

    rng = np.random.default_rng(seed)
    if args.tiny:
        every = itertools.chain(layer_cases(TINY, rng), cases(formats, rng, tiny=True))
    else:
        every = itertools.chain(layer_cases(Sizes(), rng), cases(formats, rng, args.fast))
    running = {}
    with concurrent.futures.ThreadPoolExecutor(args.threads) as pool:
        for name, fn, arguments in every:
            if args.only in name:
                running[pool.submit(build, name, fn, arguments)] = name, arguments
                settle(running, 2 * args.threads)
        settle(running, 0)
    print(f"{n - len(failed)} of {n} kernels agree, {time.monotonic() - begin:.0f} s")
    for name in failed:
        print(f"FAILED {name}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
