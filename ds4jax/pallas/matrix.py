"""Products of a packed weight with many rows of activations, on tensor cores.

A program decodes tiles of the weight to bfloat16 and multiplies them with a tile of tokens. The weight is the left
operand: on Hopper that one may stay in registers, so what is decoded never goes through shared memory.

The same loop serves one matrix and routed experts. For experts, assignments (token, expert) are sorted by expert and
cut into tiles of `tokens` rows by a schedule of fixed size: no capacity, no loop whose length depends on data, and at
most one partly filled tile an expert.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from ds4jax.pallas import decode, matvec, tuned
from ds4jax.pallas import lowering as lo
from ds4jax.pallas.experts import Stack, activation, schedule

Array = jax.Array

MAX_ROWS = 256  # from here on, expanding the weight once and a plain product is faster


def _check(dtype: Any, K: int, *formats: str) -> None:
    if np.dtype(dtype) != jnp.bfloat16:
        raise NotImplementedError(f"tensor-core kernels take bfloat16 activations, not {np.dtype(dtype)}")
    for format in formats:
        matvec.fits(format, K)


def _in_kernel_order(x: Array, format: str, units: int) -> Array:
    """x [T, K] with its columns as the kernel meets them, so that it reads them in a row; zeros where a row's units do
    not fill a step: [T, steps · units · elements of a unit]."""
    K = x.shape[-1]
    count = K // decode.DECODERS[format].unit
    order = []
    for step in range(-(-count // units)):
        u = step * units + np.arange(units)
        for column in decode.columns(format, u):
            inside = u.repeat(len(column) // units) < count
            order.append(np.where(inside, column, K))
    order = np.concatenate(order).astype(np.int32)
    if (order == K).any():
        x = jnp.pad(x, ((0, 0), (0, 1)))
    return jnp.take(x, order, axis=1)


def _units(format: str, K: int, units: int) -> int:
    return min(units, matvec.power_of_two(K // decode.DECODERS[format].unit))


def _products(
    tiles: list[tuple[str, decode.Tile, np.ndarray | None]], K: int, units: int, x_ref: Any, x_rows: Array
) -> list[Array]:
    """Each tile's rows times the rows `x_rows` [M] of `_in_kernel_order`: float32 [R, M] each. All of one format."""
    format = tiles[0][0]
    unit = decode.DECODERS[format].unit
    count = K // unit
    R, M = tiles[0][1].rows.shape[0], x_rows.shape[0]

    def step(i, sums):
        u = i * units + jnp.arange(units, dtype=jnp.int32)
        if count % units:
            u = jnp.minimum(u, count - 1)  # x is zero there
        generators = [decode.runs(format, tile, u, codebook, matrix=True) for _, tile, codebook in tiles]
        at = i * units * unit
        for runs in zip(*generators, strict=True):
            for pair in zip(*(decode.values(run, x_ref.dtype) for run in runs), strict=True):
                n = pair[0].shape[1]
                column = at + jnp.arange(n, dtype=jnp.int32)
                at = at + n
                x = lo.load(x_ref, (x_rows[:, None], column[None, :]))
                sums = [s + lo.matrix_product(w, x) for s, w in zip(sums, pair, strict=True)]
        return sums

    return lo.loop(-(-count // units), step, [jnp.zeros((R, M), jnp.float32) for _ in tiles])


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
    R = max(16, min(tuning.rows, matvec.power_of_two(out)))
    M = max(16, min(tuning.tokens, matvec.power_of_two(N)))
    units = _units(format, K, tuning.units)
    stack = Stack(parts, format, codebook)
    arguments = stack.arguments()

    def kernel(x_ref, *refs):
        stack_refs, out_ref = refs[:-1], refs[-1]
        g = pl.program_id(2)
        row = pl.program_id(0) * R + jnp.arange(R, dtype=jnp.int32)
        token = pl.program_id(1) * M + jnp.arange(M, dtype=jnp.int32)
        tile = stack.tile(stack_refs, g * out + jnp.minimum(row, out - 1))
        (y,) = _products(
            [(format, tile, codebook)], K, units, x_ref, jnp.minimum(token, N - 1) * G + g
        )  # fmt: skip
        inside = (row < out)[:, None] & (token < N)[None, :]
        lo.store(out_ref, ((token * G + g)[None, :], row[:, None]), y, mask=inside)

    y = lo.call(
        kernel, jax.ShapeDtypeStruct((N * G, out), out_dtype), _in_kernel_order(x.reshape(N * G, K), format, units),
        *arguments, grid=(-(-out // R), -(-N // M), G), tuning=tuning, name=f"matmul_{format.lower()}",
    )  # fmt: skip
    return y.reshape(N, G, out) if stacked else y


# ---- routed experts --------------------------------------------------------------------------------------------------


def grouped_swiglu(
    x: Array, gate: Stack, up: Stack, ids: Array, weights: Array, limit: float, tuning: lo.Tuning | None = None
) -> Array:
    """`quant.expert_swiglu` for many tokens, bfloat16."""
    (T, D), k, F = x.shape, ids.shape[1], gate.out
    _check(x.dtype, D, gate.format, up.format)
    if gate.format != up.format:
        raise NotImplementedError(f"gate in {gate.format} and up in {up.format}")
    tuning = tuning or tuned.grouped(gate.format, F, D, T * k, gate.parts["codes"].shape[0])
    R, M = max(16, min(tuning.rows, matvec.power_of_two(F))), tuning.tokens
    units = _units(gate.format, D, tuning.units)
    plan = schedule(ids, gate.parts["codes"].shape[0], M)
    first, second = gate.arguments(), up.arguments()

    def kernel(x_ref, weights_ref, order_ref, expert_ref, start_ref, count_ref, *refs):
        gate_refs, up_refs, out_ref = refs[: len(first)], refs[len(first) : -1], refs[-1]
        i = pl.program_id(1)
        count = count_ref[i]
        row = pl.program_id(0) * R + jnp.arange(R, dtype=jnp.int32)

        @pl.when(count > 0)
        def _():
            place = jnp.arange(M, dtype=jnp.int32)
            n = lo.load(order_ref, (start_ref[i] + place,))
            rows = expert_ref[i] * F + jnp.minimum(row, F - 1)
            tiles = [
                (stack.format, stack.tile(stack_refs, rows), stack.codebook)
                for stack, stack_refs in ((gate, gate_refs), (up, up_refs))
            ]
            sums = _products(tiles, D, units, x_ref, n // k)
            h = activation(*sums, lo.load(weights_ref, (n,))[None, :], limit)
            lo.store(out_ref, (n[None, :], row[:, None]), h, mask=(row < F)[:, None] & (place < count)[None, :])

    h = lo.call(
        kernel, jax.ShapeDtypeStruct((T * k, F), x.dtype), _in_kernel_order(x, gate.format, units),
        weights.reshape(-1), *plan, *first, *second, grid=(-(-F // R), plan.expert.shape[0]), tuning=tuning,
        name=f"grouped_swiglu_{gate.format.lower()}",
    )  # fmt: skip
    return h.reshape(T, k, F)


def grouped_down(h: Array, stack: Stack, ids: Array, tuning: lo.Tuning | None = None) -> Array:
    """`quant.expert_down` for many tokens, bfloat16."""
    (T, k, F), D = h.shape, stack.out
    _check(h.dtype, F, stack.format)
    tuning = tuning or tuned.grouped(stack.format, D, F, T * k, stack.parts["codes"].shape[0])
    R, M = max(16, min(tuning.rows, matvec.power_of_two(D))), tuning.tokens
    units = _units(stack.format, F, tuning.units)
    plan = schedule(ids, stack.parts["codes"].shape[0], M)
    arguments = stack.arguments()

    def kernel(h_ref, order_ref, expert_ref, start_ref, count_ref, *refs):
        stack_refs, out_ref = refs[:-1], refs[-1]
        i = pl.program_id(1)
        count = count_ref[i]
        row = pl.program_id(0) * R + jnp.arange(R, dtype=jnp.int32)

        @pl.when(count > 0)
        def _():
            place = jnp.arange(M, dtype=jnp.int32)
            n = lo.load(order_ref, (start_ref[i] + place,))
            rows = expert_ref[i] * D + jnp.minimum(row, D - 1)
            tile = (stack.format, stack.tile(stack_refs, rows), stack.codebook)
            (y,) = _products([tile], F, units, h_ref, n)
            lo.store(out_ref, (n[None, :], row[:, None]), y, mask=(row < D)[:, None] & (place < count)[None, :])

    y = lo.call(
        kernel, jax.ShapeDtypeStruct((T * k, D), jnp.float32),
        _in_kernel_order(h.reshape(T * k, F), stack.format, units), *plan, *arguments,
        grid=(-(-D // R), plan.expert.shape[0]), tuning=tuning, name=f"grouped_down_{stack.format.lower()}",
    )  # fmt: skip
    return jnp.sum(y.reshape(T, k, D), axis=1).astype(h.dtype)
