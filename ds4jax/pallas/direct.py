"""Several weights times the same few rows of activations, in one launch.

For weights whose elements are numbers as they lie: Q8_0, and plain float16, bfloat16 and float32. Activations need no
preparation, sums are float32 of exact products, and what a layer reads with the same input (query, key, compressors,
indexer) starts once instead of once each. Other formats decode to bytes first (`matvec`).

Q8_0 meets bfloat16 activations on tensor cores, a warp's 16 rows at a time, and nothing passes from thread to thread
(as in `integers`): of the four threads that share a row each has 16 neighbouring codes, which are bfloat16 numbers
exactly, and two of eight columns belong to it, the two rows of activations at its own elements, zero for the other
three. So the products of a scale's codes arrive at a thread that knows the scale. An RMS norm of the activations may
come first: each program makes it of its own, while its first codes are on their way.
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

    def products(
        self, refs: Sequence[Any], x_ref: Any, out_ref: Any, block: Any, G: int, N: int, norm: tuple[Any, float] | None
    ) -> None:
        """A block's rows, times each row of activations."""
        assert norm is None
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
        self.R = lo.WARP_ROWS * warps // self.parts
        self.programs = -(-self.rows // self.R)

    def _normed(self, x_ref: Any, weight_ref: Any, eps: float, N: int) -> lo.SharedWords:
        """Rows of activations after their norm, in pairs of bfloat16."""
        threads = 32 * self.warps
        lane, four = jnp.arange(threads, dtype=jnp.int32)[:, None], jnp.arange(4, dtype=jnp.int32)
        places = [4 * (lane + at) + four for at in range(0, self.K // 4, threads)]
        x = [[lo.load(x_ref, (n, at)).astype(jnp.float32) for at in places] for n in range(N)]
        weights = [lo.load(weight_ref, (at,)).astype(jnp.float32) for at in places]
        words = []
        for row in x:
            square = jnp.sum(sum(jnp.sum(its * its, axis=1) for its in row))
            scale = lax.rsqrt(square / self.K + eps)
            for its, weight in zip(row, weights, strict=True):
                words += lo.unstack(lo.words_of_halves((its * scale * weight).astype(x_ref.dtype)))
        return lo.share_words(words)

    def products(
        self, refs: Sequence[Any], x_ref: Any, out_ref: Any, block: Any, G: int, N: int, norm: tuple[Any, float] | None
    ) -> None:
        """A block's rows, times each row of activations. norm: a ref of weights, and eps."""
        those, ahead = self.warps // self.parts, self.ahead
        warp, g, t = lo.Threads.of(self.warps)
        base = block * self.R + lo.WARP_ROWS * (warp % those)
        rows = [jnp.minimum(base + g + 8 * h, self.rows - 1)[:, None] for h in range(2)]
        group = jnp.minimum(base, self.rows - 1) // self.per_group if G > 1 else 0
        n = g & 1
        x_row = (jnp.minimum(n, N - 1) * G + group)[:, None]
        own = (g >> 1 == t) & (n < N)
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

        def eight(at, further, shared):
            """A thread's eight elements of its row of activations, in words."""
            if shared is None:
                mask = jnp.broadcast_to(own[:, None], (*t.shape, 8))
                x = lo.load(x_ref, (x_row, neighbours(at + further, 8)), mask=mask)
                return lo.unstack4(lo.words_of_halves(x))
            return lo.four_shared(shared, (self.K * n + at) >> 1, further >> 1, own)

        def turn(i, totals, loaded=None, shared=None):
            step = first + i * ahead
            codes, d = loaded or load(step)
            if not loaded:
                lo.loads_first()
            for j in range(ahead):
                b = [word for i in (0, 8) for word in eight(STEP * step + 16 * t, STEP * j + i, shared)]
                a = [[pair for word in its for pair in lo.bfloats_of_bytes(word)] for its in codes[j]]
                c = [zero] * 4
                for k in range(0, 8, 2):
                    both = a[0][k], a[1][k], a[0][k + 1], a[1][k + 1]
                    c = lo.warp_product(both, b[k : k + 2], c, jnp.bfloat16)
                scales = [_float(jnp.where(t < 2, *of_row[2 * j : 2 * j + 2])) for of_row in d]
                totals = [[lo.fma(c[2 * h + e], scales[h], totals[h][e]) for e in range(N)] for h in range(2)]
            return totals

        totals, turns = [[zero] * N for _ in range(2)], self.steps // ahead
        if norm is None:
            totals = lo.loop(turns, turn, totals)
        else:
            loaded = load(first)
            lo.loads_first()
            shared = self._normed(x_ref, *norm, N)
            totals = turn(0, totals, loaded, shared)
            if turns > 1:
                totals = lo.loop(turns - 1, lambda i, totals: turn(i + 1, totals, None, shared), totals)
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
    norm: tuple[Array, float] | None = None, tuning: lo.Tuning | None = None,
) -> list[Array]:  # fmt: skip
    """`x[N, in] · w[out, in]ᵀ → [N, out]` for each weight, or one stack `x[N, G, in] · w[G, out, in]ᵀ → [N, G, out]`.

    weights: (parts, format) of packed weights, ({"values": w}, None) of plain ones. 1 ≤ N ≤ MAX_ROWS.
    norm: weight [in] and eps of an RMS norm of x that comes first, rounded to x's dtype.
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
    if norm is not None and (stacked or K % (128 * warps) or not all(isinstance(w, _Bytes) for w in each)):
        raise NotImplementedError(f"no norm of rows of {K} of {x.dtype} beside these weights")
    starts = np.cumsum([0, *(w.programs for w in each)]).tolist()

    def kernel(x_ref, *refs):
        refs, i = list(refs), pl.program_id(0)
        rule = None if norm is None else (refs.pop(0), norm[1])
        outs = refs[-len(each) :]
        for w, first, out_ref in zip(each, starts, outs, strict=False):
            mine, refs = refs[: len(w.arrays)], refs[len(w.arrays) :]

            @pl.when((i >= first) & (i < first + w.programs))
            def _(w=w, first=first, out_ref=out_ref, mine=mine):
                w.products(mine, x_ref, out_ref, i - first, G, N, rule)

    shapes = [jax.ShapeDtypeStruct((N, w.rows), dtype) for w, dtype in zip(each, out_dtypes, strict=True)]
    arrays = [a for w in each for a in w.arrays]
    out = lo.call(
        kernel, shapes, x.reshape(N * G, K), *([] if norm is None else norm[:1]), *arrays, grid=(starts[-1],),
        tuning=lo.Tuning(warps=warps, stages=1), name=f"direct_{'normed_' if norm else ''}{len(each)}_{N}",
    )  # fmt: skip
    return [y.reshape(N, G, -1) if stacked else y for y in out]
