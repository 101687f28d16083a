"""Find fast shapes of work for the kernels on this GPU, and write them where the kernels look for them.

Every variant is compiled (in parallel threads), compared with plain JAX on random weights, and timed; a table sorted by
speed is printed for each operation. With the default choice about three minutes on an H100 or H200.

usage: python scripts/tune_kernels.py [--ops matvec,swiglu,down,dense,grouped] [--formats Q8_0,…] [--quick]
                                      [--out ds4jax/pallas/tuned.json] [--budget 240] [--threads 12]
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import itertools
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ds4jax import quant
from ds4jax.pallas import decode, experts, lowering, matrix, matvec, tuned
from ds4jax.quant.matmul import codebook
from ds4jax.runtime import bench

E, F, D, k = 256, 2048, 4096, 6  # Flash
LIMIT = 10.0

# operation → [(format, shape, rows of activations)]; the first format of each is in the published q2 file
CASES = {
    "matvec": [
        ("Q8_0", (2048, 4096), 1), ("Q8_0", (32768, 1024), 1), ("Q8_0", (4096, 2048), 1), ("Q8_0", (4096, 8192), 1),
        ("Q4_K", (2048, 4096), 1),
    ],
    "swiglu": [("IQ2_XXS", (E, F, D), 1), ("Q4_K", (E, F, D), 1), ("MXFP4", (E, F, D), 1), ("IQ3_XXS", (E, F, D), 1)],
    "down": [("Q2_K", (E, D, F), 1), ("Q4_K", (E, D, F), 1), ("MXFP4", (E, D, F), 1), ("IQ3_S", (E, D, F), 1)],
    "dense": [("Q8_0", (4096, 4096), 64)],
    "grouped": [("IQ2_XXS", (E, F, D), 512), ("Q2_K", (E, D, F), 512)],
}  # fmt: skip


def variants(op: str, format: str, K: int, quick: bool) -> list[lowering.Tuning]:
    """The shapes of work to try."""
    if op in ("dense", "grouped"):
        rows, units, tokens = ((64,), (8,), (32, 64)) if quick else ((64, 128), (4, 8), (32, 64))
        stages = (2,) if quick else (2, 3)
        return [
            lowering.Tuning(r, u, r // 16, s, t) for r, u, t, s in itertools.product(rows, units, tokens, stages)
        ]  # fmt: skip
    most = max(32, matvec.power_of_two(K // decode.DECODERS[format].unit))
    shapes = [(32 * w, w) for w in (1, 2, 4, 8)] + ([] if quick else [(128, 2), (256, 4)])
    shapes += [(32, 2)] if most == 32 else []
    rows = (4, 8) if quick else (2, 4, 8, 16)
    return [lowering.Tuning(r, units, w) for r, (units, w) in itertools.product(rows, shapes) if units <= most]


def operation(op: str, w: quant.QuantizedArray, tokens: int):
    """(x, weights for a chain, function of (x, weight, tuning or None for plain JAX), bytes that it must read)."""
    key, rng = jax.random.key(7), np.random.default_rng(0)
    book = codebook(w.format)
    stack = lambda w: experts.Stack(w.parts, w.format, book)  # noqa: E731
    n = w.nbytes
    if op in ("matvec", "dense"):
        x = jax.random.normal(key, (tokens, w.shape[-1]), jnp.bfloat16)
        kernel = matvec.matvec if op == "matvec" else matrix.matmul

        def run(x, w, tuning):
            if tuning is None:
                return quant.matmul(x.astype(jnp.float32), w, implementation="xla")
            return kernel(x, w.parts, w.format, jnp.float32, book, tuning)

        return x, bench.distinct(w.format, w.shape), run, n
    picks = [np.stack([rng.choice(E, k, replace=False) for _ in range(tokens)]).astype(np.int32) for _ in range(8)]
    share = len(np.unique(picks[0])) / E
    if op == "swiglu" or (op == "grouped" and w.shape[1] == F):
        x, ones = jax.random.normal(key, (tokens, D), jnp.bfloat16), jnp.ones((tokens, k), jnp.float32)
        kernel = experts.swiglu if op == "swiglu" else matrix.grouped_swiglu

        def run(x, w, tuning):
            if tuning is None:
                return quant.expert_swiglu(x.astype(jnp.float32), w[1], w[2], w[0], ones, LIMIT, implementation="xla")
            return kernel(x, stack(w[1]), stack(w[2]), w[0], ones, LIMIT, tuning)

        other = bench.random_weight(jax.random.key(9), w.format, w.shape)
        return x, [(jnp.asarray(p), w, other) for p in picks], run, 2 * int(n * share)
    x = jax.random.normal(key, (tokens, k, F), jnp.bfloat16)
    kernel = experts.down if op == "down" else matrix.grouped_down

    def run(x, w, tuning):
        if tuning is None:
            return quant.expert_down(x.astype(jnp.float32), w[1], w[0], implementation="xla")
        return kernel(x, stack(w[1]), w[0], tuning)

    return x, [(jnp.asarray(p), w) for p in picks], run, int(n * share)


def error(got, want) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def tune(op: str, format: str, shape: tuple[int, ...], tokens: int, args, bandwidth: float):
    """Rows of the table: (seconds or None, error, tuning, message), the fastest first."""
    w = bench.random_weight(jax.random.key(1), format, shape)
    x, weights, run, nbytes = operation(op, w, tokens)
    turns = 4 if tokens == 1 else 1
    want = jax.jit(lambda x, w: run(x, w, None))(x, weights[0])

    def build(t):
        once = jax.jit(lambda x, w: run(x, w, t))
        return bench.chained(once, turns).lower(x, weights).compile(), once.lower(x, weights[0]).compile()

    rows, tried = [], variants(op, format, shape[-1], args.quick or CASES[op].index((format, shape, tokens)) > 0)
    with concurrent.futures.ThreadPoolExecutor(args.threads) as pool:
        for t, job in [(t, pool.submit(build, t)) for t in tried]:
            try:
                chain, once = job.result()
                wrong = error(once(x, weights[0]), want)
                s = bench.seconds(lambda: chain(x, weights), 5) / (turns * len(weights))  # noqa: B023
                rows.append((s, wrong, t, "" if wrong < 6e-3 else "WRONG"))
            except Exception as e:  # a variant too large for the device is a row of the table
                rows.append((None, None, t, f"{type(e).__name__}: {str(e).splitlines()[0][:70]}"))
    rows.sort(key=lambda r: (r[0] is None or r[3] == "WRONG", r[0] or 0))
    print(f"\n{op} {format} {'×'.join(map(str, shape))}, {tokens} rows: {nbytes / 2**20:.0f} MiB")
    for s, wrong, t, message in rows[: args.show] + [r for r in rows[args.show :] if r[3]][:3]:
        what = f"rows={t.rows} units={t.units} warps={t.warps} stages={t.stages} tokens={t.tokens}"
        if s is None:
            print(f"  {'':28} {what}  {message}")
        else:
            print(f"  {1e6 * s:8.1f} µs {nbytes / s / 1e9:6.0f} GB/s {nbytes / s / bandwidth:5.0%}  {what}"
                  f"  error {wrong:.1e} {message}")  # fmt: skip
    sys.stdout.flush()
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ops", default="matvec,swiglu,down,dense,grouped")
    parser.add_argument("--formats", default="")
    parser.add_argument("--quick", action="store_true", help="a few variants each")
    parser.add_argument("--out", default=str(tuned.FILE))
    parser.add_argument("--budget", type=float, default=240, help="seconds; what does not fit is left out")
    parser.add_argument("--threads", type=int, default=12)
    parser.add_argument("--show", type=int, default=5, help="rows of each table")
    args = parser.parse_args()
    if reason := lowering.device_reason():
        print(f"tune_kernels: {reason}", file=sys.stderr)
        return 2
    begin = time.monotonic()
    bandwidth = bench.copy_bandwidth()
    print(f"{lowering.device_kind()}, jax {jax.__version__}: copies move {bandwidth / 1e12:.2f} TB/s")
    out = Path(args.out)
    best = json.loads(out.read_text()) if out.exists() else {}
    here = best.setdefault(lowering.device_kind(), {})
    wrong = False
    cases = [(op, *case) for op in args.ops.split(",") for case in CASES[op]]
    for op, format, shape, tokens in cases:
        if args.formats and format not in args.formats.split(","):
            continue
        if time.monotonic() - begin > args.budget:
            print(f"left out for want of time: {op} {format}")
            continue
        rows = tune(op, format, shape, tokens, args, bandwidth)
        wrong |= any(r[3] == "WRONG" for r in rows)
        if rows[0][0] is not None and rows[0][3] != "WRONG":
            here.setdefault(op, {})[f"{format}/{shape[-1]}"] = dataclasses.asdict(rows[0][2])
            out.write_text(json.dumps(best, indent=1, sort_keys=True) + "\n")
    print(f"\n{time.monotonic() - begin:.0f} s; written to {out}")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
