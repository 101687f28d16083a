"""Several weights times the same few rows of activations, in one launch.

For weights whose elements are numbers as they lie: Q8_0, and plain float16, bfloat16 and float32. Activations need no
preparation, sums are float32 of exact products, and what a layer reads with the same input (query, key, compressors,
indexer) starts once instead of once each. Other formats decode to bytes first (`matvec`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from ds4jax.pallas import decode
from ds4jax.pallas import lowering as lo

Array = jax.Array

MAX_ROWS = 2
THREADS = 128
AHEAD = 4  # steps whose loads are under way at once
PLAIN = ("float16", "bfloat16", "float32")
LARGE = 1 << 25  # elements of a single weight from which on a product by bytes wins: it has fewer instructions


class _Weight:
    """One weight's rows: how many a program takes, and how its threads lie along them."""

    def __init__(self, parts: dict[str, Array]):
        self.q8 = "codes" in parts
        first = parts["codes" if self.q8 else "values"]
        self.rows, self.K = math.prod(first.shape[:-1]), first.shape[-1]
        self.per_group = first.shape[-2]
        self.arrays = [p.reshape(-1, p.shape[-1]) for p in parts.values()]
        self.unit = 16 // first.dtype.itemsize  # elements of a load of 16 bytes
        units, rest = divmod(self.K, self.unit)
        self.threads = min(THREADS, units & -units)
        if rest or self.threads < 16 or (self.q8 and self.K % 32):
            raise NotImplementedError(f"rows of {self.K} elements do not fill {THREADS} threads")
        self.R = THREADS // self.threads
        if first.ndim == 3 and self.per_group % self.R:
            raise NotImplementedError(f"groups of {self.per_group} rows are no multiple of {self.R}")
        self.steps = units // self.threads
        self.programs = -(-self.rows // self.R)

    def products(self, refs: Sequence[Any], x_ref: Any, block: Any, G: int, N: int) -> tuple[Array, list[Array]]:
        """The rows of a block, and their products with each row of activations: float32 [R] each."""
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
                if d is not None:
                    dot = dot * decode.half(d)
                out.append(total + dot)
            return out

        def turn(i, sums):
            for loaded in [load(i * ahead + j) for j in range(ahead)]:
                sums = add(sums, loaded)
            return sums

        ahead = math.gcd(self.steps, AHEAD)
        sums = lo.loop(self.steps // ahead, turn, [jnp.zeros((self.threads, self.R), jnp.float32)] * N)
        return row, [jnp.sum(s, axis=0) for s in sums]


def serves(parts: dict[str, Array], format: str | None) -> bool:
    """Whether these kernels read such a weight: `format` of a packed one, None for a plain one."""
    if format is None:
        return str(parts["values"].dtype) in PLAIN
    return format == "Q8_0"


def products(
    x: Array, weights: Sequence[tuple[dict[str, Array], str | None]], out_dtypes: Sequence[Any]
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
    each = [_Weight(parts) for parts, _ in weights]
    if len(each) == 1 and each[0].rows * K >= LARGE:
        raise NotImplementedError("for large matrices, products of bytes take fewer instructions")
    starts = np.cumsum([0, *(w.programs for w in each)]).tolist()

    def kernel(x_ref, *refs):
        refs, i = list(refs), pl.program_id(0)
        outs = refs[-len(each) :]
        for w, first, out_ref in zip(each, starts, outs, strict=False):
            mine, refs = refs[: len(w.arrays)], refs[len(w.arrays) :]

            @pl.when((i >= first) & (i < first + w.programs))
            def _(w=w, first=first, out_ref=out_ref, mine=mine):
                row, results = w.products(mine, x_ref, i - first, G, N)
                for n, y in enumerate(results):
                    lo.store(out_ref, (n, row), y, mask=row < w.rows)

    shapes = [jax.ShapeDtypeStruct((N, w.rows), dtype) for w, dtype in zip(each, out_dtypes, strict=True)]
    arrays = [a for w in each for a in w.arrays]
    out = lo.call(
        kernel, shapes, x.reshape(N * G, K), *arrays, grid=(starts[-1],),
        tuning=lo.Tuning(warps=THREADS // 32, stages=1), name=f"direct_{len(each)}_{N}",
    )  # fmt: skip
    return [y.reshape(N, G, -1) if stacked else y for y in out]
