"""Routed experts by byte products: every chosen expert's rows are read where they lie in the stack.

Two kernels a layer: gate, up, activation and routing weight in one; down in the other, one partial row per
(token, expert), which XLA adds up. A program takes some rows of one expert, so that a single token fills the device.

For a few tokens each assignment (token, expert) is a program's. For a batch, assignments are sorted by expert and a
program multiplies what it decodes with up to `Tuning.tokens` of one expert's: decoding costs about as much as the
products of four of them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from ds4jax.pallas import activations, decode, matvec, tuned
from ds4jax.pallas import lowering as lo

Array = jax.Array

MAX_TOKENS = 8


@dataclasses.dataclass(frozen=True)
class Stack:
    """A packed stack [E, out, in]: the parts and format of a `QuantizedArray`, and an IQ format's codebook."""

    parts: dict[str, Array]
    format: str
    codebook: np.ndarray | None = None

    @property
    def out(self) -> int:
        return self.parts["codes"].shape[-2]

    @property
    def count(self) -> int:
        return self.parts["codes"].shape[0]

    def arguments(self) -> list[Array]:
        """What a kernel takes for it: parts [rows, entries], and the codebook's table if there is one."""
        return [*matvec.flat_parts(self.parts)[1], *matvec.table_for(self.format, self.codebook)]

    def tile(self, refs: tuple[Any, ...], rows: Array) -> decode.Tile:
        """Rows of the stack, from the refs of `arguments`."""
        named = dict(zip(self.parts, refs, strict=False))
        return decode.Tile(named, rows, refs[len(named)] if len(refs) > len(named) else None)


def _products(
    stacks: list[tuple[Stack, tuple[Any, ...]]], rows: list[Array], width: int, tuning: lo.Tuning,
    x_refs: tuple[Any, Any, Any], x_rows: list[Any], digits: int,
) -> list[list[list[Array]]]:  # fmt: skip
    """The same rows (int32 [1] each) of every stack, given with its refs, times rows `x_rows` of the digits in
    `x_refs`, by bytes: for each row and stack, one float32 [1] for each of `x_rows`."""
    tiles = [[(stack.format, stack.tile(refs, row), stack.codebook) for row in rows] for stack, refs in stacks]
    multiply = lambda its: matvec.row_products(its, width, tuning, x_refs, x_rows, digits)  # noqa: E731
    if len({stack.format for stack, _ in stacks}) == 1:
        flat = multiply([tile for pair in zip(*tiles, strict=True) for tile in pair])
        return [flat[i : i + len(stacks)] for i in range(0, len(flat), len(stacks))]
    return [list(its) for its in zip(*(multiply(its) for its in tiles), strict=True)]


def _digits(x: Array, digits: int) -> list[Array]:
    """The activations [rows, K] as kernels take them: words [rows · digits, K/4], scale and sums."""
    xs = activations.split(x, digits)
    return [xs.words.reshape(-1, x.shape[-1] // 4), xs.scale, xs.sums]


def _check(tokens: int, width: int, *stacks: Stack) -> None:
    if not 1 <= tokens <= MAX_TOKENS:
        raise NotImplementedError(f"{tokens} tokens; this kernel takes 1 to {MAX_TOKENS}")
    for stack in stacks:
        matvec.fits(stack.format, width)


def activation(gate: Array, up: Array, weight: Any, limit: float) -> Array:
    """weight · silu(min(gate, limit)) · clip(up, ±limit), float32."""
    gate = jnp.minimum(gate, limit)
    return weight * (gate * lo.sigmoid(gate)) * jnp.minimum(jnp.maximum(up, -limit), limit)


def activated(
    products: Callable[..., Array], x: Array, gate: Stack, up: Stack, ids: Array, weights: Array, limit: float,
    tuning: lo.Tuning | None,
) -> Array:  # fmt: skip
    """`quant.expert_swiglu` by a module's `products`, whose `finish` takes numbers of assignments [threads]."""
    k = ids.shape[1]

    def finish(numbers, gate, up):
        return activation(gate, up, numbers[0], limit)

    h = products("swiglu", x, [gate, up], ids, [weights.reshape(-1)], x.dtype, tuning, lambda n: n // k, finish)
    return h.reshape(*ids.shape, gate.out)


def combine(y: Array, T: int, dtype: Any) -> Array:
    """The sum over each token's experts, y [T·k, D] → [T, D] of `dtype`.

    Written out, not reduced: XLA then makes it anew wherever it is used, and steering can sum over it in one launch.
    """
    of_token = y.reshape(T, -1, y.shape[-1])
    rows = [of_token[:, j].astype(jnp.float32) for j in range(of_token.shape[1])]
    return functools.reduce(jnp.add, rows).astype(dtype)


def swiglu(
    x: Array, gate: Stack, up: Stack, ids: Array, weights: Array, limit: float, tuning: lo.Tuning | None = None
) -> Array:
    """`quant.expert_swiglu` for 1 to 8 tokens: x[T, D], ids and weights [T, k] → h[T, k, F] in x's dtype."""
    (T, D), k, F = x.shape, ids.shape[1], gate.out
    _check(T, D, gate, up)
    tuning = tuning or tuned.lookup("swiglu", gate.format, F, D)
    digits = activations.digits_for(x.dtype)
    R = min(tuning.rows, lo.power_of_two(F))
    first = len(gate.arguments())

    def kernel(ids_ref, weights_ref, *refs):
        x_refs, stack_refs, out_ref = refs[:3], refs[3:-1], refs[-1]
        n = pl.program_id(0)
        mine = matvec.program_rows(pl.program_id(1), R)
        expert = jnp.clip(ids_ref[n], 0, gate.count - 1)  # here, because a launch of its own takes as long as routing
        rows = [expert * F + matvec.inside(row, R, F) for row in mine]
        both = [(gate, stack_refs[:first]), (up, stack_refs[first:])]
        results = _products(both, rows, D, tuning, x_refs, [n // k], digits)
        for row, ((gated,), (upped,)) in zip(mine, results, strict=True):
            lo.store(out_ref, (n, row), activation(gated, upped, weights_ref[n], limit), mask=row < F)

    h = lo.call(
        kernel, jax.ShapeDtypeStruct((T * k, F), x.dtype), ids.reshape(-1), weights.reshape(-1),
        *_digits(x, digits), *gate.arguments(), *up.arguments(), grid=(T * k, -(-F // R)), tuning=tuning,
        name=f"swiglu_{gate.format.lower()}",
    )  # fmt: skip
    return h.reshape(T, k, F)


def down(h: Array, stack: Stack, ids: Array, tuning: lo.Tuning | None = None) -> Array:
    """`quant.expert_down` for 1 to 8 tokens: h[T, k, F], ids[T, k] → y[T, D] in h's dtype."""
    (T, k, F), D = h.shape, stack.out
    _check(T, F, stack)
    tuning = tuning or tuned.lookup("down", stack.format, D, F)
    digits = activations.digits_for(h.dtype)
    R = min(tuning.rows, lo.power_of_two(D))

    def kernel(ids_ref, *refs):
        x_refs, stack_refs, out_ref = refs[:3], refs[3:-1], refs[-1]
        n = pl.program_id(0)
        mine = matvec.program_rows(pl.program_id(1), R)
        expert = jnp.clip(ids_ref[n], 0, stack.count - 1)
        rows = [expert * D + matvec.inside(row, R, D) for row in mine]
        results = _products([(stack, stack_refs)], rows, F, tuning, x_refs, [n], digits)
        for row, ((y,),) in zip(mine, results, strict=True):
            lo.store(out_ref, (n, row), y, mask=row < D)

    y = lo.call(
        kernel, jax.ShapeDtypeStruct((T * k, D), jnp.float32), ids.reshape(-1),
        *_digits(h.reshape(T * k, F), digits), *stack.arguments(), grid=(T * k, -(-D // R)), tuning=tuning,
        name=f"down_{stack.format.lower()}",
    )  # fmt: skip
    return combine(y, T, h.dtype)


# ---- batches ---------------------------------------------------------------------------------------------------------


class Schedule(NamedTuple):
    """Assignments n = t·k + j sorted by expert, in tiles of M.

    order: int32 [N + M], assignments by expert, padded with 0. expert, start, count: int32 [tiles]: a tile's expert,
    its first place in `order`, and how many of its rows are in use (0: an unused tile).
    """

    order: Array
    expert: Array
    start: Array
    count: Array


SCHEDULED = 2048  # assignments up to which a kernel makes the plan: every one is compared with every other


def schedule(ids: Array, experts: int, M: int) -> Schedule:
    """ids: int32 [T, k], of experts that exist. The number of tiles depends on shapes alone: N assignments make at most
    N // M full tiles, and min(experts, N) partly filled ones."""
    return (_schedule if ids.size <= SCHEDULED else schedule_plain)(ids, experts, M)


def schedule_plain(ids: Array, experts: int, M: int, apart: int = 1) -> Schedule:
    """`schedule` in plain JAX, some 14 launches. Every tile's first place is a multiple of `apart`, which divides M: of
    more than 1, some places of `order` are in no tile."""
    flat = ids.reshape(-1)
    N = flat.shape[0]
    order = jnp.argsort(flat).astype(jnp.int32)
    counts = jnp.sum(flat[:, None] == np.arange(experts), axis=0, dtype=jnp.int32)
    room = -(-counts // apart) * apart
    starts = jnp.cumsum(room) - room
    if apart > 1:
        place = np.arange(-(-N // apart) * apart + apart * min(experts, N) + M, dtype=np.int32)
        its = jnp.minimum(jnp.sum(place[:, None] >= jnp.cumsum(room), axis=1, dtype=jnp.int32), experts - 1)
        behind = place - (starts - (jnp.cumsum(counts) - counts))[its]
        order = jnp.where(place < (starts + counts)[its], order[jnp.clip(behind, 0, N - 1)], 0)
    else:
        order = jnp.pad(order, (0, M))
    tiles = -(-counts // M)
    ends = jnp.cumsum(tiles)
    tile = np.arange(_tiles(N, experts, M), dtype=np.int32)
    expert = jnp.minimum(jnp.sum(tile[:, None] >= ends, axis=1, dtype=jnp.int32), experts - 1)
    nth = tile - (ends - tiles)[expert]
    count = jnp.clip(counts[expert] - nth * M, 0, M)
    return Schedule(order, expert, starts[expert] + nth * M, jnp.where(tile < ends[-1], count, 0))


def _tiles(N: int, experts: int, M: int) -> int:
    return N // M + min(experts, N)


def _schedule(ids: Array, experts: int, M: int) -> Schedule:
    """In one launch: some programs find the places of 32 assignments each, the others make 32 tiles each."""
    flat, each, E = ids.reshape(-1), 32, lo.power_of_two(experts)
    N = flat.shape[0]
    tiles, chunk = _tiles(N, experts, M), min(64, lo.power_of_two(N))
    chunks, sorters = -(-N // chunk), -(-(N + M) // each)

    def kernel(ids_ref, order_ref, expert_ref, start_ref, count_ref):
        mine = pl.program_id(0) * each + jnp.arange(each, dtype=jnp.int32)
        ones = lambda which: jnp.sum(which.astype(jnp.int32), axis=0)  # noqa: E731

        def some(i):  # along the first axis: a thread adds up what it has of it
            n = i * chunk + jnp.arange(chunk, dtype=jnp.int32)
            its = lo.load(ids_ref, (jnp.minimum(n, N - 1),))
            return n[:, None], jnp.where(n < N, its, E)[:, None]

        @pl.when(pl.program_id(0) < sorters)
        def _():
            own = lo.load(ids_ref, (jnp.minimum(mine, N - 1),))[None, :]

            def before(i, place):
                n, its = some(i)
                return place + ones((its < own) | ((its == own) & (n < mine[None, :])))

            place = lo.loop(chunks, before, jnp.zeros((each,), jnp.int32))
            inside = mine < N  # what is behind them is 0
            lo.store(order_ref, (jnp.where(inside, place, mine),), jnp.where(inside, mine, 0), mask=mine < N + M)

        @pl.when(pl.program_id(0) >= sorters)
        def _():
            e, tile = jnp.arange(E, dtype=jnp.int32), mine - sorters * each
            counts = lo.loop(chunks, lambda i, c: c + ones(some(i)[1] == e[None, :]), jnp.zeros((E,), jnp.int32))
            ends = jnp.cumsum((counts + (M - 1)) // M)
            done = ends[:, None] <= tile[None, :]  # experts whose tiles all come before
            add = lambda which, x: jnp.sum(jnp.where(which, x[:, None], 0), axis=0)  # noqa: E731
            expert = ones(done)
            nth = tile - jnp.max(jnp.where(done, ends[:, None], 0), axis=0)
            left = add(e[:, None] == expert[None, :], counts) - nth * M  # 0 where there is no such expert
            inside = tile < tiles
            lo.store(expert_ref, (tile,), jnp.minimum(expert, experts - 1), mask=inside)
            lo.store(start_ref, (tile,), add(done, counts) + nth * M, mask=inside)
            count = jnp.minimum(jnp.maximum(left, 0), M)
            lo.store(count_ref, (tile,), jnp.where(expert < experts, count, 0), mask=inside)

    shapes = [jax.ShapeDtypeStruct((n,), jnp.int32) for n in (N + M, tiles, tiles, tiles)]
    out = lo.call(
        kernel, shapes, flat, grid=(sorters + -(-tiles // each),), tuning=lo.Tuning(warps=4, stages=1), name="schedule"
    )
    return Schedule(*out)


def by_width(least: int, most: int, count: Array, body: Callable[[int], None]) -> None:
    """body(width) for the power of two from `least` to `most` that holds `count`; nothing where that is 0."""
    by_widths([least << i for i in range((most // least).bit_length())], count, body)


def by_widths(widths: list[int], count: Array, body: Callable[[int], None]) -> None:
    """body(width) for the first of the ascending `widths` that holds `count`; nothing where that is 0."""
    for below, width in zip([0, *widths], widths, strict=False):
        pl.when((count > below) & (count <= width))(lambda width=width: body(width))


def _grouped(
    name: str, x: Array, stacks: list[Stack], ids: Array, more: list[Array], dtype: Any, tuning: lo.Tuning | None,
    source: Callable[[Any], Any], finish: Callable[..., Array],
) -> Array:  # fmt: skip
    """Every assignment's products with its expert's rows of `stacks`: [T·k, out] of `dtype`.

    x: [rows, K]; an assignment n has row source(n). finish(n, refs of `more`, *products [1]) → [1].
    """
    K, N, first = x.shape[1], ids.size, stacks[0]
    E, out = first.parts["codes"].shape[:2]
    for stack in stacks:
        matvec.fits(stack.format, K)
    tuning = tuning or tuned.lookup("bytes", first.format, out, K)
    digits = activations.digits_for(x.dtype)
    R, M = min(tuning.rows, lo.power_of_two(out)), min(tuning.tokens, lo.power_of_two(N))
    arguments = [stack.arguments() for stack in stacks]

    def kernel(*refs):
        refs, out_ref = list(refs[:-1]), refs[-1]
        take = lambda n: [refs.pop(0) for _ in range(n)]  # noqa: E731
        more_refs, (order_ref, expert_ref, start_ref, count_ref), x_refs = take(len(more)), take(4), take(3)
        given = [(stack, tuple(take(len(its)))) for stack, its in zip(stacks, arguments, strict=True)]
        mine = matvec.program_rows(pl.program_id(0), R)
        i = pl.program_id(1)
        start, count = start_ref[i], count_ref[i]

        def tile(width):
            rows = [expert_ref[i] * out + matvec.inside(row, R, out) for row in mine]
            ns = [order_ref[start + j] for j in range(width)]
            results = _products(given, rows, K, tuning, tuple(x_refs), [source(n) for n in ns], digits)
            for row, of_row in zip(mine, results, strict=True):
                for j, (n, *sums) in enumerate(zip(ns, *of_row, strict=True)):
                    y = finish(n, more_refs, *sums)
                    lo.store(out_ref, (n, row), y, mask=(row < out) & (j < count))

        by_width(1, M, count, tile)

    plan = schedule(ids, E, M)
    return lo.call(
        kernel, jax.ShapeDtypeStruct((N, out), dtype), *more, *plan, *_digits(x, digits),
        *(a for its in arguments for a in its), grid=(-(-out // R), plan.expert.shape[0]), tuning=tuning,
        name=f"bytes_{name}_{first.format.lower()}",
    )  # fmt: skip


def grouped_swiglu(
    x: Array, gate: Stack, up: Stack, ids: Array, weights: Array, limit: float, tuning: lo.Tuning | None = None
) -> Array:
    """`quant.expert_swiglu` for a batch: x[T, D], ids and weights [T, k] → h[T, k, F] in x's dtype."""
    k = ids.shape[1]

    def finish(n, refs, gate, up):
        return activation(gate, up, refs[0][n], limit)

    h = _grouped("swiglu", x, [gate, up], ids, [weights.reshape(-1)], x.dtype, tuning, lambda n: n // k, finish)
    return h.reshape(*ids.shape, gate.out)


def grouped_down(h: Array, stack: Stack, ids: Array, tuning: lo.Tuning | None = None) -> Array:
    """`quant.expert_down` for a batch: h[T, k, F], ids[T, k] → y[T, D] in h's dtype."""
    T, k, F = h.shape
    y = _grouped("down", h.reshape(T * k, F), [stack], ids, [], jnp.float32, tuning, lambda n: n, lambda n, refs, y: y)
    return combine(y, T, h.dtype)
