"""Find fast shapes of work for the kernels on this GPU, and write them where the kernels look for them.

Every variant is compiled (in parallel threads), compared with plain JAX on random weights, and timed by the profiler:
the kernel's own time, median over distinct weights that together exceed the device's caches. A table sorted by speed is
printed for each case, with what else the device runs for it (activations split into digits, schedules). Where several
cases share an entry of the file, the variant that is best for all of them together is written; and where an operation
can go by byte products or on tensor cores, up to which number of assignments an expert the former are faster.

Routed experts of IQ2_XXS and Q2_K: a few tokens are `integers_few` (of Q2_K a single one, others are `down`), short
runs of IQ2_XXS `integers_runs`, other batches `integers`, and those of more than `tuned.INTEGERS_UP_TO` assignments an
expert `grouped`, or on Hopper, of more than `tuned.INTEGERS_BEFORE_WARPGROUPS`, `warpgroups`, as the dispatch has it.

usage: python scripts/tune_kernels.py [--ops matvec,swiglu,down,bytes,dense,grouped,integers_few,integers_runs,integers,
                                      warpgroups] [--formats Q8_0,…] [--quick] [--out ds4jax/pallas/tuned.json]
                                      [--budget 600] [--threads 16]
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import itertools
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ds4jax import quant
from ds4jax.pallas import decode, experts, integers, lowering, matrix, matvec, tuned, warpgroups
from ds4jax.quant.matmul import codebook
from ds4jax.runtime import bench

E, F, D, k = 256, 2048, 4096, 6  # Flash
LIMIT = 10.0
CHECKED = 64  # tokens whose results are compared
# names of kernels; others are overhead
KERNELS = ("matvec_", "swiglu_", "down_", "bytes_", "matmul_", "grouped_", "integers_", "warpgroups_")

# (operation, format, shape, tokens); those of the published q2 file first
GATE, DOWN = ("IQ2_XXS", (E, F, D)), ("Q2_K", (E, D, F))
PUBLISHED = [
    *(("warpgroups", *case, 4096) for case in (GATE, DOWN)),
    *(("grouped", *case, tokens) for tokens in (2048, 4096) for case in (GATE, DOWN)),
    *(("integers_few", *case, 1) for case in (GATE, DOWN)), ("down", *DOWN, 4), ("integers_runs", *GATE, 64),
    ("integers", *GATE, 256), *(("integers", *DOWN, tokens) for tokens in (64, 256)),
    ("dense", "Q8_0", (4096, 8192), 64), ("dense", "Q8_0", (32768, 1024), 64),
    *(("matvec", "Q8_0", shape, 1) for shape in ((4096, 2048), (512, 4096), (8, 1024, 4096), (1024, 4096),
                                                 (2048, 4096), (32768, 1024), (4096, 8192), (129280, 4096))),
]  # fmt: skip
OTHERS = [
    ("matvec", "Q4_K", (2048, 4096), 1),
    *(("swiglu", f, (E, F, D), 1) for f in ("Q4_K", "MXFP4", "IQ3_XXS")),
    *(("down", f, (E, D, F), 1) for f in ("Q4_K", "MXFP4", "IQ3_S")),
    *((op, f, (E, F, D), 64) for f in ("Q4_K", "MXFP4") for op in ("bytes", "grouped")),
    *(("grouped", f, (E, F, D), 2048) for f in ("Q4_K", "MXFP4")),
]

OPERATIONS = "matvec,swiglu,down,bytes,dense,grouped,integers_few,integers_runs,integers,warpgroups"

Case = tuple[str, str, tuple[int, ...], int]


def variants(case: Case, quick: bool) -> list[lowering.Tuning]:
    """The shapes of work to try."""
    op, format, shape, tokens = case
    T, unit = lowering.Tuning, decode.DECODERS[format].unit
    if op in ("dense", "grouped"):
        shapes = [(64, 4, 128), (128, 8, 128), (64, 4, 64)]  # rows, warps, elements of a step
        if op == "dense":
            shapes = [(64, 4, 128), (32, 4, 128), (64, 4, 256), (32, 4, 256)]
        shapes += [] if quick else [(128, 8, 64), (128, 4, 64), (64, 4, 256), (64, 8, 128), (32, 4, 128)]
        # The copies of activations that stages pipeline are waited for one step late with three of them.
        how = [(2, 0), (2, 1), (3, 0), (3, 1)]  # stages, ahead
        if tokens * k < 16 * E:  # short runs: what counts is decoding
            shapes, how = shapes[:2], how[::3]
        if quick and op == "grouped":
            shapes = shapes[:1]
        lengths = (64, 128) if tokens * k > 64 * E else (64,)
        return [T(r, s // unit, w, n, m, a) for (r, w, s), (n, a), m in itertools.product(shapes, how, lengths)]
    if op == "warpgroups":
        return [T(warps=w, stages=1, tokens=m, ahead=a) for w, m, a in itertools.product((8, 16), (64, 128), (1, 2))]
    if op.startswith("integers"):
        tokens = {"integers_few": (1,), "integers_runs": (2, 4), "integers": (4, 8, 16)}[op]
        parts = (2, 4, 8) if op == "integers_few" else (1,) if quick else (1, 2)
        limits, aheads = (0,) if quick else (0, 64, 80, 128), (0, 1) if op == "integers" else (0,)
        both = [(w, p) for w, p in itertools.product((4, 8), parts) if p <= w]
        choices = itertools.product(both, tokens, limits, aheads)
        return [T(warps=w, stages=1, tokens=m, parts=p, registers=r, ahead=a) for (w, p), m, r, a in choices]
    count = shape[-1] // unit
    most = max(32, lowering.power_of_two(count))
    threads = [(32 * w, w) for w in (1, 2, 4) if 32 * w <= most]

    def steps(u):  # without a second step nothing can be ahead
        return (0, 1) if u < count else (0,)

    if op == "bytes":
        sums = ((4, 2), (4, 4), (8, 2)) if quick else itertools.product((1, 2, 4, 8), (2, 4, 8))
        both = itertools.product(sums, threads[: 1 if quick else 2])
        return [T(r, u, w, 2, m, a) for (r, m), (u, w) in both if r * m <= 32 for a in steps(u)]
    rows = ((1, 2, 4) if op == "matvec" else (2, 4, 8)) if quick else (1, 2, 4, 8)
    both = itertools.product(rows, threads[: 2 if quick else 3])
    return [T(r, u, w, ahead=a) for r, (u, w) in both for a in steps(u)]


def operation(case: Case) -> tuple[Any, Any]:
    """(function of (x, weight, tuning or None for plain JAX), function that makes (x, weights for a measurement))."""
    op, format, shape, tokens = case
    key, rng, book = jax.random.key(7), np.random.default_rng(0), codebook(format)
    stack = lambda w: experts.Stack(w.parts, w.format, book)  # noqa: E731
    if op in ("matvec", "dense"):
        kernel = matvec.matvec if op == "matvec" else matrix.matmul

        def product(x, w, tuning):
            if tuning is None:
                return quant.matmul(x.astype(jnp.float32), w, implementation="xla")
            return kernel(x, w.parts, format, jnp.float32, book, tuning)

        x = (tokens, *shape[:-2], shape[-1])
        return product, lambda: (jax.random.normal(key, x, jnp.bfloat16), bench.distinct(format, shape))
    count = 8 if tokens == 1 else 2
    picks = [np.stack([rng.choice(E, k, replace=False) for _ in range(tokens)]).astype(np.int32) for _ in range(count)]
    stacks = lambda n: [bench.random_weight(i, format, shape) for i in jax.random.split(key, n)]  # noqa: E731
    module = {"grouped": matrix, "warpgroups": warpgroups}.get(op, integers if op.startswith("integers") else experts)
    grouped = op in ("bytes", "grouped")
    if shape[1] == F:
        kernel = module.grouped_swiglu if grouped else module.swiglu

        def swiglu(x, w, tuning):
            ones = jnp.ones((tokens, k), jnp.float32)
            if tuning is None:
                return quant.expert_swiglu(x.astype(jnp.float32), w[1], w[2], w[0], ones, LIMIT, implementation="xla")
            return kernel(x, stack(w[1]), stack(w[2]), w[0], ones, LIMIT, tuning)

        def make():
            two = stacks(2)
            return jax.random.normal(key, (tokens, D), jnp.bfloat16), [(jnp.asarray(p), *two) for p in picks]

        return swiglu, make
    kernel = module.grouped_down if grouped else module.down

    def down(x, w, tuning):
        if tuning is None:
            return quant.expert_down(x.astype(jnp.float32), w[1], w[0], implementation="xla")
        return kernel(x, stack(w[1]), w[0], tuning)

    def make_down():
        (one,) = stacks(1)
        return jax.random.normal(key, (tokens, k, F), jnp.bfloat16), [(jnp.asarray(p), one) for p in picks]

    return down, make_down


def work(case: Case) -> tuple[int, float]:
    """Bytes of weights that a case must read, and its multiplications and additions."""
    op, format, shape, tokens = case
    matrices = 2 if len(shape) == 3 and shape[1:] == (F, D) and op != "matvec" else 1
    elements = math.prod(shape) * matrices
    nbytes = elements * quant.FORMATS[format].bytes // quant.FORMATS[format].block
    if op in ("matvec", "dense"):
        return nbytes, 2.0 * elements * tokens
    return int(nbytes * (1 - (1 - k / E) ** tokens)), 2.0 * elements / E * k * tokens


def error(got, want) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def measure(case: Case, jobs: list[tuple[lowering.Tuning | None, Any]], show: int, bandwidth: float):
    """Print the case's table; {tuning: seconds} of the variants that are right, and whether one was wrong."""
    run, make = operation(case)
    x, weights = make()
    want, ready, rows = None, [], []
    for t, job in jobs:
        try:
            exe = job.result()
            if t is None:
                want = exe(x, weights[0])[:CHECKED]
                continue
            ready.append((t, exe, error(exe(x, weights[0])[:CHECKED], want)))
        except Exception as e:  # a variant too large for the device is a row of the table
            rows.append((math.inf, None, t, f"{type(e).__name__}: {str(e).splitlines()[0][:70]}"))

    def all_of_them():
        for _, exe, _ in ready:
            for w in weights:
                y = exe(x, w)
        return y

    times = bench.device_times(all_of_them) if ready else {}
    mine = [v for name, v in times.items() if any(part in name for part in KERNELS)]
    if ready and (len(mine) != 1 or len(mine[0]) != len(ready) * len(weights)):
        raise RuntimeError(f"{case}: {len(ready)}·{len(weights)} runs, but {[len(v) for v in mine]} of kernels")
    for i, (t, _, wrong) in enumerate(ready):
        us = statistics.median(mine[0][i * len(weights) : (i + 1) * len(weights)])
        rows.append((us / 1e6, wrong, t, "" if wrong < 6e-3 else "WRONG"))
    rows.sort(key=lambda r: (r[3] == "WRONG", r[0]))
    other = {n: statistics.median(v) * len(v) / max(1, len(mine[0])) for n, v in times.items() if v is not mine[0]}
    op, format, shape, tokens = case
    nbytes, flops = work(case)
    split = sum(other.get(name, 0) for name in ("split_activations", "split_blocks"))
    print(
        f"\n{op} {format} {'×'.join(map(str, shape))}, {tokens} tokens: {nbytes / 2**20:.0f} MiB; besides, "
        f"{sum(other.values()):.1f} µs in {len(other)} kernels, {split:.1f} of it splitting activations"
    )
    for s, wrong, t, message in rows[:show] + [r for r in rows[show:] if r[3]][:3]:
        what = " ".join(f"{name}={value}" for name, value in dataclasses.asdict(t).items())
        if wrong is None:
            print(f"  {'':42} {what}  {message}")
        else:
            print(f"  {1e6 * s:8.2f} µs {nbytes / s / 1e9:6.0f} GB/s {nbytes / s / bandwidth:5.0%} "
                  f"{flops / s / 1e12:6.1f} TFLOP/s  {what}  error {wrong:.1e} {message}")  # fmt: skip
    sys.stdout.flush()
    return {r[2]: r[0] for r in rows if r[1] is not None and r[3] != "WRONG"}, any(r[3] == "WRONG" for r in rows)


def choose(cases: dict[Case, dict[lowering.Tuning, float]]) -> lowering.Tuning | None:
    """The variant that is best for all cases together, each counted by what it loses against its own best."""

    def loss(t):
        total = 0.0
        for (op, _, shape, tokens), times in cases.items():
            mean = max(1, tokens * k // shape[0])
            cut = max(64, lowering.power_of_two(mean)) if op == "grouped" else t.tokens  # as `tuned.grouped` does
            here = times.get(dataclasses.replace(t, tokens=min(t.tokens, cut)))
            if here is None:
                return math.inf
            total += here / min(times.values())
        return total

    found = sorted({t for times in cases.values() for t in times}, key=loss)
    return found[0] if found and loss(found[0]) < math.inf else None


def crossing(best: dict[Case, float], format: str) -> float | None:
    """Up to how many assignments an expert byte products are faster than tensor cores; None where not both ran."""
    both = [
        (tokens * k / E, best["bytes", f, shape, tokens] < best["grouped", f, shape, tokens])
        for op, f, shape, tokens in best
        if op == "bytes" and f == format and ("grouped", f, shape, tokens) in best
    ]
    if not both:
        return None
    yes, no = [m for m, wins in both if wins], [m for m, wins in both if not wins]
    if not yes:
        return min(no) / 2
    above = [m for m in no if m > max(yes)]
    return round(math.sqrt(max(yes) * min(above)) if above else 1.5 * max(yes), 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ops", default=OPERATIONS)
    parser.add_argument("--formats", default="")
    parser.add_argument("--quick", action="store_true", help="fewer variants, of the published file's formats")
    parser.add_argument("--out", default=str(tuned.FILE))
    parser.add_argument("--budget", type=float, default=600, help="seconds; what does not fit is left out")
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--show", type=int, default=5, help="rows of each table")
    args = parser.parse_args()
    if reason := lowering.device_reason():
        print(f"tune_kernels: {reason}", file=sys.stderr)
        return 2
    begin = time.monotonic()
    bandwidth = bench.copy_bandwidth()
    print(f"{lowering.device_kind()}, jax {jax.__version__}: copies move {bandwidth / 1e12:.2f} TB/s")
    cases = [
        case for case in PUBLISHED + ([] if args.quick else OTHERS)
        if case[0] in args.ops.split(",") and (not args.formats or case[1] in args.formats.split(","))
    ]  # fmt: skip

    def build(case, t):
        if time.monotonic() - begin > args.budget:
            raise TimeoutError("no time left to compile it")
        run, make = operation(case)
        x, weights = jax.eval_shape(make)
        return jax.jit(lambda x, w: run(x, w, t)).lower(x, weights[0]).compile()

    measured: dict[Case, dict[lowering.Tuning, float]] = {}
    wrong = False
    with concurrent.futures.ThreadPoolExecutor(args.threads) as pool:
        jobs = [
            (case, [(t, pool.submit(build, case, t)) for t in [None, *variants(case, args.quick)]]) for case in cases
        ]
        for case, its in jobs:
            if time.monotonic() - begin > args.budget:
                print(f"left out for want of time: {case[0]} {case[1]}, {case[3]} tokens")
                continue
            measured[case], bad = measure(case, its, args.show, bandwidth)
            wrong |= bad
    out = Path(args.out)
    file = json.loads(out.read_text()) if out.exists() else {}
    here = file.setdefault(lowering.device_kind(), {})
    keys: dict[tuple[str, str], dict[Case, dict[lowering.Tuning, float]]] = {}
    for case, times in measured.items():
        op, format, shape, tokens = case
        rows = math.prod(shape[:-1]) if op == "matvec" else shape[-2]
        if times and not (op == "grouped" and tokens < 2048):  # those are there for the comparison
            keys.setdefault((op, f"{format}/{rows}x{shape[-1]}"), {})[case] = times
    for (op, name), its in keys.items():
        if (t := choose(its)) is not None:
            here.setdefault(op, {})[name] = dataclasses.asdict(t)
    best = {case: min(times.values()) for case, times in measured.items() if times}
    for format in sorted({case[1] for case in best}):
        if (mean := crossing(best, format)) is not None:
            here.setdefault("bytes_up_to", {})[format] = mean
            print(f"{format}: byte products up to {mean} assignments an expert")
    out.write_text(json.dumps(file, indent=1, sort_keys=True) + "\n")
    print(f"\n{time.monotonic() - begin:.0f} s; written to {out}")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
