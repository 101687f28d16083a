"""Compare every kernel with plain JAX on this GPU, on fresh random inputs.

Each line: kernel, format, shape, ‖kernel − exact‖ / ‖exact‖ with the exact result from plain JAX in float32, and for
comparison what plain JAX reaches with bfloat16 activations. A kernel passes at 2e-3, or where rounding the result (and,
on tensor cores, the weights) to bfloat16 alone costs more, at 1.5 times what plain JAX loses. Exit code 1 if one fails.

usage: python scripts/check_gpu.py [--seed N] [--formats Q8_0,…] [--fast] [--threads 12]
"""

from __future__ import annotations

import argparse
import concurrent.futures
import secrets
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from ds4jax import quant
from ds4jax.pallas import decode, lowering
from ds4jax.runtime import bench

LIMIT = 10.0
PUBLISHED = ("Q8_0", "Q2_K", "Q4_K", "IQ2_XXS", "MXFP4", "FP8_128", "FP4_32")


def error(got, want) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def cases(formats: list[str], fast: bool, rng: np.random.Generator, key):
    """(name, function of (implementation, dtype, *arguments), arguments)."""
    normal = lambda *shape: jax.random.normal(jax.random.key(int(rng.integers(2**31))), shape, jnp.bfloat16)  # noqa: E731
    weight = lambda f, *shape: bench.random_weight(jax.random.key(int(rng.integers(2**31)), impl="rbg"), f, shape)  # noqa: E731

    def product(how, dtype, x, w):
        return quant.matmul(x.astype(dtype), w, out_dtype=jnp.float32, implementation=how)

    def swiglu(how, dtype, x, gate, up, ids, weights):
        return quant.expert_swiglu(x.astype(dtype), gate, up, ids, weights, LIMIT, implementation=how)

    def down(how, dtype, h, w, ids):
        return quant.expert_down(h.astype(dtype), w, ids, implementation=how)

    for f in formats:
        for out, K, rows in ((2048, 4096, 1), (515, 768, 8), (1024, 2048, 3), (515, 768, 100), (4096, 4096, 64)):
            if not fast or (out, rows) in ((2048, 1), (515, 8), (515, 100)):
                yield f"matmul {f} [{rows}, {K}] · [{out}, {K}]", product, (normal(rows, K), weight(f, out, K))
        if not fast:
            yield f"matmul {f} stack of 8, 2 rows", product, (normal(2, 8, 1024), weight(f, 8, 256, 1024))
        E, F, D, k = 24, 512, 1024, 6
        gate, up, last = weight(f, E, F, D), weight(f, E, F, D), weight(f, E, D, F)
        # by what they run on: an assignment a program; byte products; tensor cores
        few, batch, many = ((1, "random"), (8, "random"), (8, "one expert")), ((20, "random"), (26, "one expert")), (
            (200, "random"), (130, "one expert"),
        )  # fmt: skip
        for tokens, which in (few[0], batch[0], many[0]) if fast else few + batch + many:
            ids = np.full((tokens, k), 5) if which == "one expert" else rng.integers(0, E - 3, (tokens, k))
            ids = jnp.asarray(ids, jnp.int32)  # the last three experts stay empty
            weights = jnp.asarray(rng.random((tokens, k)), jnp.float32)
            what = f"{f} {tokens} tokens, {which}"
            yield f"experts gate, up {what}", swiglu, (3 * normal(tokens, D), gate, up, ids, weights)
            yield f"experts down {what}", down, (normal(tokens, k, F), last, ids)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--formats", default="")
    parser.add_argument("--fast", action="store_true", help="fewer formats and shapes")
    parser.add_argument("--threads", type=int, default=12)
    args = parser.parse_args()
    if reason := lowering.device_reason():
        print(f"check_gpu: {reason}", file=sys.stderr)
        return 2
    seed = args.seed if args.seed is not None else secrets.randbits(31)
    formats = (
        args.formats.split(",") if args.formats else [f for f in decode.DECODERS if not args.fast or f in PUBLISHED]
    )
    print(f"{lowering.device_kind()}, jax {jax.__version__}, seed {seed}")
    begin, failed, n = time.monotonic(), [], 0

    def build(fn, arguments):
        versions = (("pallas", jnp.bfloat16), ("xla", jnp.bfloat16), ("xla", jnp.float32))
        return [jax.jit(lambda *a, v=v: fn(*v, *a)).lower(*arguments).compile() for v in versions]

    with concurrent.futures.ThreadPoolExecutor(args.threads) as pool:
        todo = [
            (name, arguments, pool.submit(build, fn, arguments))
            for name, fn, arguments in cases(formats, args.fast, np.random.default_rng(seed), jax.random.key(seed))
        ]
        for name, arguments, job in todo:
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
                print(f"{'':8}  {name}  FAILED: {type(e).__name__}: {str(e).splitlines()[0][:120]}")
            if not good:
                failed.append(name)
            sys.stdout.flush()
    print(f"{n - len(failed)} of {n} kernels agree, {time.monotonic() - begin:.0f} s")
    for name in failed:
        print(f"FAILED {name}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
