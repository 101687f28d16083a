"""Products on tensor cores whose operands never leave registers: batches, from a few to some dozens of rows.

One warp's `mma` takes 16 rows of weights and 8 rows of activations at a time, and which thread holds which number is
written down (PTX ISA, `mma.m16n8k16`). So a thread decodes the very numbers that it hands over: no shared memory, no
other thread waits. Any order of the columns serves, as long as both operands have the same, so a thread takes whole
units of a row, and activations are written once in the order in which the threads want them (`halves`).

Both operands are float16: its eleven bits hold every code exactly, and a bfloat16 activation as well, once a power of
two has brought its row into range.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from ds4jax.pallas import decode, matvec, tuned
from ds4jax.pallas import lowering as lo
from ds4jax.pallas.experts import Stack, activation, combine, schedule

Array = jax.Array

LANES = 32
ROWS = 16  # of weights, in one instruction
COLUMNS = 8  # rows of activations in one instruction
SHIFT = 6  # weights are multiplied by 2^6: float16 holds a scale of 1e-6 in full then, and weights up to 1023
_VECTOR = 16  # bytes that a thread loads at once


@dataclasses.dataclass(frozen=True)
class Walk:
    """How threads walk along rows of K elements of a format.

    In step i, thread t of the four that share a row takes units (4i + t)·each … + each - 1.
    """

    format: str
    K: int
    each: int

    @property
    def unit(self) -> int:
        return decode.DECODERS[self.format].unit

    @property
    def count(self) -> int:
        return self.K // self.unit

    @property
    def steps(self) -> int:
        return -(-self.count // (4 * self.each))

    @property
    def width(self) -> int:
        """Elements of a row of activations, zeros behind the row's end included."""
        return self.steps * 4 * self.each * self.unit

    def columns(self) -> np.ndarray:
        """int32 [width]: the column of x at each place, K for a zero."""
        decoder = decode.DECODERS[self.format]
        i, j, t = (a[..., None, None, None] for a in np.ogrid[: self.steps, : self.each, :4])
        u = (4 * i + t) * self.each + j  # [steps, each, 4, 1, 1, 1]
        runs = [decoder.places(u[..., 0, 0, 0], r) for r in range(decoder.unit // 16)]
        first = 16 * np.stack(runs, axis=-1)[..., None, None]  # [steps, each, 4, runs, 1, 1]
        half, e = np.ogrid[:2, :8]
        column = np.where(u < self.count, first + 8 * half + e, self.K)
        return column.transpose(0, 1, 3, 4, 2, 5).reshape(-1).astype(np.int32)


def walk(format: str, K: int, parts: dict[str, Array]) -> Walk:
    """Units side by side where a unit's codes are less than a thread can load at once."""
    decoder = decode.DECODERS[format]
    codes = parts["codes"]
    nbytes = codes.shape[-1] * codes.dtype.itemsize * decoder.unit // K
    each = max(1, _VECTOR // nbytes)
    while each > 1 and K // decoder.unit % (4 * each):
        each //= 2
    return Walk(format, K, each)


@dataclasses.dataclass(frozen=True)
class _Held(decode.Tile):
    """One row a thread, and of it the units of a step: what they have in common or side by side is loaded once.

    units: int32 [L] each. held: what is loaded. entries: of a row, by part. unit: elements of one.
    """

    units: tuple[Array, ...] = ()
    held: dict[str, list[Array]] = dataclasses.field(default_factory=dict)
    K: int = 0
    unit: int = 0

    def part(self, name: str, index: Array) -> Array:
        ref, each = self.refs[name], len(self.units)
        per = self.K // ref.shape[-1]  # elements of an entry
        if each == 1 or index.ndim > 1:
            return super().part(name, index)
        if per >= each * self.unit:  # of all the thread's units
            if name not in self.held:
                self.held[name] = [super().part(name, index)]
            return self.held[name][0]
        which = next((j for j, u in enumerate(self.units) if u is index), None)
        if per != self.unit or which is None or each != 4:
            return super().part(name, index)
        if name not in self.held:
            side_by_side = self.units[0][:, None] + jnp.arange(4, dtype=jnp.int32)
            self.held[name] = lo.unstack4(super().part(name, side_by_side))
        return self.held[name][which]


def _runs(format: str, tile: decode.Tile, step: Walk, units: list[Array], codebook: Any) -> Iterator[decode.Run]:
    held = _Held(tile.refs, tile.rows, tile.table, tile.through, tuple(units), {}, step.K, step.unit)
    for u in units:
        yield from decode.runs(format, held, u, codebook)


def _pairs(run: decode.Run) -> list[tuple[Array, Array]]:
    """A run's 16 elements times 2^SHIFT: four times two words of two float16 [L] each."""
    scale = run.scale[:, 0] * np.float32(2.0**SHIFT)
    if run.floats is not None:
        n = lo.unstack(run.floats[:, 0] * scale[:, None])
        return [tuple(lo.half_pair(*n[at + e : at + e + 2]) for e in (0, 2)) for at in range(0, 16, 4)]
    offset = None if run.offset is None else run.offset[:, 0] * np.float32(2.0**SHIFT)
    two = lo.half_pair(scale, scale)
    if run.selectors is not None:
        return _looked_up(run, two)
    if run.two_bits:  # as the top of a float16's fraction: 4 + code
        offset = offset - 4.0 * scale
        pairs = lambda word: lo.halves_of_high_bytes(word | np.uint32(0x44444444))  # noqa: E731
    else:
        pairs = lo.halves_of_bytes
    if offset is None:
        return [tuple(lo.half_mul(p, two) for p in pairs(word[:, 0])) for word in run.four()]
    least = lo.half_pair(offset, offset)
    return [tuple(lo.half_fma(p, two, least) for p in pairs(word[:, 0])) for word in run.four()]


def _looked_up(run: decode.Run, scale: Array) -> list[tuple[Array, Array]]:
    """The four magnitudes are multiplied with the scale, not the 16 elements: then bytes are looked up twice, those of
    the numbers' low and those of their high halves, of which the sign is a bit."""
    m = np.asarray(run.magnitudes, np.float16).view(np.int32)
    first, last = (lo.half_mul(jnp.full(scale.shape, two, jnp.int32), scale) for two in m)
    low, high = lo.pick(first, last, 0x6420), lo.pick(first, last, 0x7531)
    minus, out = high ^ np.uint32(0x80808080), []
    for selectors in run.selectors:
        bottom, top = lo.pick(low, low, selectors[:, 0]), lo.pick(high, minus, selectors[:, 0])
        out.append((lo.pick(bottom, top, 0x5140), lo.pick(bottom, top, 0x7362)))
    return out


# ---- activations -----------------------------------------------------------------------------------------------------


def halves(x: Array, order: np.ndarray) -> tuple[Array, Array]:
    """Activations x [rows, K] with their columns in `order` (K: a zero), as these kernels take them.

    Returns words int32 [rows, len(order)/2] of two float16, times a power of two that brings the row's largest below
    2^15; and float32 [rows], what undoes that and the weights' 2^SHIFT: NaN for a row that holds NaN or infinity.
    """
    (rows, K), pairs = x.shape, len(order) // 2
    all_of_row, width = lo.power_of_two(K), min(1024, lo.power_of_two(pairs))

    def kernel(x_ref, order_ref, words_ref, scale_ref):
        n = pl.program_id(0)
        column = jnp.arange(all_of_row, dtype=jnp.int32)
        row = lo.load(x_ref, (n, column), mask=column < K).astype(jnp.float32)
        # of the largest number's bits the exponent; those of NaN and infinity are the largest of all
        bits = lax.bitcast_convert_type(row, jnp.int32) & 0x7FFFFFFF
        exponent = jnp.max(bits) >> 23
        finite = exponent < 255
        exponent = jnp.clip(exponent, 15, 254)
        undo = (exponent - 14 - SHIFT) << 23
        undo = jnp.where(undo > 0, lax.bitcast_convert_type(undo, jnp.float32), 0.0)
        lo.store(scale_ref, (n + jnp.zeros((1,), jnp.int32),), jnp.where(finite, undo, jnp.nan)[None])
        factor = lax.bitcast_convert_type((268 - exponent) << 23, jnp.float32)

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
    return lo.call(
        kernel, shapes, x, jnp.asarray(order), grid=(rows,), tuning=lo.Tuning(warps=4, stages=1), name="halves"
    )


# ---- the product -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Threads:
    """The threads of a program, numbered 4·g + t within their warp: int32 [L] each."""

    warp: Array
    g: Array
    t: Array

    @classmethod
    def of(cls, warps: int) -> _Threads:
        lane = jnp.arange(LANES * warps, dtype=jnp.int32)
        return cls(lane >> 5, lane >> 2 & 7, lane & 3)


def _products(
    tiles: list[tuple[decode.Tile, decode.Tile]], step: Walk, codebook: Any, words_ref: Any,
    x_rows: list[tuple[Array, Array | None]], threads: _Threads, ahead: int, part: Any = 0, parts: int = 1,
) -> list[list[list[Array]]]:  # fmt: skip
    """16 rows of weights each (rows g and rows g + 8 of the threads) times 8 rows of activations each (row of thread g,
    and where it is one): for every tile and every 8 rows of activations, four float32 [L] as `lo.warp_product` deals
    them. part, parts: of how many equal parts of the input which one is multiplied."""
    runs_of_unit, steps = step.unit // 16, step.steps // parts

    def read(i, these):
        units = [(4 * (part * steps + i) + threads.t) * step.each + j for j in range(step.each)]
        if step.count % (4 * step.each):
            units = [jnp.minimum(u, step.count - 1) for u in units]  # activations are zero there
        return zip(*(_runs(step.format, tile, step, units, codebook) for tile in these), strict=True)

    def turn(i, runs, sums):
        sums = [list(of_tile) for of_tile in sums]
        for r, both in enumerate(runs):
            decoded = [_pairs(run) for run in both]
            for half in range(2):
                at = (((part * steps + i) * step.each * runs_of_unit + r) * 2 + half) * 16 + threads.t * 4
                place = at[:, None] + jnp.arange(4, dtype=jnp.int32)
                for n, (row, live) in enumerate(x_rows):
                    mask = None if live is None else jnp.broadcast_to(live[:, None], place.shape)
                    x = lo.unstack4(lo.load(words_ref, (row[:, None], place), mask=mask))
                    for m, of_tile in enumerate(sums):
                        for w in range(2):
                            top, bottom = (decoded[2 * m + h][2 * half + w] for h in range(2))
                            a = top[0], bottom[0], top[1], bottom[1]
                            of_tile[n] = lo.warp_product(a, x[2 * w : 2 * w + 2], of_tile[n])
        return sums

    zero = jnp.zeros(threads.t.shape, jnp.float32)
    zeros = [[[zero] * 4 for _ in x_rows] for _ in tiles]
    flat = [tile for pair in tiles for tile in pair]
    return decode.pipelined(steps, ahead, flat, read, turn, zeros)


def _tiles(
    stack: Stack, refs: tuple[Any, ...], base: Array, first: Array, out: int, count: int, threads: _Threads
) -> list[tuple[decode.Tile, decode.Tile]]:  # fmt: skip
    """`count` tiles of 16 rows from row `first` [L] of the matrix that begins at row `base`."""
    row = lambda m, h: base + jnp.minimum(first + 16 * m + 8 * h + threads.g, out - 1)  # noqa: E731
    return [tuple(stack.tile(refs, row(m, h)[:, None]) for h in range(2)) for m in range(count)]


def _check(dtype: Any, K: int, *formats: str) -> None:
    if np.dtype(dtype) != jnp.bfloat16:
        raise NotImplementedError(f"tensor-core kernels take bfloat16 activations, not {np.dtype(dtype)}")
    for format in formats:
        matvec.fits(format, K)


def matmul(
    x: Array, parts: dict[str, Array], format: str, out_dtype: Any, codebook: np.ndarray | None = None,
    tuning: lo.Tuning | None = None,
) -> Array:  # fmt: skip
    """`x[N, in] · w[out, in]ᵀ → [N, out]`, or `x[N, G, in] · w[G, out, in]ᵀ → [N, G, out]`; bfloat16 x."""
    stacked = x.ndim == 3
    N, K = x.shape[0], x.shape[-1]
    G, out = (x.shape[1] if stacked else 1), parts["codes"].shape[-2]
    _check(x.dtype, K, format)
    tuning = tuning or tuned.lookup("warps", format, out, K)
    stack, step = Stack(parts, format, codebook), walk(format, K, parts)
    W, count = tuning.warps, max(1, tuning.rows // ROWS)
    M = max(COLUMNS, min(tuning.tokens, lo.power_of_two(N)))
    grid = (-(-out // (ROWS * count * W)), -(-N // M), G)
    cut = tuning.parts
    while step.steps % cut:
        cut //= 2
    words, undo = halves(x.reshape(N * G, K), step.columns())

    def kernel(words_ref, undo_ref, *refs):
        stack_refs, out_ref = refs[:-1], refs[-1]
        threads, g, part = _Threads.of(W), pl.program_id(2) // cut, pl.program_id(2) % cut
        first = (pl.program_id(0) * W + threads.warp) * (ROWS * count)
        token = pl.program_id(1) * M
        of = lambda n: jnp.minimum(token + n, N - 1) * G + g  # noqa: E731
        tiles = _tiles(stack, stack_refs, g * out, first, out, count, threads)
        x_rows = [(of(COLUMNS * n + threads.g), None) for n in range(M // COLUMNS)]
        sums = _products(tiles, step, codebook, words_ref, x_rows, threads, tuning.ahead, part, cut)
        for m, of_tile in enumerate(sums):
            for n, four in enumerate(of_tile):
                for (h, e), y in zip(np.ndindex(2, 2), four, strict=True):
                    row, t = first + 16 * m + 8 * h + threads.g, COLUMNS * n + 2 * threads.t + e
                    y = y * lo.load(undo_ref, (of(t),))
                    lo.store(out_ref, (part * N * G + of(t), row), y, mask=(row < out) & (token + t < N))

    y = lo.call(
        kernel, jax.ShapeDtypeStruct((cut * N * G, out), jnp.float32 if cut > 1 else out_dtype), words, undo,
        *stack.arguments(), grid=(*grid[:2], G * cut), tuning=tuning, name=f"warps_{format.lower()}",
    )  # fmt: skip
    if cut > 1:
        y = jnp.sum(y.reshape(cut, N * G, out), axis=0).astype(out_dtype)
    return y.reshape(N, G, out) if stacked else y


# ---- routed experts --------------------------------------------------------------------------------------------------


def _by_width(M: int, count: Array, body: Callable[[int], None]) -> None:
    """body(width) for the power of two from 8 to M that holds `count` assignments; nothing where there are none."""
    least = 0
    for width in (COLUMNS << i for i in range((M // COLUMNS).bit_length())):
        pl.when((count > least) & (count <= width))(lambda width=width: body(width))
        least = width


def _grouped(
    name: str, x: Array, stacks: list[Stack], ids: Array, more: list[Array], dtype: Any, tuning: lo.Tuning | None,
    source: Callable[[Array], Array], finish: Callable[..., Array],
) -> Array:  # fmt: skip
    """Every assignment's products with its expert's rows of `stacks`: [T·k, out] of `dtype`.

    x: [rows, K]; an assignment n has row source(n). finish(n [L], refs of `more`, *products [L]) → [L].
    """
    K, N, first = x.shape[1], ids.size, stacks[0]
    experts, out = first.parts["codes"].shape[:2]
    _check(x.dtype, K, *(stack.format for stack in stacks))
    tuning = tuning or tuned.lookup("warps", first.format, out, K)
    step = walk(first.format, K, first.parts)
    W, count, M = tuning.warps, max(1, tuning.rows // ROWS), max(COLUMNS, tuning.tokens)
    arguments = [stack.arguments() for stack in stacks]
    words, undo = halves(x, step.columns())

    def kernel(*refs):
        refs, out_ref = list(refs[:-1]), refs[-1]
        take = lambda n: [refs.pop(0) for _ in range(n)]  # noqa: E731
        more_refs, (order_ref, expert_ref, start_ref, count_ref), (words_ref, undo_ref) = (
            take(len(more)),
            take(4),
            take(2),
        )
        given = [(stack, tuple(take(len(its)))) for stack, its in zip(stacks, arguments, strict=True)]
        i, threads = pl.program_id(1), _Threads.of(W)
        base = (pl.program_id(0) * W + threads.warp) * (ROWS * count)
        start, used = start_ref[i], count_ref[i]

        def tile(width):
            tiles = [
                t for stack, its in given for t in _tiles(stack, its, expert_ref[i] * out, base, out, count, threads)
            ]
            x_rows = []
            for n in range(0, width, COLUMNS):
                live = n + threads.g < used
                x_rows.append((source(lo.load(order_ref, (start + n + threads.g,), mask=live)), live))
            sums = _products(tiles, step, first.codebook, words_ref, x_rows, threads, tuning.ahead)
            for n in range(0, width, COLUMNS):
                for e in range(2):
                    place = n + 2 * threads.t + e
                    assignment = lo.load(order_ref, (start + place,), mask=place < used)
                    back = lo.load(undo_ref, (source(assignment),))
                    for m in range(count):
                        for h in range(2):
                            its = [sums[s * count + m][n // COLUMNS][2 * h + e] * back for s in range(len(stacks))]
                            row = base + 16 * m + 8 * h + threads.g
                            y = finish(assignment, more_refs, *its)
                            lo.store(out_ref, (assignment, row), y, mask=(row < out) & (place < used))

        _by_width(M, used, tile)

    plan = schedule(ids, experts, M)
    return lo.call(
        kernel, jax.ShapeDtypeStruct((N, out), dtype), *more, *plan, words, undo,
        *(a for its in arguments for a in its), grid=(-(-out // (ROWS * count * W)), plan.expert.shape[0]),
        tuning=tuning, name=f"warps_{name}_{first.format.lower()}",
    )  # fmt: skip


def grouped_swiglu(
    x: Array, gate: Stack, up: Stack, ids: Array, weights: Array, limit: float, tuning: lo.Tuning | None = None
) -> Array:
    """`quant.expert_swiglu` for a batch: bfloat16 x[T, D], ids and weights [T, k] → h[T, k, F]."""
    if gate.format != up.format:
        raise NotImplementedError(f"gate in {gate.format} and up in {up.format}")
    k = ids.shape[1]

    def finish(n, refs, gate, up):
        return activation(gate, up, lo.load(refs[0], (n,)), limit)

    h = _grouped("swiglu", x, [gate, up], ids, [weights.reshape(-1)], x.dtype, tuning, lambda n: n // k, finish)
    return h.reshape(*ids.shape, gate.out)


def grouped_down(h: Array, stack: Stack, ids: Array, tuning: lo.Tuning | None = None) -> Array:
    """`quant.expert_down` for a batch: bfloat16 h[T, k, F], ids[T, k] → y[T, D]."""
    T, k, F = h.shape
    y = _grouped("down", h.reshape(T * k, F), [stack], ids, [], jnp.float32, tuning, lambda n: n, lambda n, refs, y: y)
    return combine(y, T, h.dtype)
