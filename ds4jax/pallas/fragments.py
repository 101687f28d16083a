"""Products on tensor cores whose operands never leave registers: batches, from a few to some dozens of rows.

One warp's `mma` takes 16 rows of weights and 8 rows of activations at a time, and which thread holds which number is
written down (PTX ISA, `mma.m16n8k16`). So a thread decodes the very numbers that it hands over: no shared memory, no
other thread waits. Any order of the columns serves, as long as both operands have the same, so a thread takes whole
units of a row, and activations are written once in the order in which the threads want them (`halves`).

Both operands are float16: its eleven bits hold every code exactly, and a bfloat16 activation as well, once a power of
two has brought its row into range.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from ds4jax.pallas import decode, matvec, tuned
from ds4jax.pallas import lowering as lo
from ds4jax.pallas.experts import Stack

Array = jax.Array

FORMATS = ("Q8_0", "Q4_K")  # of these, Q8_0 is timed; others are not tried on a device
MAX_ROWS = 64  # above, activations come through shared memory faster than each thread loads its own
SHIFT = 6  # weights are multiplied by 2^6: float16 holds a scale of 1e-6 in full then, and weights up to 1023
_STEP = 4  # units of a row that a step takes, one a thread


def _order(format: str, K: int) -> np.ndarray:
    """The column of x at each place of a row of activations, K for a zero: int32 [steps · 4 · elements of a unit].

    In step i, thread t of the four that share a row takes unit 4i + t; of each run of 16 two halves, and the eight
    elements of either that each thread has stand side by side.
    """
    decoder = decode.DECODERS[format]
    count = K // decoder.unit
    u = np.arange(_STEP * -(-count // _STEP)).reshape(-1, _STEP)
    runs = np.stack([decoder.places(u, r) for r in range(decoder.unit // 16)], axis=1)  # [steps, run, t]
    columns = 16 * runs[:, :, None, :, None] + 8 * np.arange(2)[:, None, None] + np.arange(8)
    return np.where((u < count)[:, None, None, :, None], columns, K).reshape(-1).astype(np.int32)


def _pairs(run: decode.Run) -> list[tuple[Array, Array]]:
    """A run's 16 elements times 2^SHIFT: four times two words of two float16 [L] each."""
    scale = run.scale[:, 0] * np.float32(2.0**SHIFT)
    two = lo.half_pair(scale, scale)
    words = [word[:, 0] for word in run.four()]
    if run.offset is None:
        return [tuple(lo.half_mul(p, two) for p in lo.halves_of_bytes(word)) for word in words]
    offset = run.offset[:, 0] * np.float32(2.0**SHIFT)
    least = lo.half_pair(offset, offset)
    return [tuple(lo.half_fma(p, two, least) for p in lo.halves_of_bytes(word)) for word in words]


# ---- activations -----------------------------------------------------------------------------------------------------


def row_scale(largest: Array, shift: int) -> tuple[Array, Array]:
    """For a row whose largest magnitude has the bits `largest`, int32: the power of two that brings it below 2^15, and
    what undoes that and 2^shift, or NaN where the row holds NaN or infinity. float32."""
    exponent = largest >> 23  # those of NaN and infinity are the largest of all
    finite = exponent < 255
    exponent = jnp.clip(exponent, 15, 254)
    undo = (exponent - 14 - shift) << 23
    undo = jnp.where(undo > 0, lax.bitcast_convert_type(undo, jnp.float32), 0.0)
    return lax.bitcast_convert_type((268 - exponent) << 23, jnp.float32), jnp.where(finite, undo, jnp.nan)


def halves(x: Array, order: np.ndarray) -> tuple[Array, Array]:
    """Activations x [rows, K] with their columns in `order` (K: a zero), as these kernels take them.

    Returns words int32 [rows, len(order)/2] of two float16, times a power of two that brings the row's largest below
    2^15; and float32 [rows], what undoes that and the weights' 2^SHIFT: NaN for a row that holds NaN or infinity.
    """
    (rows, K), pairs = x.shape, len(order) // 2
    all_of_row, width = lo.power_of_two(K), min(4096, lo.power_of_two(pairs))

    def kernel(x_ref, order_ref, words_ref, scale_ref):
        n = pl.program_id(0)
        column = jnp.arange(all_of_row, dtype=jnp.int32)
        row = lo.load(x_ref, (n, column), mask=column < K).astype(jnp.float32)
        factor, undo = row_scale(jnp.max(lax.bitcast_convert_type(row, jnp.int32) & 0x7FFFFFFF), SHIFT)
        lo.store(scale_ref, (n + jnp.zeros((1,), jnp.int32),), undo[None])

        def body(i, carry):
            pair = i * width + jnp.arange(width, dtype=jnp.int32)
            both = []
            for e in range(2):
                source = lo.load(order_ref, (2 * pair + e,), mask=pair < pairs)
                both.append(lo.load(x_ref, (n, source), mask=source < K).astype(jnp.float32) * factor)
            lo.store(words_ref, (n, pair), lo.half_pair(*both), mask=pair < pairs)
            return carry

        lo.loop(-(-pairs // width), body, 0)

    shapes = [jax.ShapeDtypeStruct((rows, pairs), jnp.int32), jax.ShapeDtypeStruct((rows,), jnp.float32)]
    tuning = lo.Tuning(warps=lo.warps_for(K), stages=1)
    return lo.call(kernel, shapes, x, jnp.asarray(order), grid=(rows,), tuning=tuning, name="halves")


# ---- the product -----------------------------------------------------------------------------------------------------


def matmul(
    x: Array, parts: dict[str, Array], format: str, out_dtype: Any, codebook: np.ndarray | None = None,
    tuning: lo.Tuning | None = None,
) -> Array:  # fmt: skip
    """`x[N, in] · w[out, in]ᵀ → [N, out]`, or `x[N, G, in] · w[G, out, in]ᵀ → [N, G, out]`; bfloat16 x.

    Weights beyond ±1023 are infinite here, and a row of activations below 1e-32 is zero. NotImplementedError where no
    kernel serves the call.
    """
    stacked = x.ndim == 3
    N, K = x.shape[0], x.shape[-1]
    G, out = (x.shape[1] if stacked else 1), parts["codes"].shape[-2]
    if format not in FORMATS or np.dtype(x.dtype) != jnp.bfloat16 or N > MAX_ROWS:
        raise NotImplementedError(f"{N} rows of {x.dtype} and weights in {format}")
    matvec.fits(format, K)
    unit = decode.DECODERS[format].unit
    count, runs = K // unit, unit // 16
    steps = -(-count // _STEP)
    tuning = tuning or tuned.fragments(N, out, G, steps)
    if steps % tuning.parts:
        raise NotImplementedError(f"{steps} steps are not {tuning.parts} equal parts")
    stack, W, tiles = Stack(parts, format, codebook), tuning.warps, tuning.rows // lo.WARP_ROWS
    M = max(lo.WARP_COLUMNS, lo.power_of_two(N))
    cut, mine = tuning.parts, steps // tuning.parts
    words, undo = halves(x.reshape(N * G, K), _order(format, K))

    def kernel(words_ref, undo_ref, *refs):
        stack_refs, out_ref = refs[:-1], refs[-1]
        g, part = pl.program_id(1) // cut, pl.program_id(1) % cut
        warp, lane_g, t = lo.Threads.of(W)
        row = (pl.program_id(0) * W + warp) * (lo.WARP_ROWS * tiles) + lane_g
        token = lambda n: jnp.minimum(n, N - 1) * G + g  # noqa: E731
        rows = [row + 16 * m + 8 * h for m in range(tiles) for h in range(2)]
        halves_of_tiles = [stack.tile(stack_refs, (g * out + jnp.minimum(r, out - 1))[:, None]) for r in rows]
        x_rows = [token(n + lane_g) for n in range(0, M, lo.WARP_COLUMNS)]

        def body(i, sums):
            sums = [list(of_tile) for of_tile in sums]
            at = part * mine + i
            u = jnp.minimum(_STEP * at + t, count - 1)  # activations are zero behind the last
            decoded = zip(*(decode.runs(format, its, u, codebook) for its in halves_of_tiles), strict=True)
            for r, of_rows in enumerate(decoded):
                weights = [_pairs(run) for run in of_rows]
                for half in range(2):
                    place = (((at * runs + r) * 2 + half) * 16 + t * 4)[:, None] + jnp.arange(4, dtype=jnp.int32)
                    for n, x_row in enumerate(x_rows):
                        b = lo.unstack4(lo.load(words_ref, (x_row[:, None], place)))
                        for m, of_tile in enumerate(sums):
                            for w in range(2):
                                top, bottom = (weights[2 * m + h][2 * half + w] for h in range(2))
                                a = top[0], bottom[0], top[1], bottom[1]
                                of_tile[n] = lo.warp_product(a, b[2 * w : 2 * w + 2], of_tile[n])
            return sums

        zero = jnp.zeros(t.shape, jnp.float32)
        sums = lo.loop(mine, body, [[[zero] * 4 for _ in x_rows] for _ in range(tiles)])
        for m, of_tile in enumerate(sums):
            for n, four in enumerate(of_tile):
                for (h, e), y in zip(np.ndindex(2, 2), four, strict=True):
                    place, r = lo.WARP_COLUMNS * n + 2 * t + e, rows[2 * m + h]
                    y = y * lo.load(undo_ref, (token(place),))
                    lo.store(out_ref, (part * N * G + token(place), r), y, mask=(r < out) & (place < N))

    y = lo.call(
        kernel, jax.ShapeDtypeStruct((cut * N * G, out), jnp.float32 if cut > 1 else out_dtype), words, undo,
        *stack.arguments(), grid=(-(-out // (lo.WARP_ROWS * tiles * W)), G * cut), tuning=tuning,
        name=f"fragments_{format.lower()}",
    )  # fmt: skip
    if cut > 1:
        y = jnp.sum(y.reshape(cut, N * G, out), axis=0).astype(out_dtype)
    return y.reshape(N, G, out) if stacked else y
