"""Several weights times the same few rows of activations, in one launch.

For weights whose elements are numbers as they lie: Q8_0, and plain float16, bfloat16 and float32. Activations need no
preparation, sums are float32 of exact products, and what a layer reads with the same input (query, key, compressors,
indexer) starts once instead of once each. Other formats decode to bytes first (`matvec`).

Q8_0 meets bfloat16 activations on tensor cores, a warp's 16 rows at a time, and nothing passes from thread to thread
(as in `integers`): of the four threads that share a row each has 16 neighbouring codes, which are bfloat16 numbers
exactly, and two of eight columns belong to it, the two rows of activations at its own elements, zero for the other
three. So the products of a scale's codes arrive at a thread that knows the scale.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from ds4jax.pallas import lowering as lo
from ds4jax.pallas import tuned

Array = jax.Array

MAX_ROWS = 2
WARPS = 4  # where no Q8_0 weight wants more
AHEAD = 4  # steps whose loads are under way at once
PLAIN = ("float16", "bfloat16", "float32")
STEP = 64  # codes that the four threads of a row take at once


def _float(bits: Array) -> Array:
    return lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32)


class _Numbers:
    """One weight's rows: how many a program takes, and how its threads lie along them. Multiplied as float32."""

    def __init__(self, parts: dict[str, Array], warps: int):
        self.q8 = "codes" in parts
        first = parts["codes" if self.q8 else "values"]
        self.rows, self.K = math.prod(first.shape[:-1]), first.shape[-1]
        self.per_group = first.shape[-2]
        self.arrays = [p.reshape(-1, p.shape[-1]) for p in parts.values()]
        self.unit = 16 // first.dtype.itemsize  # elements of a load of 16 bytes
        units, rest = divmod(self.K, self.unit)
        self.threads = min(32 * warps, units & -units)
        if rest or self.threads < 16 or (self.q8 and self.K % 32):
            raise NotImplementedError(f"rows of {self.K} elements do not fill a program's threads")
        self.R = 32 * warps // self.threads
        if first.ndim == 3 and self.per_group % self.R:
            raise NotImplementedError(f"groups of {self.per_group} rows are no multiple of {self.R}")
        self.steps = units // self.threads
        self.programs = -(-self.rows // self.R)

    def products(self, refs: Sequence[Any], x_ref: Any, out_ref: Any, block: Any, G: int, N: int) -> None:
        """A block's rows, times each row of activations."""
        row = block * self.R + jnp.arange(self.R, dtype=jnp.int32)
        here = jnp.minimum(row, self.rows - 1) if self.rows % self.R else row
        group = lax.div(block * self.R, self.per_group) if G > 1 else 0

        def load(step):
            u = lo.opaque(step * self.threads + jnp.arange(self.threads, dtype=jnp.int32))
            at = u[:, None] * self.unit + jnp.arange(self.unit, dtype=jnp.int32)
            codes = lo.load(refs[0], (here[None, :, None], at[:, None, :]), stream=True)
            d = lo.load(refs[1], (here[None], (u >> 1)[:, None]), stream=True) if self.q8 else None
            return codes, d, [lo.load(x_ref, (n * G + group, at)) for n in range(N)]

        def add(sums, loaded):
            codes, d, xs = loaded
            values, out = codes.astype(jnp.float32), []
            for total, x in zip(sums, xs, strict=True):
                dot = jnp.sum(values * x.astype(jnp.float32)[:, None, :], axis=2)
                out.append(total + (dot if d is None else dot * _float(d)))
            return out

        def turn(i, sums):
            for loaded in [load(i * ahead + j) for j in range(ahead)]:
                sums = add(sums, loaded)
            return sums

        ahead = math.gcd(self.steps, AHEAD)
        sums = lo.loop(self.steps // ahead, turn, [jnp.zeros((self.threads, self.R), jnp.float32)] * N)
        for n, s in enumerate(sums):
            lo.store(out_ref, (n, row), jnp.sum(s, axis=0), mask=row < self.rows)


class _Bytes:
    """One weight of Q8_0: how a program's warps divide its rows and its input. For bfloat16 activations."""

    def __init__(self, parts: dict[str, Array], warps: int, tuning: lo.Tuning):
        codes = parts["codes"]
        self.rows, self.K, self.warps = math.prod(codes.shape[:-1]), codes.shape[-1], warps
        self.per_group = codes.shape[-2]
        self.arrays = [parts[name].reshape(self.rows, -1) for name in ("codes", "d")]
        steps, rest = divmod(self.K, STEP)
        if rest or not lo.has_instructions() or (codes.ndim == 3 and self.per_group % lo.WARP_ROWS):
            raise NotImplementedError(f"{self.per_group} rows of {self.K} are not a warp's")
        self.parts = math.gcd(steps, tuning.parts)
        self.steps = steps // self.parts
        self.ahead = math.gcd(self.steps, tuning.ahead)
        self.early = tuning.stages > 1
        self.R = lo.WARP_ROWS * warps // self.parts
        self.programs = -(-self.rows // self.R)

    def products(self, refs: Sequence[Any], x_ref: Any, out_ref: Any, block: Any, G: int, N: int) -> None:
        """A block's rows, times each row of activations."""
        those, ahead = self.warps // self.parts, self.ahead
        warp, g, t = lo.Threads.of(self.warps)
        base = block * self.R + lo.WARP_ROWS * (warp % those)
        rows = [jnp.minimum(base + g + 8 * h, self.rows - 1)[:, None] for h in range(2)]
        group = jnp.minimum(base, self.rows - 1) // self.per_group if G > 1 else 0
        n = g & 1
        x_row = (jnp.minimum(n, N - 1) * G + group)[:, None]
        own = jnp.broadcast_to(((g >> 1 == t) & (n < N))[:, None], (*t.shape, 8))
        first = (warp // those) * self.steps
        zero = jnp.zeros(t.shape, jnp.float32)

        def neighbours(at, n):
            return at[:, None] + jnp.arange(n, dtype=jnp.int32)

        def load(step):
            """Codes of both rows of each step, as words, and scales of both rows."""
            codes = [
                [lo.load(refs[0], (row, neighbours(STEP * (step + j) + 16 * t, 16)), stream=True) for row in rows]
                for j in range(ahead)
            ]
            most = min(8, 2 * ahead)  # 16 bytes
            blocks = [neighbours(2 * step + i, most) for i in range(0, 2 * ahead, most)]
            d = [[lo.load(refs[1], (row, at), stream=True) for at in blocks] for row in rows]
            words = [[lo.unstack4(lo.words_of_bytes(its)) for its in of_step] for of_step in codes]
            return words, [[half for its in of_row for half in lo.unstack(its)] for of_row in d]

        def turn(i, carry):
            loaded, totals = carry
            step = first + i * ahead
            codes, d = loaded or load(step)
            if loaded:
                loaded = load(first + jnp.minimum(i + 1, turns - 1) * ahead)
            lo.loads_first()
            for j in range(ahead):
                at = STEP * (step + j) + 16 * t
                x = [lo.load(x_ref, (x_row, neighbours(at + i, 8)), mask=own) for i in (0, 8)]
                b = [word for its in x for word in lo.unstack4(lo.words_of_halves(its))]
                a = [[pair for word in its for pair in lo.bfloats_of_bytes(word)] for its in codes[j]]
                c = [zero] * 4
                for k in range(0, 8, 2):
                    both = a[0][k], a[1][k], a[0][k + 1], a[1][k + 1]
                    c = lo.warp_product(both, b[k : k + 2], c, jnp.bfloat16)
                scales = [_float(jnp.where(t < 2, *of_row[2 * j : 2 * j + 2])) for of_row in d]
                totals = [[lo.fma(c[2 * h + e], scales[h], totals[h][e]) for e in range(N)] for h in range(2)]
            return loaded, totals

        turns = self.steps // ahead
        early = load(first) if self.early and turns > 1 else []
        _, totals = lo.loop(turns, turn, (early, [[zero] * N for _ in range(2)]))
        # thread t of a row's four keeps the sum of row g + 8·(t & 1) and of row t >> 1 of activations
        y = zero
        for h, of_row in enumerate(totals):
            for e, total in enumerate(of_row):
                y = jnp.where(t == 2 * e + h, lo.sum_of_four(total), y)
        if self.parts > 1:
            y = jnp.sum(y.reshape(self.parts, -1), axis=0)
        warp, g, t = lo.Threads.of(those)
        row = block * self.R + lo.WARP_ROWS * warp + g + 8 * (t & 1)
        lo.store(out_ref, (t >> 1, row), 64.0 * y, mask=(row < self.rows) & (t < 2 * N))


def serves(parts: dict[str, Array], format: str | None) -> bool:
    """Whether these kernels read such a weight: `format` of a packed one, None for a plain one."""
    if format is None:
        return str(parts["values"].dtype) in PLAIN
    return format == "Q8_0"


def _laid_out(parts: dict[str, Array], dtype: Any, warps: int, tuning: lo.Tuning) -> _Numbers | _Bytes:
    if "codes" in parts and dtype == jnp.bfloat16:
        with contextlib.suppress(NotImplementedError):
            return _Bytes(parts, warps, tuning)
    return _Numbers(parts, warps)


def products(
    x: Array, weights: Sequence[tuple[dict[str, Array], str | None]], out_dtypes: Sequence[Any],
    tuning: lo.Tuning | None = None,
) -> list[Array]:  # fmt: skip
    """`x[N, in] · w[out, in]ᵀ → [N, out]` for each weight, or one stack `x[N, G, in] · w[G, out, in]ᵀ → [N, G, out]`.

    weights: (parts, format) of packed weights, ({"values": w}, None) of plain ones. 1 ≤ N ≤ MAX_ROWS.
    NotImplementedError where no kernel serves the call.
    """
    stacked = x.ndim == 3
    N, G, K = x.shape[0], (x.shape[1] if stacked else 1), x.shape[-1]
    if not 1 <= N <= MAX_ROWS:
        raise NotImplementedError(f"{N} rows of activations; this kernel takes 1 to {MAX_ROWS}")
    for parts, format in weights:
        if not serves(parts, format):
            raise NotImplementedError(f"no kernel for {format or parts['values'].dtype} that needs no preparation")
    rows = [math.prod(next(iter(parts.values())).shape[:-1]) for parts, _ in weights]
    tunings = [tuning or tuned.direct(n, K) for n in rows]
    warps = max([WARPS, *(t.warps for t, (_, format) in zip(tunings, weights, strict=True) if format)])
    each = [_laid_out(parts, x.dtype, warps, t) for (parts, _), t in zip(weights, tunings, strict=True)]
    starts = np.cumsum([0, *(w.programs for w in each)]).tolist()

    def kernel(x_ref, *refs):
        refs, i = list(refs), pl.program_id(0)
        outs = refs[-len(each) :]
        for w, first, out_ref in zip(each, starts, outs, strict=False):
            mine, refs = refs[: len(w.arrays)], refs[len(w.arrays) :]

            @pl.when((i >= first) & (i < first + w.programs))
            def _(w=w, first=first, out_ref=out_ref, mine=mine):
                w.products(mine, x_ref, out_ref, i - first, G, N)

    shapes = [jax.ShapeDtypeStruct((N, w.rows), dtype) for w, dtype in zip(each, out_dtypes, strict=True)]
    arrays = [a for w in each for a in w.arrays]
    out = lo.call(
        kernel, shapes, x.reshape(N * G, K), *arrays, grid=(starts[-1],),
        tuning=lo.Tuning(warps=warps, stages=1), name=f"direct_{len(each)}_{N}",
    )  # fmt: skip
    return [y.reshape(N, G, -1) if stacked else y for y in out]
