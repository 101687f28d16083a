"""Products of a packed weight with many rows of activations, on tensor cores.

A program decodes a tile of the weight to bfloat16 and multiplies a tile of tokens with it, step by step along the
input. Decoding costs more than multiplying, so a step decodes as much as fits, stores it to shared memory sixteen
bytes at a time, and waits once for the products; while a program waits, others decode.

The same loop serves one matrix and routed experts. For experts, assignments (token, expert) are sorted by expert and
cut into tiles of `tokens` rows by a schedule of fixed size: no capacity, no loop whose length depends on data, and at
most one partly filled tile an expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from ds4jax.pallas import decode, matvec, tuned
from ds4jax.pallas import lowering as lo
from ds4jax.pallas.experts import Stack, activation, by_width, combine, schedule

Array = jax.Array

PROGRAMS = 512  # that a device runs at once, or more
LEAST = 64  # tokens of a tile that are multiplied at least: those of an instruction of Hopper's


def _check(dtype: Any, K: int, *formats: str) -> None:
    if np.dtype(dtype) != jnp.bfloat16:
        raise NotImplementedError(f"tensor-core kernels take bfloat16 activations, not {np.dtype(dtype)}")
    for format in formats:
        matvec.fits(format, K)


def _in_kernel_order(x: Array, format: str, units: int) -> Array:
    """x [T, K] with its columns as the kernel meets them, so that it reads them in a row; zeros where a row's units do
    not fill a step: [T, steps · units · elements of a unit]."""
    K = x.shape[-1]
    unit = decode.DECODERS[format].unit
    count = K // unit
    u = np.arange(-(-count // units) * units)
    order = decode.columns(format, u)
    order = np.where((u < count).repeat(unit), order, K).astype(np.int32)
    if len(order) > K:
        x = jnp.pad(x, ((0, 0), (0, len(order) - K)))
    return x if (order == np.minimum(np.arange(len(order)), K)).all() else jnp.take(x, order, axis=1)


def _units(format: str, K: int, units: int) -> int:
    return min(units, lo.power_of_two(K // decode.DECODERS[format].unit))


def _products(
    tiles: list[tuple[str, decode.Tile, np.ndarray | None]], K: int, units: int, x_ref: Any, x_rows: Array,
    part: Any = 0, parts: int = 1, ahead: int = 0,
) -> list[Array]:  # fmt: skip
    """Each tile's rows times the rows `x_rows` [M] of `_in_kernel_order`: float32 [M, R] each. All of one format.

    part, parts: of how many equal parts of the input which one is multiplied.
    """
    unit = decode.DECODERS[tiles[0][0]].unit
    count, width = K // unit, units * unit
    R, M = tiles[0][1].rows.shape[0], x_rows.shape[0]
    steps = -(-count // units) // parts

    def read(i, these):
        u = (part * steps + i) * units + jnp.arange(units, dtype=jnp.int32)
        if count % units:
            u = jnp.minimum(u, count - 1)  # x is zero there
        return [
            decode.values(format, tile, u, codebook, x_ref.dtype)
            for tile, (format, _, codebook) in zip(these, tiles, strict=True)
        ]

    def step(i, weights, sums):
        column = (part * steps + i) * width + jnp.arange(width, dtype=jnp.int32)
        x = lo.load(x_ref, (x_rows[:, None], column[None, :]))
        return [s + lo.matrix_product(x, w) for s, w in zip(sums, weights, strict=True)]

    zeros = [jnp.zeros((M, R), jnp.float32) for _ in tiles]
    return decode.pipelined(steps, ahead, [tile for _, tile, _ in tiles], read, step, zeros)


def matmul(
    x: Array, parts: dict[str, Array], format: str, out_dtype: Any, codebook: np.ndarray | None = None,
    tuning: lo.Tuning | None = None,
) -> Array:  # fmt: skip
    """`x[N, in] · w[out, in]ᵀ → [N, out]`, or `x[N, G, in] · w[G, out, in]ᵀ → [N, G, out]`; bfloat16 x."""
    stacked = x.ndim == 3
    N, K = x.shape[0], x.shape[-1]
    G, out = (x.shape[1] if stacked else 1), parts["codes"].shape[-2]
    _check(x.dtype, K, format)
    tuning = tuning or tuned.lookup("dense", format, out, K)
    R = max(16, min(tuning.rows, lo.power_of_two(out)))
    M = tuning.tokens
    units = _units(format, K, tuning.units)
    stack = Stack(parts, format, codebook)
    arguments = stack.arguments()

    parts = _parts(-(-out // R) * -(-N // M) * G, -(-K // (units * decode.DECODERS[format].unit)))

    def kernel(x_ref, *refs):
        stack_refs, out_ref = refs[:-1], refs[-1]
        g, part = pl.program_id(2) // parts, pl.program_id(2) % parts
        row = pl.program_id(0) * R + jnp.arange(R, dtype=jnp.int32)
        token = pl.program_id(1) * M + jnp.arange(M, dtype=jnp.int32)
        tile = stack.tile(stack_refs, g * out + jnp.minimum(row, out - 1))
        n = jnp.minimum(token, N - 1) * G + g
        (y,) = _products([(format, tile, codebook)], K, units, x_ref, n, part, parts, tuning.ahead)
        inside = (token < N)[:, None] & (row < out)[None, :]
        lo.store(out_ref, ((part * N * G + token * G + g)[:, None], row[None, :]), y, mask=inside)

    y = lo.call(
        kernel, jax.ShapeDtypeStruct((parts * N * G, out), jnp.float32 if parts > 1 else out_dtype),
        _in_kernel_order(x.reshape(N * G, K), format, units), *arguments, grid=(-(-out // R), -(-N // M), G * parts),
        tuning=tuning, name=f"matmul_{format.lower()}",
    )  # fmt: skip
    if parts > 1:
        y = jnp.sum(y.reshape(parts, N * G, out), axis=0).astype(out_dtype)
    return y.reshape(N, G, out) if stacked else y


def _parts(programs: int, steps: int) -> int:
    """Into how many parts to cut the input, so that a matrix of few rows fills the device; each of some steps."""
    parts = 1
    while programs * parts < PROGRAMS and steps % (2 * parts) == 0 and steps // parts >= 8:
        parts *= 2
    return parts


# ---- routed experts --------------------------------------------------------------------------------------------------


def _grouped(
    name: str, x: Array, stacks: list[Stack], ids: Array, more: list[Array], dtype: Any, tuning: lo.Tuning | None,
    source: Callable[[Array], Array], finish: Callable[..., Array],
) -> Array:  # fmt: skip
    """Every assignment's products with its expert's rows of `stacks`: [T·k, out] of `dtype`.

    x: [rows, K]; an assignment n has row source(n). finish(n [M], refs of `more`, *products [M, R]) → [M, R].
    """
    K, N, first = x.shape[1], ids.size, stacks[0]
    experts, out = first.parts["codes"].shape[:2]
    _check(x.dtype, K, *(stack.format for stack in stacks))
    tuning = tuning or tuned.grouped(first.format, out, K, N, experts)
    R, M = max(16, min(tuning.rows, lo.power_of_two(out))), tuning.tokens
    units = _units(first.format, K, tuning.units)
    arguments = [stack.arguments() for stack in stacks]
    each = len(arguments[0])

    def kernel(x_ref, order_ref, expert_ref, start_ref, count_ref, *refs):
        more_refs, stack_refs, out_ref = refs[: len(more)], refs[len(more) : -1], refs[-1]
        i = pl.program_id(1)
        count = count_ref[i]
        row = pl.program_id(0) * R + jnp.arange(R, dtype=jnp.int32)

        def run(width):
            place = jnp.arange(width, dtype=jnp.int32)
            n = lo.load(order_ref, (start_ref[i] + place,))
            rows = expert_ref[i] * out + jnp.minimum(row, out - 1)
            tiles = [
                (stack.format, stack.tile(stack_refs[j * each : (j + 1) * each], rows), stack.codebook)
                for j, stack in enumerate(stacks)
            ]
            y = finish(n, more_refs, *_products(tiles, K, units, x_ref, source(n), ahead=tuning.ahead))
            lo.store(out_ref, (n[:, None], row[None, :]), y, mask=(place < count)[:, None] & (row < out)[None, :])

        by_width(M // 2 if M > LEAST else M, M, count, run)

    plan = schedule(ids, experts, M)
    return lo.call(
        kernel, jax.ShapeDtypeStruct((N, out), dtype), _in_kernel_order(x, first.format, units), *plan, *more,
        *(a for its in arguments for a in its), grid=(-(-out // R), plan.expert.shape[0]), tuning=tuning,
        name=f"grouped_{name}_{first.format.lower()}",
    )  # fmt: skip


def grouped_swiglu(
    x: Array, gate: Stack, up: Stack, ids: Array, weights: Array, limit: float, tuning: lo.Tuning | None = None
) -> Array:
    """`quant.expert_swiglu` for many tokens, bfloat16."""
    if gate.format != up.format:
        raise NotImplementedError(f"gate in {gate.format} and up in {up.format}")
    k = ids.shape[1]

    def finish(n, refs, gate, up):
        return activation(gate, up, lo.load(refs[0], (n,))[:, None], limit)

    h = _grouped("swiglu", x, [gate, up], ids, [weights.reshape(-1)], x.dtype, tuning, lambda n: n // k, finish)
    return h.reshape(*ids.shape, gate.out)


def grouped_down(h: Array, stack: Stack, ids: Array, tuning: lo.Tuning | None = None) -> Array:
    """`quant.expert_down` for many tokens, bfloat16."""
    T, k, F = h.shape
    # in h's dtype: of thousands of tokens these rows are gigabytes, and float32 would be twice as many
    y = _grouped("down", h.reshape(T * k, F), [stack], ids, [], h.dtype, tuning, lambda n: n, lambda n, refs, y: y)
    return combine(y, T, h.dtype)
