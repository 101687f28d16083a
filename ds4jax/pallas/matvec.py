"""Products of a packed weight with a few rows of activations: decode, and verification of a few tokens.

Memory-bound: each weight is read once, decoded in registers to bytes, and multiplied four at a time with activations
split into digits (`activations`). A program takes `rows` output rows and all of the input; its threads keep their own
partial sums and meet once, at the end.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from ds4jax.pallas import activations, decode, tuned
from ds4jax.pallas import lowering as lo

Array = jax.Array

MAX_ROWS = 8  # rows of activations


def fits(format: str, K: int) -> None:
    """NotImplementedError unless rows of K elements of `format` can be read by these kernels."""
    if format not in decode.DECODERS:
        raise NotImplementedError(f"no kernel for {format}")
    if K % activations.BLOCK:
        raise NotImplementedError(f"rows of {K} elements are no multiple of {activations.BLOCK}")


def accumulate(
    sums: list[Array], run: decode.Run, x_refs: tuple[Any, Any, Any], x_rows: list[Any], digits: int
) -> list[Array]:
    """Add a run's products with each row of activations to float32 sums [L, R].

    x_refs: words [N·digits, K/4], scale [N, K/32] and sums [N, K/16] of `activations.Digits`. x_rows: their rows.
    """
    words_ref, scale_ref, sums_ref = x_refs
    place = (4 * run.at)[:, None] + jnp.arange(4, dtype=jnp.int32)
    if run.floats is not None:
        return [s + _float_products(run, x_refs, n, place, digits) for s, n in zip(sums, x_rows, strict=True)]
    words, out = run.four(), []
    for total, n in zip(sums, x_rows, strict=True):
        whole = None
        for digit in range(digits):
            x = lo.unstack4(lo.load(words_ref, (n * digits + digit, place)))
            dot = None
            for w, xw in zip(words, x, strict=True):
                dot = lo.dot4(w, jnp.broadcast_to(xw[:, None], w.shape), dot)
            if whole is None:
                whole = dot
            elif digit == 1:
                whole = whole * 256 + dot  # at most 2³¹/16: 16 products of 8 and 16 bits
            else:
                whole = whole.astype(jnp.float32) * 256.0 + dot.astype(jnp.float32)
        scale = lo.load(scale_ref, (n, run.at >> 1))
        total = total + whole.astype(jnp.float32) * (run.scale * scale[:, None])
        if run.offset is not None:
            total = total + run.offset * lo.load(sums_ref, (n, run.at))[:, None]
        out.append(total)
    return out


def _float_products(run: decode.Run, x_refs: tuple[Any, Any, Any], n: Any, place: Array, digits: int) -> Array:
    words_ref, scale_ref, _ = x_refs
    x = jnp.zeros((place.shape[0], 16), jnp.float32)
    for digit in range(digits):
        x = 256.0 * x + lo.bytes_of_words(lo.load(words_ref, (n * digits + digit, place))).astype(jnp.float32)
    scale = lo.load(scale_ref, (n, run.at >> 1))
    return jnp.sum(run.floats * x[:, None, :], axis=2) * (run.scale * scale[:, None])


def program_rows(program: Any, R: int) -> list[Array]:
    """The R rows of a program, each int32 [1]. One at a time, because of an array [places, rows] a compiler gives a
    thread one row and several places, and has to pass every word of the activations from thread to thread."""
    return [program * R + jnp.full(1, r, jnp.int32) for r in range(R)]


def inside(row: Array, R: int, out: int) -> Array:
    """`row`, or the last of `out` rows where programs of R rows reach past them."""
    return jnp.minimum(row, out - 1) if out % R else row


def row_products(
    tiles: list[tuple[str, decode.Tile, np.ndarray | None]], K: int, tuning: lo.Tuning, x_refs: tuple[Any, Any, Any],
    x_rows: list[Any], digits: int,
) -> list[list[Array]]:  # fmt: skip
    """Each tile's rows times rows `x_rows` of the activations: for every tile, one float32 [R] each.

    tiles: (format, rows, codebook), all of one format: they are read side by side, and activations once for all.
    """
    format, first, codebook = tiles[0]
    count = K // decode.DECODERS[format].unit
    units = min(tuning.units, lo.power_of_two(count))
    steps, ragged = -(-count // units), count % units != 0
    R = first.rows.shape[0]

    def read(i, these):
        u = lo.opaque(i * units + jnp.arange(units, dtype=jnp.int32))
        here = jnp.minimum(u, count - 1) if ragged else u
        for runs in zip(*(decode.runs(format, tile, here, codebook) for tile in these), strict=True):
            for j, run in enumerate(runs):
                if ragged:
                    live = (u < count)[:, None]
                    offset = None if run.offset is None else jnp.where(live, run.offset, 0)
                    run = dataclasses.replace(run, scale=jnp.where(live, run.scale, 0), offset=offset)
                yield j, run

    def step(_, runs, sums):
        sums = list(sums)
        for j, run in runs:
            sums[j] = accumulate(sums[j], run, x_refs, x_rows, digits)
        return sums

    zeros = [[jnp.zeros((units, R), jnp.float32) for _ in x_rows] for _ in tiles]
    sums = decode.pipelined(steps, tuning.ahead, [tile for _, tile, _ in tiles], read, step, zeros)
    return [[jnp.sum(s, axis=0) for s in its] for its in sums]


def flat_parts(parts: dict[str, Array]) -> tuple[list[str], list[Array]]:
    """Names, and parts with all leading axes in one: [rows, entries]."""
    return list(parts), [p.reshape(-1, p.shape[-1]) for p in parts.values()]


def table_for(format: str, codebook: np.ndarray | None) -> list[Array]:
    """What a kernel reads in place of the codebook, as a list of no or one argument."""
    if decode.DECODERS[format].codebook != "grid":
        return []
    return [jnp.asarray(decode.table(format, codebook))]


def matvec(
    x: Array, parts: dict[str, Array], format: str, out_dtype: Any, codebook: np.ndarray | None = None,
    tuning: lo.Tuning | None = None, norm: tuple[Array, float] | None = None,
) -> Array:  # fmt: skip
    """`x[N, in] · w[out, in]ᵀ → [N, out]`, or `x[N, G, in] · w[G, out, in]ᵀ → [N, G, out]`, 1 ≤ N ≤ 8.

    parts, format: of the `QuantizedArray`. codebook: of an IQ format: its grid or its sixteen values. norm: see
    `activations.split`.
    NotImplementedError where no kernel serves the call.
    """
    stacked = x.ndim == 3
    N, K = x.shape[0], x.shape[-1]
    G, out = (x.shape[1] if stacked else 1), parts["codes"].shape[-2]
    fits(format, K)
    if not 1 <= N <= MAX_ROWS:
        raise NotImplementedError(f"{N} rows of activations; this kernel takes 1 to {MAX_ROWS}")
    tuning = tuning or tuned.matvec(format, N, G * out, K)
    digits = activations.digits_for(x.dtype)
    xs = activations.split(x.reshape(N * G, K), digits, norm)  # row n·G + g
    names, arrays = flat_parts(parts)
    table = table_for(format, codebook)
    R = min(tuning.rows, lo.power_of_two(out))

    def kernel(*refs):
        words, scale, sums, *part_refs = refs[: 3 + len(arrays)]
        table_ref = refs[3 + len(arrays)] if table else None
        out_ref = refs[-1]
        g = pl.program_id(1)
        named, mine = dict(zip(names, part_refs, strict=True)), program_rows(pl.program_id(0), R)
        tiles = [(format, decode.Tile(named, g * out + inside(row, R, out), table_ref), codebook) for row in mine]
        results = row_products(tiles, K, tuning, (words, scale, sums), [n * G + g for n in range(N)], digits)
        for row, ys in zip(mine, results, strict=True):
            for n, y in enumerate(ys):
                lo.store(out_ref, (n * G + g, row), y, mask=row < out)

    y = lo.call(
        kernel, jax.ShapeDtypeStruct((N * G, out), out_dtype), xs.words.reshape(-1, K // 4), xs.scale, xs.sums, *arrays,
        *table, grid=(-(-out // R), G), tuning=tuning, name=f"matvec_{format.lower()}_{N}",
    )  # fmt: skip
    return y.reshape(N, G, out) if stacked else y
